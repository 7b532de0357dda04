"""Fact-aware reward: a claim that evidence refutes, or does not bear out, costs what it weighs in the response.

    R = R_task + alpha R_hallu,  R_hallu = -N_hallu / N_total                     naive, for comparison   (Eq 9)
    w(c*_k) = max_j cos(E(c*_k), E(s_j))                                          saliency               (Eq 10)
    R_fact = - sum_k w(c*_k) I(c*_k) / (sum_k w(c*_k) + eps)                                             (Eq 11)
    I = 1 if refuted or uncertain, else 0                                                                (Eq 12)
    lambda(R_task) = sigmoid(kappa (R_task - mu) / Delta)                                                (Eq 13)
        mu = (tau_min + tau_max) / 2,  Delta = tau_max - tau_min
    R = R_task + lambda(R_task) R_fact                                                                   (Eq 14)

c*_k is the one claim that stands for cluster k, s_j a sentence of the response. The gate lambda lets a policy first
learn the task: facts count from a task reward of about tau_min on. Source: Baichuan-M3, arXiv 2602.06570, on
fact-aware RL.

The paper leaves open how clusters are made and which claim stands for one. Ours: claims are linked where their cosine
reaches ``cluster_threshold``, clusters are what is linked, however far the chain (an answer that does not depend on the
order of the claims); the claim with the largest sum of cosines to its cluster stands for it, the first of equals. Two
choices more:

- *Denoising may not launder.* A cluster is made of claims that read alike, and claims that differ in a dose read alike.
  A cluster's indicator is that of its representative, as the equations have it, so claims are linked only if they also
  have the same indicator: a refuted claim never disappears behind a supported neighbour.
- *A negative cosine weighs nothing*: weights are clipped at 0, else a penalty could become a bonus.

Claims without a verdict (a timeout, an unparsable answer) are left out and counted by name; if their share passes
``max_unjudged`` the reward is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from m3.rewards.fact_verdicts import FactVerdict, Label, count_labels
from m3.rewards.verdict import UnjudgedError
from m3.text.embed import Embedder
from m3.text.words import sentences
from m3kernels.checks import refuse

HALLUCINATED = (Label.refuted, Label.uncertain)  # Eq 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of the fact-aware reward."""

    kappa: float = 10.0  # the paper
    tau_min: float = 0.75  # the paper
    tau_max: float = 0.95  # the paper
    alpha: float = 0.5  # ours: Eq 9's is not given; its penalty then spans half of the task's range
    cluster_threshold: float = 0.8  # ours: not given; with the lexical embedder, a changed word or two in ten
    max_unjudged: float = 0.2  # ours: of all claims
    eps: float = 1e-6  # ours: not given

    def __post_init__(self) -> None:
        if not self.tau_min < self.tau_max:
            raise refuse("fact_aware.Config", "tau_min", f"a number < tau_max {self.tau_max}", self.tau_min)
        if not math.isfinite(self.tau_max - self.tau_min):
            raise refuse("fact_aware.Config", "tau_max", "tau_max - tau_min finite", (self.tau_min, self.tau_max))
        for name, low, high in (("cluster_threshold", -1.0, 1.0), ("max_unjudged", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise refuse("fact_aware.Config", name, f"a number in [{low:g}, {high:g}]", getattr(self, name))
        for name in ("kappa", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise refuse("fact_aware.Config", name, "a number > 0", getattr(self, name))
        if not 0 <= self.alpha < math.inf:
            raise refuse("fact_aware.Config", "alpha", "a number >= 0", self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Claims that say alike. ``members`` are indices into the verdicts; ``representative`` is one of them."""

    members: tuple[int, ...]
    representative: int
    saliency: float
    label: Label  # of the representative


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactReward:
    """``reward`` = ``task_reward`` + ``gate`` x ``penalty``; ``penalty`` (R_fact) in [-1, 0]."""

    reward: float
    task_reward: float
    penalty: float
    gate: float
    naive: float  # Eq 9 of the same verdicts, for comparison
    clusters: tuple[Cluster, ...]
    labels: Mapping[str, int]  # claims by label and by named failure


def fact_reward(
    response: str,
    verdicts: Sequence[FactVerdict],
    embedder: Embedder,
    task_reward: float,
    config: Config | None = None,
) -> FactReward:
    """The reward of a response whose claims have been verified (Eq 10-14).

    Args:
        response: the text that the claims come from.
        verdicts: one a claim, failures included; none where the response claims nothing (R_fact is then 0).
        task_reward: R_task, finite; in [0, 1] if it is Eq 1's.
    Raises:
        UnjudgedError: too many claims without a verdict; counts them by name.
        ValueError: task_reward or an embedding is not finite, or verdicts of a response without a sentence.
    """
    config = config or Config()
    if not math.isfinite(task_reward):
        raise refuse("fact_reward", "task_reward", "a finite number", task_reward)
    labels = count_labels(verdicts)
    judged = [i for i, verdict in enumerate(verdicts) if verdict.label.judged]
    missing = len(verdicts) - len(judged)
    if missing and (not judged or missing > config.max_unjudged * len(verdicts)):
        named = ", ".join(f"{count} {name}" for name, count in labels.items() if count and not Label(name).judged)
        raise UnjudgedError(f"fact_reward: {missing} of {len(verdicts)} claims have no verdict: {named}")
    indicators = np.array([verdicts[i].label in HALLUCINATED for i in judged], dtype=bool)
    clusters: tuple[Cluster, ...] = ()
    penalty = 0.0
    if judged:
        spoken = sentences(response)
        if not spoken:
            raise refuse("fact_reward", "response", "a text with a sentence, having claims", repr(response[:60]))
        claims, told = embedder([verdicts[i].claim for i in judged]), embedder(spoken)
        if not (np.isfinite(claims).all() and np.isfinite(told).all()):
            raise refuse("fact_reward", "embedder", "rows of finite numbers", f"nan or inf by {embedder.name}")
        groups = cluster(claims, indicators, config.cluster_threshold)
        standing = [representative(claims, members) for members in groups]
        weights = saliency(claims[standing], told)
        penalty = fact_penalty(weights, indicators[standing], config.eps)
        clusters = tuple(
            Cluster(
                members=tuple(judged[i] for i in members),
                representative=judged[stands],
                saliency=float(weight),
                label=verdicts[judged[stands]].label,
            )
            for members, stands, weight in zip(groups, standing, weights, strict=True)
        )
    gate = task_gate(task_reward, config)
    return FactReward(
        reward=task_reward + gate * penalty,
        task_reward=task_reward,
        penalty=penalty,
        gate=gate,
        naive=naive_reward(task_reward, int(indicators.sum()), len(judged), config.alpha),
        clusters=clusters,
        labels=labels,
    )


def naive_reward(task_reward: float, hallucinated: int, total: int, alpha: float) -> float:
    """Eq 9; without a claim the task's reward.

    Raises:
        ValueError: more hallucinated claims than claims.
    """
    if not 0 <= hallucinated <= total:
        raise refuse("naive_reward", "hallucinated", f"an integer in [0, {total}]", hallucinated)
    return task_reward - alpha * (hallucinated / total if total else 0.0)


def cluster(claims_N_D: np.ndarray, indicators_N: np.ndarray, threshold: float) -> list[list[int]]:
    """Indices of the claims of each cluster, clusters by their first claim, members in order.

    Args:
        claims_N_D: unit rows.
        indicators_N: bool; claims of different indicators are never linked.
        threshold: cosine from which two claims are linked.
    """
    rows = claims_N_D.astype(np.float64)
    linked = (rows @ rows.T >= threshold - 1e-6) & (indicators_N[:, None] == indicators_N[None, :])
    groups: list[list[int]] = []
    left = set(range(len(rows)))
    for first in range(len(rows)):
        if first not in left:
            continue
        found, ahead = {first}, [first]
        while ahead:
            reached = set(np.flatnonzero(linked[ahead.pop()]).tolist()) - found
            found |= reached
            ahead.extend(reached)
        left -= found
        groups.append(sorted(found))
    return groups


def representative(claims_N_D: np.ndarray, members: Sequence[int]) -> int:
    """The member with the largest sum of cosines to all members; the first of equals (to 1e-6)."""
    rows = claims_N_D[list(members)].astype(np.float64)
    centrality = rows @ rows.sum(0)
    return members[int(np.flatnonzero(centrality >= centrality.max() - 1e-6)[0])]


def saliency(claims_K_D: np.ndarray, sentences_J_D: np.ndarray) -> np.ndarray:
    """(K,) fp64 weights in [0, 1] (Eq 10), negative cosines clipped to 0; unit rows, J >= 1."""
    cosines = claims_K_D.astype(np.float64) @ sentences_J_D.astype(np.float64).T
    return np.clip(cosines.max(1), 0.0, 1.0)


def fact_penalty(saliency_K: np.ndarray, indicators_K: np.ndarray, eps: float) -> float:
    """R_fact in [-1, 0] (Eq 11, 12); 0 without claims, and where nothing has weight."""
    hallucinated = math.fsum(float(weight) for weight in saliency_K[indicators_K])
    return -hallucinated / (math.fsum(float(weight) for weight in saliency_K) + eps) if hallucinated else 0.0


def task_gate(task_reward: float, config: Config) -> float:
    """lambda(R_task) in [0, 1] (Eq 13), without overflow however far from mu."""
    middle = (config.tau_min + config.tau_max) / 2
    x = config.kappa * (task_reward - middle) / (config.tau_max - config.tau_min)
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    grown = math.exp(x)
    return grown / (1.0 + grown)
