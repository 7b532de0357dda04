"""``python -m bench.calibration``: what a mixture of experts is calibrated on, and what that does to its experts.

    generic      passages of English documentation
    self         the model's own responses to prompts of four domains (m3.quantize.calibration)
    self_rare    twice as many responses, those kept that serve rare experts, and tokens forced on experts that still
                 have fewer than --least
    methods      rtn (which needs none), gptq, autoround; autoround_apart: each expert alone, for its own output

Model: bench/small_moe.py. All sets have as many tokens. Held out: the model's own responses drawn with another seed,
and the mixed text of m3.quantize.perplexity. Measured on the layers as they are, so that an expert's error is its own:

    error of an expert = |f(x; rounded) - f(x)|^2 / |f(x)|^2  over the held-out tokens that the router gives it

and on the whole: KL(bf16 || rounded) and nats per token, 95 % intervals by a bootstrap over seeds and sequences.
A seed draws responses, passages, and AutoRound's batches. What is done under ``--out`` is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record, small_moe, tables
from bench.quantize import outputs
from m3.checkpoint import Checkpoint
from m3.models.decoder import DecoderConfig
from m3.models.loader import EMBEDDING, LAYER, NORM, load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize import autoround, gptq
from m3.quantize.block import EXPERT, Block
from m3.quantize.calibration import SELF, Calibration, CalibrationConfig, calibration_of
from m3.quantize.coverage import Coverage, count, draw
from m3.quantize.perplexity import mixed_text
from m3.quantize.scheme import Rounded, Scheme, nearest

DOCUMENT = record.ROOT / "docs" / "experiments"
GENERIC, OWN, RARE, NONE = "generic", "self", "self_rare", "none"
SETS, METHODS = (GENERIC, OWN, RARE), ("rtn", "gptq", "autoround", "autoround_apart")
HELD_OUT_SEED = 1_000
FEW = 16  # held-out tokens; an expert with fewer has no error to speak of
DRAWS = 2000  # of the bootstrap
Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """samples sequences of tokens; least: of an expert in self_rare."""

    out: Path
    seeds: tuple[int, ...] = (1, 2, 3)
    samples: int = 64
    tokens: int = 128
    least: int = 256
    held_out: int = 64
    group_size: int = 32
    iterations: int = 100
    batch: int = 8

    def config(self, seed: int, samples: int, least: int = 0) -> CalibrationConfig:
        return CalibrationConfig(
            samples=samples, tokens=self.tokens, seed=seed, least_tokens=least, max_tokens=self.tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """An arm over its seeds.

    least_tokens, empty, below: of the least served expert; experts with none; experts with fewer than the plan's
    ``least`` (means over seeds, of what the router gives). forced: tokens, in all. worst, mean: error of experts.
    kl, nats: per token, on the model's own words; mixed_kl, mixed_nats: on the mixed text. kl_over_generic: the kl less
    that of the same method calibrated on generic text, seed by seed and sequence by sequence.
    """

    method: str
    calibration: str
    seeds: tuple[int, ...]
    plan: Mapping[str, Any]
    least_tokens: float | None
    empty: float | None
    below: float | None
    forced: float | None
    worst: Interval
    mean: Interval
    kl: Interval
    kl_over_generic: Interval | None
    nats: Interval
    mixed_kl: Interval
    mixed_nats: Interval
    seconds: float
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- the model, layer by layer ----------------------------------------------------------------------------------------
class Layers:
    """Embedding, layers as Blocks, final norm; the head is tied."""

    def __init__(self, folder: Path) -> None:
        source = Checkpoint(folder)
        self.config = DecoderConfig.from_hf(source.config)
        self.embedding, self.norm = source.get(EMBEDDING).float(), source.get(NORM).float()
        self.blocks = []
        for layer in range(self.config.num_layers):
            prefix = LAYER.format(layer)
            names = [name for name in source.names if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): source.get(name) for name in names}
            self.blocks.append(Block.from_tensors(self.config, tensors))

    def embed(self, ids: Tensor) -> Tensor:
        """(S, L) -> (S, L, D)."""
        return F.embedding(ids, self.embedding)

    @torch.no_grad()
    def logprobs(self, ids: Tensor, blocks: Sequence[Block]) -> Tensor:
        """(S, L, V) fp32, through these blocks."""
        hidden = self.embed(ids)
        for block in blocks:
            hidden = block.forward(hidden)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.config.rms_norm_eps)
        return F.log_softmax(hidden @ self.embedding.T, dim=-1)


def quantised(layers: Layers, ids: Tensor, method: str, least: int, seed: int, plan: Plan) -> list[dict[str, Rounded]]:
    """Every layer, from what the quantised layers before it give."""
    scheme = Scheme(group_size=plan.group_size)
    right = seen = layers.embed(ids)
    found = []
    for block in layers.blocks:
        targets = outputs(block, right)
        if method == "rtn":
            rounded = {name: nearest(weight.float(), scheme, "mse") for name, weight in block.weights.items()}
        elif method == "gptq":
            columns = gptq.GptqConfig(least_tokens=least, batch=plan.batch)
            rounded = gptq.quantise_block(block, seen, targets, scheme, columns)
        else:
            learning = autoround.AutoRoundConfig(
                iterations=plan.iterations,
                batch=plan.batch,
                least_tokens=least,
                seed=seed,
                apart=method == "autoround_apart",
            )
            rounded = autoround.quantise_block(block, seen, targets, scheme, learning)
        found.append(rounded)
        seen = outputs(replaced(block, rounded), seen)
        right = targets
    return found


def replaced(block: Block, rounded: Mapping[str, Rounded]) -> Block:
    return block.replaced({name: one.dequantized() for name, one in rounded.items()})


# -- what is measured -------------------------------------------------------------------------------------------------
@torch.no_grad()
def expert_errors(layers: Layers, found: Sequence[Mapping[str, Rounded]], ids: Tensor) -> list[list[float]]:
    """(M, E) relative errors; nan for an expert with few held-out tokens."""
    hidden = layers.embed(ids)
    errors = []
    for block, rounded in zip(layers.blocks, found, strict=True):
        x = block.attend(hidden)[1]
        chosen, other = block.route(x).chosen(), replaced(block, rounded)
        row = []
        for expert in range(layers.config.num_experts):
            rows = x[chosen[:, expert]]
            prefix = EXPERT.format(expert)
            wanted = block.mlp(prefix, rows)
            error = float((other.mlp(prefix, rows) - wanted).square().sum() / wanted.square().sum())
            row.append(error if len(rows) >= FEW else math.nan)
        errors.append(row)
        hidden = block.forward(hidden)
    return errors


def losses(layers: Layers, blocks: Sequence[Block], ids: Tensor) -> list[tuple[float, float, int]]:
    """(KL(bf16 || these blocks), nats, tokens) of each sequence (L,)."""
    found = []
    for one in ids:
        right, got = layers.logprobs(one[None, :-1], layers.blocks)[0], layers.logprobs(one[None, :-1], blocks)[0]
        kl = (right.exp() * (right - got)).double().sum()
        nats = -got.gather(1, one[1:, None]).double().sum()
        found.append((float(kl), float(nats), len(one) - 1))
    return found


def mixed_ids(folder: Path, tokens: int) -> Tensor:
    """The mixed text, cut into sequences."""
    tokenizer = Tokenizer(folder)
    row = [token for text in mixed_text() for token in tokenizer.encode(text)]
    return torch.tensor(row[: len(row) // tokens * tokens]).view(-1, tokens)


# -- runs -------------------------------------------------------------------------------------------------------------
def calibration_set(plan: Plan, model: Path, kind: str, seed: int) -> Calibration:
    """With its coverage."""
    least = plan.least if kind == RARE else 0
    source: str | Path = SELF
    if kind == GENERIC:
        source = plan.out / "generic.txt"
        source.write_text("\n".join(small_moe.english_docs()), encoding="utf-8")
    config = plan.config(seed, plan.samples, least)
    found = calibration_of(source, model, config, store=plan.out / f"responses-{seed}.jsonl")
    coverage = found.coverage or count(load_model(model), found.ids)
    return dataclasses.replace(found, coverage=coverage)


def held_out(plan: Plan, model: Path) -> Tensor:
    """(S, L) of the model's own words."""
    config = plan.config(HELD_OUT_SEED, plan.held_out)
    return calibration_of(SELF, model, config, store=plan.out / f"responses-{HELD_OUT_SEED}.jsonl").stacked()


