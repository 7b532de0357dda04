"""INT4 of SmolLM2-135M by round-to-nearest, GPTQ, AutoRound and the package auto-round: what it costs, what it loses.

    bf16             the checkpoint as it is, computed in fp32
    rtn, rtn_search  rounded to nearest: ranges from min-max, or searched ("weighted")
    gptq, gptq_act   m3.quantize.gptq, columns as they come or in act-order
    autoround        m3.quantize.autoround; each layer sees what the quantised layers before it give
    autoround_minmax, autoround_float   the same from min-max ranges; with inputs from the layers as they are
    package          the package auto-round as it comes, in an interpreter of its own (--peer-python)

All arms that calibrate get the same tokens: responses of the model itself to m3's prompts. All are written as GPTQ
checkpoints and read back by m3.models.loader; INT4 products are exact, so that weights alone make the difference.
Measured on what no arm has seen: nats per token, and KL(bf16 || arm) per token; 95 % intervals by a bootstrap over the
passages, of differences between arms passage by passage.

    text      the mixed text of m3.quantize.perplexity, and the clinical cases of m3/data/cases, a passage each
    answers   responses of the model to prompts on topics that no calibration prompt has

CPU seconds and peaks are of the process that quantises, loading included in the peak.

What is done under ``--out`` is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, record, tables
from bench.small_moe import strings
from m3.checkpoint import Checkpoint, write_checkpoint
from m3.draft.generate import EngineGenerator, Request, prompt_ids
from m3.draft.prompts import read_prompts
from m3.models.decoder import Decoder, DecoderConfig
from m3.models.hub import resolve
from m3.models.loader import EMBEDDING, LAYER, load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize import autoround, gptq
from m3.quantize.block import Block, batches
from m3.quantize.export import COMPANIONS
from m3.quantize.perplexity import mixed_text
from m3.quantize.scheme import Rounded, Scheme, nearest
from m3kernels.int4.convert import to_gptq

RESULTS = record.RESULTS / "quantize" / "accuracy.jsonl"  # not a row of kernels: the report of those reads above
MODEL = "SmolLM2-135M-Instruct"
BF16, PACKAGE = "bf16", "package"
ARMS = (
    BF16, "rtn", "rtn_search", "gptq", "gptq_act", "autoround", "autoround_minmax", "autoround_float", PACKAGE,
)  # fmt: skip
TEXT, ANSWERS = "text", "answers"  # held out
MAX_HELD_OUT = 512  # tokens of a passage
ANSWERED, ANSWER_SEED = 48, 10_000  # held-out prompts, and the seed of the first response
PROMPTS_AT_A_TIME = 48
DRAWS = 10_000  # of the bootstrap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: calibration of ``samples`` sequences of ``tokens``, AutoRound's iterations and batch."""

    out: Path
    arms: tuple[str, ...] = ARMS
    samples: int = 32
    tokens: int = 256
    iterations: int = 20
    batch: int = 4
    group_size: int = 64
    symmetric: bool = True
    peer_python: str | None = None

    @property
    def calibration(self) -> Path:
        return self.out / f"calibration-{self.samples}x{self.tokens}.json"

    def folder(self, arm: str) -> Path:
        kind = f"g{self.group_size}{'' if self.symmetric else 'a'}-{self.samples}x{self.tokens}"
        return (
            self.out / f"{arm}-{kind}-{self.iterations}"
            if "round" in arm or arm == PACKAGE
            else self.out / f"{arm}-{kind}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeRow:
    """An arm on one held-out set. Figures with their 95 % interval: (value, low, high). ``nats_over``, ``kl_over``: how
    much more a token costs than with another arm, and how much larger its KL is; passage by passage."""

    arm: str
    model: str
    group_size: int
    symmetric: bool
    samples: int
    tokens: int
    iterations: int
    batch: int
    held_out: str
    held_out_tokens: int
    perplexity: tuple[float, float, float]
    kl: tuple[float, float, float]
    nats_over: Mapping[str, tuple[float, float, float]]
    kl_over: Mapping[str, tuple[float, float, float]]
    cpu_s: float | None
    wall_s: float | None
    peak_bytes: int | None
    version: str | None
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- calibration ------------------------------------------------------------------------------------------------------
def generate(folder: Path, samples: int, tokens: int, say: Callable[[str], None]) -> list[list[int]]:
    """Prompts with the model's own responses, cut to ``tokens``; those that end earlier are left out."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    prompts = read_prompts().train
    generator = EngineGenerator(model, batch=32)
    found: dict[int, list[int]] = {}
    for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
        requests = []
        for index, text in enumerate(prompts[start : start + PROMPTS_AT_A_TIME], start):
            ids = prompt_ids(tokenizer, text)
            requests.append(Request(ids, (0.7, 1.0)[index % 2], index, max(1, tokens - len(ids))))
        for which, response in generator.generate(requests):
            row = [*requests[which].prompt, *response]
            if len(row) >= tokens:
                found[start + which] = row[:tokens]
        say(f"  {len(found)} responses of {samples}")
        if len(found) >= samples:
            return [found[index] for index in sorted(found)][:samples]
    raise ValueError(f"bench quantize: {len(found)} responses of {tokens} tokens, wanted {samples}")


def held_out_texts() -> list[str]:
    """The mixed text, and every case of ours as the text of its fields."""
    cases = sorted((record.ROOT / "m3" / "data" / "cases").glob("*.json"))
    return [*mixed_text(), *(" ".join(strings(json.loads(path.read_text("utf-8")))) for path in cases)]


def held_out_ids(out: Path, model: Path, say: Callable[[str], None]) -> dict[str, list[list[int]]]:
    """Token ids of every held-out passage, by set; responses are drawn once and kept."""
    tokenizer = Tokenizer(model)
    told = out / "held_out_answers.json"
    if not told.is_file():
        say("held out: the model answers prompts")
        prompts = read_prompts()
        asked = [*prompts.held_out, *prompts.out_of_template][:ANSWERED]
        requests = [
            Request(prompt_ids(tokenizer, text), 1.0, ANSWER_SEED + index, MAX_HELD_OUT // 2)
            for index, text in enumerate(asked)
        ]
        found = dict(EngineGenerator(load_model(model), batch=32).generate(requests))
        rows = [[*request.prompt, *found[index]] for index, request in enumerate(requests)]
        told.write_text(json.dumps(rows), encoding="utf-8")
    texts = [tokenizer.encode(text)[:MAX_HELD_OUT] for text in held_out_texts()]
    return {TEXT: texts, ANSWERS: [row[:MAX_HELD_OUT] for row in json.loads(told.read_text("utf-8"))]}


# -- arms -------------------------------------------------------------------------------------------------------------
Method = Callable[[Block, Tensor, Tensor], dict[str, Rounded]]


def method_of(arm: str, scheme: Scheme, iterations: int, batch: int) -> Method:
    """What turns a layer, its inputs and its targets into integers."""
    if arm.startswith("rtn"):
        kind = "weighted" if arm == "rtn_search" else "minmax"
        return lambda block, inputs, targets: {name: nearest(w, scheme, kind) for name, w in block.weights.items()}
    if arm.startswith("gptq"):
        columns = gptq.GptqConfig(act_order=arm == "gptq_act")
        return lambda block, inputs, targets: gptq.quantise_block(block, inputs, targets, scheme, columns)
    learning = autoround.AutoRoundConfig(
        iterations=iterations, batch=batch, **({"start": "minmax"} if arm == "autoround_minmax" else {})
    )
    return lambda block, inputs, targets: autoround.quantise_block(block, inputs, targets, scheme, learning)


@torch.no_grad()
def outputs(block: Block, hidden: Tensor) -> Tensor:
    return torch.cat([block.forward(part) for part in batches(hidden, 8)])


def quantise(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One arm of ours, here and now, written to settings["out"]."""
    torch.set_num_threads(1)
    source = Checkpoint(settings["model"])
    config = DecoderConfig.from_hf(source.config)
    scheme = Scheme(group_size=settings["group_size"], symmetric=settings["symmetric"])
    method = method_of(settings["arm"], scheme, settings["iterations"], settings["batch"])
    ids = torch.tensor(json.loads(Path(settings["tokens"]).read_text("utf-8")))
    cpu, clock = time.process_time(), time.perf_counter()
    right = seen = F.embedding(ids, source.get(EMBEDDING).float())
    tensors: dict[str, Tensor] = {}
    for layer in range(config.num_layers):
        prefix = LAYER.format(layer)
        own = {name: source.get(name) for name in sorted(source.names) if name.startswith(prefix)}
        block = Block.from_tensors(config, {name.removeprefix(prefix): tensor for name, tensor in own.items()})
        targets = outputs(block, right)
        found = method(block, right if settings["arm"] == "autoround_float" else seen, targets)
        for name, rounded in found.items():
            del own[f"{prefix}{name}.weight"]
            own |= {f"{prefix}{name}.{key}": value for key, value in to_gptq(rounded.to_int4()).items()}
        tensors |= own
        seen = outputs(block.replaced({name: one.dequantized() for name, one in found.items()}), seen)
        right = targets
        error = float((seen - right).square().sum() / right.square().sum())
        print(f"  {settings['arm']}: layer {layer}, {time.process_time() - cpu:.0f} s, error {error:.2e}", flush=True)
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - clock}
    tensors |= {name: source.get(name) for name in source.names if not name.startswith("model.layers.")}
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": settings["arm"] == "gptq_act",
        "checkpoint_format": "gptq",
    }
    out = Path(settings["out"])
    write_checkpoint(out, {**source.config, "quantization_config": quantization}, tensors)
    for name in COMPANIONS:
        if (source.folder / name).is_file():
            (out / name).write_bytes((source.folder / name).read_bytes())
    return {**spent, "peak_bytes": harness.resident("VmHWM")}


