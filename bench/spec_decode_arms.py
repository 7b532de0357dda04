"""The arms of the spec_decode benchmark: our ops, and what an engine does with torch in their place.

An arm holds the problems of a visit, computes one after another, and is judged against fp64 or the reference room:
indices and tokens by the share that differs, attention by its relative RMS error. The torch arms restate pipelines that
engines run: ``torch_all_rows`` softmaxes and filters every row and then walks (SGLang's verification, its walk being
our drop-in function), ``torch_sdpa`` attends with a mask over keys and values that lie one after another already,
``torch_sdpa_gathered`` over those it gathers from the pages first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bench import harness
from bench.harness import Arm, Gate
from bench.spec_decode_cases import (
    TOP_K,
    TOP_P,
    AttentionProblem,
    CommitProblem,
    DraftProblem,
    FinalizeProblem,
    VerifyProblem,
)
from m3kernels.spec_decode import (
    draft_topk,
    reference,
    tree_attention,
    tree_commit,
    tree_finalize,
    tree_speculative_sampling_target_only,
    tree_verify,
    verify_tree_greedy,
)

Problem = TypeVar("Problem")
SAME = 0.0  # share of indices that may differ: none
ATTENTION_ERROR = 1e-5  # relative RMS
# A filter or a walk in fp32 may cross a breakpoint of the law that fp64 does not.
FP32_WALK = 0.05


class SpecArm(Arm, Generic[Problem]):
    """One way of computing one op; ``problems`` are what a visit computes, one after another."""

    computes = "fp32"
    tolerance = SAME

    def __init__(self, problems: Sequence[Problem], threads: int) -> None:
        self.problems, self.threads, self.span = list(problems), threads, len(problems)
        self.outputs: list[Any] = [None] * self.span

    def run(self, part: int) -> None:
        for index, problem in enumerate(self.problems):
            self.outputs[index] = self.call(problem)

    def call(self, problem: Problem) -> Any:
        """The timed work for one problem."""
        raise NotImplementedError

    def error(self, problem: Problem, output: Any) -> float:
        """How wrong the output is; nan where it is no output."""
        raise NotImplementedError

    def gate(self) -> Gate:
        """Run the visit once; the worst error counts."""
        self.enter()
        self.run(0)
        errors = [self.error(*pair) for pair in zip(self.problems, self.outputs, strict=True)]
        error = math.nan if any(map(math.isnan, errors)) else max(errors)
        return Gate(error=error, tolerance=self.tolerance)


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of rows (the first dimension) in which two tensors differ; nan for other shapes."""
    if found.shape != expected.shape or not len(found):
        return math.nan
    return float((found != expected).reshape(len(found), -1).any(1).double().mean())


# -- verification -----------------------------------------------------------------------------------------------------
class Verify(SpecArm[VerifyProblem]):
    """tree_verify: straight from logits."""

    def call(self, problem: VerifyProblem) -> Tensor:
        drawn: dict[str, Tensor] = {}
        if problem.case.mode == "coupled":
            drawn = {"seed": problem.seed, "position": problem.position}
        elif problem.case.mode == "target_only":
            drawn = {"coins": problem.coins, "final_coins": problem.final_coins}
        return tree_verify(
            problem.logits,
            problem.candidates,
            problem.next_token,
            problem.next_sibling,
            mode=problem.case.mode,
            temperature=problem.temperature,
            width=problem.width,
            **problem.filters,
            **drawn,
        ).tokens

    def error(self, problem: VerifyProblem, output: Tensor) -> float:
        return differing(output, problem.expected)


class AllRows(SpecArm[VerifyProblem]):
    """Softmax and filters of every row, then a walk over probabilities; greedily: argmax of every row, then a walk.

    In place of mode "coupled" it draws from the same law by coins, as "target_only".
    """

    tolerance = FP32_WALK

    def call(self, problem: VerifyProblem) -> tuple[Tensor, Tensor]:
        requests, nodes = problem.candidates.shape
        how: dict[str, Any] = {"dtype": torch.int32, "device": problem.logits.device}
        predicts = torch.full((requests * nodes,), -1, **how)
        accept_index = torch.full((requests, problem.width), -1, **how)
        accepted = torch.zeros(requests, **how)
        index = torch.arange(requests * nodes, device=problem.logits.device).view(requests, nodes)
        tree = (problem.candidates, index, problem.next_token, problem.next_sibling)
        if problem.case.mode == "greedy":
            verify_tree_greedy(predicts, accept_index, accepted, *tree, problem.logits.argmax(-1))
            return predicts, accept_index
        probs = target_probs(problem)
        tree_speculative_sampling_target_only(
            *(predicts, accept_index, accepted, *tree, problem.coins, problem.final_coins),
            *(probs, torch.zeros_like(probs)),
        )
        return predicts, accept_index

    def error(self, problem: VerifyProblem, output: tuple[Tensor, Tensor]) -> float:
        predicts, path = output
        tokens = predicts[path.clamp(min=0).long()].long().where(path >= 0, -1)
        greedy = problem.case.mode == "greedy"
        return differing(tokens, problem.expected if greedy else problem.expected_by_coins)