def run(plan: Plan, model: Path, method: str, kind: str, seed: int) -> dict[str, Any]:
    """One arm with one seed, unless it is there."""
    path = plan.out / f"{method}-{kind}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    layers, coverage = Layers(model), None
    ids, least = torch.zeros(1, 2, dtype=torch.int64), 0
    if kind != NONE:
        found = calibration_set(plan, model, kind, seed)
        ids, coverage = found.stacked(), found.coverage
        least = plan.least if kind == RARE else 0
    begun = time.process_time()
    rounded = quantised(layers, ids, method, least, seed, plan)
    seconds = time.process_time() - begun
    own = held_out(plan, model)
    blocks = [replaced(block, one) for block, one in zip(layers.blocks, rounded, strict=True)]
    told = {
        "errors": expert_errors(layers, rounded, own),
        "own": losses(layers, blocks, own),
        "mixed": losses(layers, blocks, mixed_ids(model, plan.tokens)),
        "routed": None if coverage is None else coverage.total().tolist(),
        "forced": None if coverage is None else coverage.forced(least).tolist(),
        "seconds": seconds,
    }
    path.write_text(json.dumps(told), encoding="utf-8")
    print(f"{method} {kind} {seed}: {seconds:.0f} s", flush=True)
    return told


def interval(values: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """(mean, low, high) of (seeds, parts), seeds and parts drawn again; weighted by (seeds, parts)."""
    weights = np.ones_like(values) if weights is None else weights
    chance = np.random.default_rng(0)
    seeds, parts = values.shape
    means = []
    for _ in range(DRAWS):
        some = np.ix_(chance.integers(seeds, size=seeds), chance.integers(parts, size=parts))
        means.append(values[some].sum() / weights[some].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.sum() / weights.sum()), float(low), float(high)


def row_of(
    plan: Plan,
    method: str,
    kind: str,
    seeds: Sequence[int],
    told: Sequence[Mapping[str, Any]],
    generic: Sequence[Mapping[str, Any]] | None = None,
) -> CalibrationRow:
    errors = np.array([one["errors"] for one in told]).reshape(len(told), -1)
    known = ~np.isnan(errors).any(0)  # experts that are measured in every seed; held-out tokens are the same
    worst = errors[:, known].max(1)
    own, mixed = (np.array([one[name] for one in told]) for name in ("own", "mixed"))
    routed = np.array([one["routed"] for one in told], dtype=float) if told[0]["routed"] else None
    over = None
    if generic is not None:
        over = interval(own[:, :, 0] - np.array([one["own"] for one in generic])[:, :, 0], own[:, :, 2])
    commit, dirty = record.commit()
    shown = {key: value for key, value in dataclasses.asdict(plan).items() if key not in ("out", "seeds")}
    return CalibrationRow(
        method=method,
        calibration=kind,
        seeds=tuple(seeds),
        plan=shown,
        least_tokens=None if routed is None else float(routed.min((1, 2)).mean()),
        empty=None if routed is None else float((routed == 0).sum((1, 2)).mean()),
        below=None if routed is None else float((routed < plan.least).sum((1, 2)).mean()),
        forced=None if routed is None else float(np.array([one["forced"] for one in told]).sum((1, 2)).mean()),
        worst=(float(worst.mean()), float(worst.min()), float(worst.max())),  # least and largest of the seeds
        mean=interval(errors[:, known]),
        kl=interval(own[:, :, 0], own[:, :, 2]),
        kl_over_generic=over,
        nats=interval(own[:, :, 1], own[:, :, 2]),
        mixed_kl=interval(mixed[:, :, 0], mixed[:, :, 2]),
        mixed_nats=interval(mixed[:, :, 1], mixed[:, :, 2]),
        seconds=float(np.mean([one["seconds"] for one in told])),
        commit=commit,
        dirty=dirty,
        machine=record.machine(),
        date=record.now(),
        command=record.command(),
    )


def table(rows: Sequence[CalibrationRow]) -> str:
    """Rows for a reader."""

    def figure(value: Interval, form: str) -> str:
        return f"{value[0]:{form}} [{value[1]:{form}}, {value[2]:{form}}]"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    header = [
        "method",
        "calibration",
        "least tokens",
        "below",
        "forced",
        "worst expert",
        "mean",
        "KL",
        "over generic",
        "KL, mixed text",
    ]
    lines = [
        [
            row.method, row.calibration, number(row.least_tokens), number(row.below), number(row.forced),
            figure(row.worst, ".4f"), figure(row.mean, ".4f"), figure(row.kl, ".5f"),
            "" if row.kl_over_generic is None else figure(row.kl_over_generic, ".5f"), figure(row.mixed_kl, ".5f"),
        ]
        for row in rows
    ]  # fmt: skip
    return tables.table(header, lines)


def figure_of(told: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Each expert: the tokens it was calibrated on, and its error; a panel a method, the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = [method for method in METHODS if (method, GENERIC) in told]
    figure = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for at, method in enumerate(methods):
        axes = figure.add_subplot(1, len(methods), at + 1)
        for kind in SETS:
            one = told[method, kind][0]
            axes.loglog(
                1 + np.array(one["routed"]).ravel() + np.array(one["forced"]).ravel(),
                np.array(one["errors"]).ravel(), ".", label=kind.replace("_", ", "), alpha=0.7,
            )  # fmt: skip
        axes.set_title(method)
        axes.set_xlabel("1 + tokens of the expert, forced ones included")
        axes.set_ylabel("relative error on held-out responses")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; the model is made there too")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Plan.seeds))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=Plan.samples)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="of a sample")
    parser.add_argument("--least", type=int, default=Plan.least, help="tokens of an expert in self_rare")
    parser.add_argument("--held-out", type=int, default=Plan.held_out, help="sequences")
    parser.add_argument("--iterations", type=int, default=Plan.iterations)
    parser.add_argument("--steps", type=int, default=small_moe.SmallMoe.steps, help="of the model's training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--document", type=Path, help=f"write calibration.jsonl and figures there, as {DOCUMENT}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = Plan(
        out=given.out, seeds=tuple(given.seeds), samples=given.samples, tokens=given.tokens, least=given.least,
        held_out=given.held_out, iterations=given.iterations,
    )  # fmt: skip
    model = small_moe.made(plan.out / "model", small_moe.SmallMoe(steps=given.steps))
    told: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for method in given.methods:
        for kind in (NONE,) if method == "rtn" else SETS:
            seeds = plan.seeds[:1] if kind == NONE else plan.seeds
            told[method, kind] = [run(plan, model, method, kind, seed) for seed in seeds]
    rows = [
        row_of(plan, *arm, plan.seeds[: len(one)], one, told.get((arm[0], GENERIC)) if arm[1] != GENERIC else None)
        for arm, one in told.items()
    ]
    print(table(rows))
    if given.document is not None:
        lines = [json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n" for row in rows]
        (given.document / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
        figure_of(told, given.document / "calibration.png")
        for kind in SETS:
            coverage: Coverage | None = calibration_set(plan, model, kind, plan.seeds[0]).coverage
            assert coverage is not None
            draw(coverage, given.document / f"calibration_{kind}.png", least=plan.least)
    return 0


if __name__ == "__main__":
    sys.exit(main())