def made(plan: Plan, arm: str, model: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """(folder of an arm's checkpoint, what it cost), made by a process of its own."""
    if arm == BF16:
        return model, {}
    folder = plan.folder(arm)
    told = folder / "cost.json"
    if not told.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "arm": arm, "model": str(model), "out": str(folder / "model"), "tokens": str(plan.calibration),
            "group_size": plan.group_size, "symmetric": plan.symmetric,
            "iterations": plan.iterations, "batch": plan.batch,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, "-m", "bench.quantize"]
        if arm == PACKAGE:
            if plan.peer_python is None:
                raise SystemExit(
                    "bench quantize: arm package: want --peer-python PATH of an interpreter with auto-round"
                )
            command = [plan.peer_python, str(record.ROOT / "bench" / "quantize_peer.py")]
        say(f"{arm}: quantising")
        with (folder / "log").open("w", encoding="utf-8") as log:
            done = subprocess.run(
                [*command, str(folder / "settings.json")],
                cwd=record.ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        if done.returncode:
            raise RuntimeError(f"{arm}: {(folder / 'log').read_text('utf-8').strip()[-400:]}")
        told.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
    checkpoint = next(path.parent for path in sorted((folder / "model").rglob("config.json")))
    return checkpoint, json.loads(told.read_text("utf-8"))


# -- what it loses ----------------------------------------------------------------------------------------------------
@torch.inference_mode()
def logprobs(model: Decoder, ids: Sequence[int]) -> Tensor:
    """(T, V) fp32."""
    return F.log_softmax(model.forward(torch.tensor([list(ids)]))[0].float(), dim=-1)


def score(folder: Path, model: Path, passages: Sequence[Sequence[int]]) -> list[tuple[float, float, int]]:
    """(-log p, KL(bf16 || arm), tokens) of each passage, summed over its tokens but the first."""
    reference, other = load_model(model), load_model(folder, activations="exact")
    found = []
    for ids in passages:
        right, got = logprobs(reference, ids[:-1]), logprobs(other, ids[:-1])
        nll = -got.gather(1, torch.tensor(ids[1:])[:, None]).double().sum()
        kl = (right.exp() * (right - got)).double().sum()
        found.append((float(nll), float(kl), len(ids) - 1))
    return found


def interval(values: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """(mean per token, low, high): passages are resampled, their sums and their tokens together."""
    chance = np.random.default_rng(0)
    drawn = chance.integers(len(values), size=(DRAWS, len(values)))
    means = values[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.sum() / tokens.sum()), float(low), float(high)


def scored(
    plan: Plan, arm: str, checkpoint: Path, model: Path, held_out: str, passages: Sequence[Sequence[int]]
) -> np.ndarray:
    """(passages, 3) as ``score``."""
    told = (plan.out / BF16 if arm == BF16 else plan.folder(arm)) / f"scores-{held_out}.json"
    if not told.is_file():
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(score(checkpoint, model, passages)), encoding="utf-8")
    return np.array(json.loads(told.read_text("utf-8")))


def run(plan: Plan, say: Callable[[str], None]) -> list[QuantizeRow]:
    """All arms of the plan; rows are of what is done so far."""
    torch.set_num_threads(1)
    plan.out.mkdir(parents=True, exist_ok=True)
    model = resolve(MODEL)
    if not plan.calibration.is_file():
        say("calibration: the model answers prompts")
        rows = generate(model, max(plan.samples, Plan.samples), max(plan.tokens, Plan.tokens), say)
        cut = [row[: plan.tokens] for row in rows[: plan.samples]]  # a small set is a part of the usual one
        plan.calibration.write_text(json.dumps(cut), encoding="utf-8")
    held_out = held_out_ids(plan.out, model, say)
    costs, scores = {}, {}
    for arm in plan.arms:
        checkpoint, costs[arm] = made(plan, arm, model, say)
        say(f"{arm}: measuring")
        for name, passages in held_out.items():
            scores[name, arm] = scored(plan, arm, checkpoint, model, name, passages)
    commit, dirty = record.commit()
    found = []
    for name, arm in itertools.product(held_out, plan.arms):
        nll, kl, tokens = scores[name, arm].T
        over = [
            {other: interval(mine - scores[name, other].T[which], tokens) for other in plan.arms if other != arm}
            for which, mine in enumerate((nll, kl))
        ]
        found.append(
            QuantizeRow(
                arm=arm, model=MODEL, group_size=plan.group_size, symmetric=plan.symmetric, samples=plan.samples,
                tokens=plan.tokens, iterations=plan.iterations, batch=plan.batch, held_out=name,
                held_out_tokens=int(tokens.sum()),
                perplexity=tuple(math.exp(value) for value in interval(nll, tokens)), kl=interval(kl, tokens),
                nats_over=over[0], kl_over=over[1], cpu_s=costs[arm].get("cpu_s"),
                wall_s=costs[arm].get("wall_s"), peak_bytes=costs[arm].get("peak_bytes"),
                version=costs[arm].get("version"), commit=commit, dirty=dirty, machine=record.machine(),
                date=record.now(), command=record.command(),
            )
        )  # fmt: skip
    return found


def table(rows: Sequence[QuantizeRow]) -> str:
    """Rows for a reader."""

    def figure(value: tuple[float, float, float] | None, digits: int) -> str:
        return "" if value is None else f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"

    lines = [
        [
            row.held_out, row.arm, figure(row.perplexity, 2), figure(row.kl, 4), figure(row.nats_over.get(BF16), 3),
            figure(row.kl_over.get(PACKAGE), 4), "" if row.cpu_s is None else f"{row.cpu_s:.0f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["held out", "arm", "perplexity", "KL", "nats over bf16", "KL over package", "CPU s", "peak GiB"]
    return tables.table(header, lines)


# -- command line -----------------------------------------------------------------------------------------------------
def add_options(options: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench quantize``."""
    options.add_argument(
        "--out", type=Path, required=True, help="folder of what is made; what is there is not made again"
    )
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--samples", type=int, default=Plan.samples)
    options.add_argument("--tokens", type=int, default=Plan.tokens, help="of a sample")
    options.add_argument("--iterations", type=int, default=Plan.iterations)
    options.add_argument("--batch", type=int, default=Plan.batch)
    options.add_argument("--group-size", type=int, default=Plan.group_size)
    options.add_argument("--asymmetric", action="store_true")
    options.add_argument("--peer-python", help="interpreter that has the package auto-round")
    options.add_argument(
        "--results", type=Path, default=RESULTS, help=f"JSON lines to add to (default: {RESULTS.name})"
    )


def carry_out(given: argparse.Namespace) -> int:
    """Measure and print what the options ask for."""
    plan = Plan(
        out=given.out, arms=tuple(given.arms), samples=given.samples, tokens=given.tokens, iterations=given.iterations,
        batch=given.batch, group_size=given.group_size, symmetric=not given.asymmetric, peer_python=given.peer_python,
    )  # fmt: skip
    rows = run(plan, functools.partial(print, file=sys.stderr, flush=True))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with given.results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n" for row in rows)
    print(table(rows))
    return 0


if __name__ == "__main__":  # the process in which one arm quantises
    print(json.dumps(quantise(json.loads(Path(sys.argv[1]).read_text("utf-8")))))