def target_probs(problem: VerifyProblem) -> Tensor:
    """(B, N, V) fp32: temperature, softmax, top-k, then top-p among those kept, each renormalised.

    All requests have one top_k here, so top-p needs to sort only that many tokens of a row.
    """
    probs = (problem.logits.float() / problem.temperature[:, None, None]).softmax(-1)
    if not problem.case.filtered:
        return probs
    top = probs.topk(TOP_K, dim=-1)
    kept = top.values / top.values.sum(-1, keepdim=True)
    kept = kept.where(kept.cumsum(-1) - kept < TOP_P, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    return probs.zero_().scatter_(-1, top.indices, kept)


# -- attention --------------------------------------------------------------------------------------------------------
class Attention(SpecArm[AttentionProblem]):
    """tree_attention over the paged cache; ``gated``: with an elementwise gate."""

    tolerance = ATTENTION_ERROR

    def __init__(self, problems: Sequence[AttentionProblem], threads: int, *, gated: bool) -> None:
        super().__init__(problems, threads)
        self.gated = gated

    def call(self, problem: AttentionProblem) -> Tensor:
        return tree_attention(
            problem.q,
            problem.k_cache,
            problem.v_cache,
            problem.block_table,
            problem.cache_seqlens,
            cu_seqlens_q=problem.cu_seqlens_q,
            mask_bits=problem.mask_bits,
            gate=problem.gate if self.gated else None,
        )

    def error(self, problem: AttentionProblem, output: Tensor) -> float:
        expected = problem.expected
        return harness.relative_rms(output, expected * problem.gate.double().sigmoid() if self.gated else expected)


class Sdpa(SpecArm[AttentionProblem]):
    """torch's scaled_dot_product_attention in its fastest form: the query heads of a key-value head as further queries.

    A prefill from nothing goes without a mask, as causal attention with grouped heads. ``gathering``: keys and values
    come from the pages within the timed work; else they lie one after another already. The mask is made before.
    """

    tolerance = ATTENTION_ERROR

    def __init__(self, problems: Sequence[AttentionProblem], threads: int, *, gathering: bool) -> None:
        super().__init__(problems, threads)
        self.gathering = gathering
        self.ready = {}
        for problem in self.problems:
            found = [None if gathering else problem.gathered(cache) for cache in (problem.k_cache, problem.v_cache)]
            seen = problem.allowed()
            bias = torch.zeros_like(seen, dtype=problem.q.dtype).masked_fill_(~seen, -torch.inf)
            self.ready[id(problem)] = (*found, bias if problem.case.tree else None)

    def call(self, problem: AttentionProblem) -> Tensor:
        k, v, bias = self.ready[id(problem)]
        if self.gathering:
            k, v = problem.gathered(problem.k_cache), problem.gathered(problem.v_cache)
        attend = torch.nn.functional.scaled_dot_product_attention
        if problem.case.prefill:
            return attend(problem.q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        return problem.unfolded(attend(problem.folded(problem.q), k, v, attn_mask=bias))

    def error(self, problem: AttentionProblem, output: Tensor) -> float:
        return harness.relative_rms(output, problem.expected)


# -- drafting ---------------------------------------------------------------------------------------------------------
class Draft(SpecArm[DraftProblem]):
    """draft_topk."""

    def call(self, problem: DraftProblem) -> tuple[Tensor, ...]:
        drafts = draft_topk(problem.logits, problem.scores, k=problem.case.k, step=problem.step, d2t=problem.d2t)
        return drafts.tokens, drafts.next_ids, drafts.parents

    def error(self, problem: DraftProblem, output: tuple[Tensor, ...]) -> float:
        expected = (problem.expected[0], problem.expected[2], problem.expected[5])
        return max(differing(*pair) for pair in zip(output, expected, strict=True))


class TorchDraft(Draft):
    """softmax, topk, products with the scores of the paths, topk, gathers."""

    def __init__(self, problems: Sequence[DraftProblem], threads: int) -> None:
        super().__init__(problems, threads)
        self.scores = {id(problem): problem.scores.exp() for problem in self.problems}

    def call(self, problem: DraftProblem) -> tuple[Tensor, ...]:
        k, step = problem.case.k, problem.step
        top = problem.logits.softmax(-1).topk(k, dim=-1)
        tokens = top.indices + problem.d2t[top.indices]
        scores = self.scores[id(problem)][..., None] * top.values
        best = scores.flatten(1).topk(k, dim=-1)
        parents = best.indices if step == 0 else best.indices + k + (step - 1) * k * k
        return tokens, tokens.flatten(1).gather(1, best.indices), parents


# -- trees ------------------------------------------------------------------------------------------------------------
class Finalize(SpecArm[FinalizeProblem]):
    """tree_finalize."""

    def call(self, problem: FinalizeProblem) -> tuple[Tensor, ...]:
        given = (problem.scores, problem.tokens, problem.parent_list, problem.bonus, problem.seq_lens)
        tree = tree_finalize(*given, topk=problem.case.k, num_nodes=problem.case.nodes)
        return tree.candidates, tree.mask_bits, tree.positions, tree.next_token, tree.next_sibling

    def error(self, problem: FinalizeProblem, output: tuple[Tensor, ...]) -> float:
        candidates, _, mask_bits, positions, next_token, next_sibling, _ = problem.expected
        wanted = (candidates, mask_bits, positions, next_token, next_sibling)
        return max(differing(*pair) for pair in zip(output, wanted, strict=True))


class TorchFinalize(Finalize):
    """topk, sort, gathers; parents by comparison, ancestors level by level, links by comparison: no loop over nodes."""

    def call(self, problem: FinalizeProblem) -> tuple[Tensor, ...]:
        k, nodes, requests = problem.case.k, problem.case.nodes, problem.case.requests
        device = problem.scores.device
        selected = problem.scores.topk(nodes - 1, dim=-1).indices.sort(dim=-1).values
        tokens = problem.tokens.gather(1, selected)
        candidates = torch.cat([problem.bonus[:, None], tokens], 1)
        column = selected // k
        parent_of = problem.parent_list.gather(1, column)
        place = (selected[:, None, :] == parent_of[..., None]).int().argmax(-1) + 1
        parents = torch.cat([torch.full((requests, 1), -1, device=device), place.where(column > 0, 0)], 1)
        ancestors = torch.eye(nodes, dtype=torch.bool, device=device).repeat(requests, 1, 1)
        up = parents.clamp(min=0)
        for _ in range(problem.case.steps):
            ancestors |= ancestors.gather(1, up[..., None].expand(-1, -1, nodes))
        words = torch.nn.functional.pad(ancestors, (0, -nodes % 32)).unflatten(-1, (-1, 32)).long()
        mask_bits = (words << torch.arange(32, device=device)).sum(-1).int()
        positions = ancestors.sum(-1) - 1 + problem.seq_lens[:, None]
        index = torch.arange(nodes, device=device)
        child = parents[:, None, :] == index[:, None]  # [b, i, j]: j is a child of i
        next_token = child.int().argmax(-1).where(child.any(-1), -1)
        younger = (parents[:, None, :] == parents[..., None]) & (index > index[:, None]) & (parents[..., None] >= 0)
        next_sibling = younger.int().argmax(-1).where(younger.any(-1), -1)
        return candidates, mask_bits, positions, next_token, next_sibling


# -- commits ----------------------------------------------------------------------------------------------------------
class Commit(SpecArm[CommitProblem]):
    """tree_commit. Caches change in place: the gate computes on copies of them."""

    def call(self, problem: CommitProblem) -> Tensor:
        given = (problem.accept_index, problem.accept_length, problem.k_caches, problem.v_caches)
        return tree_commit(*given, problem.block_table, problem.cache_seqlens).cache_seqlens

    def gate(self) -> Gate:
        self.enter()
        errors = []
        for problem in self.problems:
            ours, theirs = problem.copied(), problem.copied()
            seqlens = self.call(ours)
            given = (theirs.accept_index, theirs.accept_length, theirs.k_caches, theirs.v_caches)
            wanted, _ = reference.tree_commit(*given, theirs.block_table, theirs.cache_seqlens, None)
            pairs = zip([*ours.k_caches, *ours.v_caches], [*theirs.k_caches, *theirs.v_caches], strict=True)
            errors += [differing(seqlens, wanted), *(differing(*pair) for pair in pairs)]
        return Gate(error=max(errors), tolerance=self.tolerance)


class TorchCommit(Commit):
    """Slots of source and target from the block table, then one indexed copy a cache."""

    def call(self, problem: CommitProblem) -> Tensor:
        page_size = problem.k_caches[0].shape[1]
        steps = torch.arange(problem.accept_index.shape[1])
        used = steps <= problem.accept_length[:, None]
        table = problem.block_table.long()

        def slots(offset: Tensor) -> Tensor:
            at = problem.cache_seqlens[:, None] + offset
            page = table.gather(1, (at // page_size).where(used, 0).long())
            return (page * page_size + at % page_size)[used]

        source, target = slots(problem.accept_index.long()), slots(steps.expand_as(used))
        for cache in (*problem.k_caches, *problem.v_caches):
            flat = cache.flatten(0, 1)
            flat[target] = flat[source]
        return problem.cache_seqlens + problem.accept_length + 1


Factory = Callable[[Sequence[Any], int], SpecArm[Any]]
ARMS: dict[str, dict[str, Factory]] = {  # by op; ours first
    "tree_verify": {"m3": Verify, "torch_all_rows": AllRows},
    "tree_attention": {
        "m3": functools.partial(Attention, gated=False),
        "m3_gated": functools.partial(Attention, gated=True),
        "torch_sdpa": functools.partial(Sdpa, gathering=False),
        "torch_sdpa_gathered": functools.partial(Sdpa, gathering=True),
    },
    "draft_topk": {"m3": Draft, "torch": TorchDraft},
    "tree_finalize": {"m3": Finalize, "torch": TorchFinalize},
    "tree_commit": {"m3": Commit, "torch": TorchCommit},
}
