"""One layer of the shape of Qwen3-235B-A22B to INT4: seconds, memory and disk of the job that quantises whole models.

The layer (128 experts of 3 x 4096 x 1536, 64 heads, random weights in bf16: 4.97 GB) is written as a sharded checkpoint
of one layer with a small vocabulary; ``m3.quantize.job.quantize_checkpoint`` then makes it INT4 in a process of its
own. An arm passes if every linear is there in 4 bits, everything else bit for bit as it was (router and head in
bf16), and the error of the hidden states is below that of one part in ten.

Rows of the router are of uneven size (log-normal): some experts get many tokens and some few, as in a trained model.

    seconds: ``before`` reading and the pass through the layer as it is, up to the first step of the method;
    ``method`` its first to its last step; ``after`` the pass through the quantised layer, errors, writing
    peak_bytes  VmHWM of the process; peak_own_bytes: its memory without the pages of the mapped checkpoint, which the
                system takes back when it needs them (sampled ten times a second)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench import harness, record, tables
from m3.checkpoint import CONFIG, INDEX, Checkpoint, write_json
from m3.models.decoder import DecoderConfig
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM
from m3.quantize.autoround import AutoRoundConfig, LearntRounding
from m3.quantize.block import EXPERT, ROUTER, Block
from m3.quantize.coverage import Coverage, counts_of
from m3.quantize.gptq import GptqConfig, Hessian, Prepared, quantise_linear
from m3.quantize.job import JOURNAL, METHODS, JobConfig, quantize_checkpoint
from m3.quantize.scheme import Scheme, nearest
from m3.quantize.states import ROW_BYTES
from m3kernels.int4.quantize import METHODS as RANGES

RESULTS = record.RESULTS / "quantize" / "layer.jsonl"
STEPS = "steps.jsonl"  # beside it
SHAPE = "Qwen3-235B-A22B"
QWEN3_235B_A22B: dict[str, Any] = {  # its config.json, but for layers and vocabulary
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "num_hidden_layers": 1, "vocab_size": 4096,
}  # fmt: skip
EXPERTS_OF_A_SHARD = 16
STD = 0.02  # of weights
ROUTER_SPREAD = 0.3  # of the logarithm of the size of a router's rows
LARGEST_ERROR = 0.1
SAMPLE_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. folder: the checkpoint, kept if it is there, and the results, deleted when they are read."""

    folder: Path
    arms: tuple[str, ...] = METHODS
    samples: int = 16
    tokens: int = 256
    iterations: int = 10
    least_tokens: int = 128
    group_size: int = 128
    threads: int = 2
    experts: int = QWEN3_235B_A22B["num_experts"]
    range: str | None = None

    @property
    def shape(self) -> dict[str, Any]:
        """config.json; of fewer experts each still gets its share of the tokens."""
        whole = QWEN3_235B_A22B["num_experts"]
        chosen = max(1, QWEN3_235B_A22B["num_experts_per_tok"] * self.experts // whole)
        return {**QWEN3_235B_A22B, "num_experts": self.experts, "num_experts_per_tok": chosen}

    @property
    def model(self) -> Path:
        return self.folder / f"model-{self.experts}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """An arm. Bytes and seconds; tokens of an expert as (least, median, most)."""

    arm: str
    shape: str
    experts: int
    experts_per_token: int
    range: str | None  # that all methods were told to begin from; None: each its own default
    samples: int
    tokens: int
    iterations: int | None
    least_tokens: int
    group_size: int
    threads: int
    hidden_error: float
    wall_s: float
    cpu_s: float
    phases_s: Mapping[str, float]
    peak_bytes: int
    peak_own_bytes: int
    layer_bytes: int  # as stored
    int4_bytes: int  # of the layer's shard
    states_bytes: int  # of one file of hidden states
    journal_bytes: int
    routed: tuple[int, int, int]
    forced_experts: int  # that got fewer than least_tokens from the router
    forced_share: float  # of all tokens that experts learn from
    worst_forced_share: float
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


# -- the checkpoint ---------------------------------------------------------------------------------------------------
def shards(config: Mapping[str, Any], chance: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The tensors of the model, those of a file at a time."""

    def normal(*shape: int, std: float = STD) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=chance)

    hidden, inner, head_dim = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    prefix = LAYER.format(0)
    sizes = torch.empty(config["num_experts"], 1).normal_(0, ROUTER_SPREAD, generator=chance).exp()
    yield {
        EMBEDDING: normal(config["vocab_size"], hidden, std=1.0),
        NORM: torch.ones(hidden, dtype=torch.bfloat16),
        f"{HEAD}.weight": normal(config["vocab_size"], hidden),
        f"{prefix}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prefix}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prefix}self_attn.q_norm.weight": torch.ones(head_dim, dtype=torch.bfloat16),
        f"{prefix}self_attn.k_norm.weight": torch.ones(head_dim, dtype=torch.bfloat16),
        f"{prefix}self_attn.q_proj.weight": normal(queries, hidden),
        f"{prefix}self_attn.k_proj.weight": normal(keys, hidden),
        f"{prefix}self_attn.v_proj.weight": normal(keys, hidden),
        f"{prefix}self_attn.o_proj.weight": normal(hidden, queries),
        f"{prefix}{ROUTER}.weight": (normal(config["num_experts"], hidden, std=hidden**-0.5) * sizes).bfloat16(),
    }
    for first in range(0, config["num_experts"], EXPERTS_OF_A_SHARD):
        found = {}
        for expert in range(first, min(first + EXPERTS_OF_A_SHARD, config["num_experts"])):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                found[f"{prefix}{EXPERT.format(expert)}{name}_proj.weight"] = normal(*shape)
        yield found


def make_layer(folder: Path, config: Mapping[str, Any]) -> None:
    """The checkpoint; a file of it in memory at a time. config.json is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards(config, torch.Generator().manual_seed(0)), 1):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    write_json(folder / INDEX, {"weight_map": where})
    write_json(folder / CONFIG, config)


def token_ids(plan: Plan) -> Tensor:
    """(S, L) drawn evenly."""
    chance = torch.Generator().manual_seed(1)
    return torch.randint(plan.shape["vocab_size"], (plan.samples, plan.tokens), generator=chance)


@torch.no_grad()
def coverage(model: Path, ids: Tensor) -> Coverage:
    """What the router gives the experts of these tokens."""
    source, prefix = Checkpoint(model), LAYER.format(0)
    config = DecoderConfig.from_hf(source.config)
    layer = {name.removeprefix(prefix): source.get(name) for name in source.names if name.startswith(prefix)}
    block, embedding = Block.from_tensors(config, layer), source.get(EMBEDDING)
    counts = torch.cat(
        [counts_of(block.routing(embedding[row][None].float()).ids, 1, config.num_experts) for row in ids]
    )
    return Coverage(layers=(0,), counts=counts[:, None], tokens=ids.numel())


# -- one arm ----------------------------------------------------------------------------------------------------------
def config_of(plan: Plan, arm: str) -> JobConfig:
    learnt = AutoRoundConfig(iterations=plan.iterations, least_tokens=plan.least_tokens, apart=True)
    config = JobConfig(
        method=arm,
        scheme=Scheme(group_size=plan.group_size),
        gptq=GptqConfig(least_tokens=plan.least_tokens),
        autoround=learnt,
    )
    if plan.range is None:
        return config
    return dataclasses.replace(
        config,
        range=plan.range,
        gptq=dataclasses.replace(config.gptq, start=plan.range),
        autoround=dataclasses.replace(learnt, start=plan.range),
    )


def quantise(plan: Plan, arm: str) -> dict[str, Any]:
    """The arm, here and now; what it cost."""
    torch.set_num_threads(plan.threads)
    marks: list[float] = []

    def progress(done: int, total: int) -> None:
        del marks[1:]
        marks.append(time.perf_counter())

    cpu, start = time.process_time(), time.perf_counter()
    report = quantize_checkpoint(
        plan.model, plan.folder / arm, config_of(plan, arm), calibration=token_ids(plan), progress=progress
    )
    end = time.perf_counter()
    return {
        "wall_s": end - start,
        "cpu_s": time.process_time() - cpu,
        "phases_s": {"before": marks[0] - start, "method": marks[-1] - marks[0], "after": end - marks[-1]},
        "peak_bytes": harness.resident("VmHWM"),
        "hidden_error": report.shards[-1].hidden_error,
    }


def own_bytes(process: int) -> int:
    """Of a process, in memory and of no file."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def in_a_process(plan: Plan, arm: str) -> dict[str, Any]:
    """``quantise`` in a process of its own, watched; it ends with this one."""
    settings = {**dataclasses.asdict(plan), "folder": str(plan.folder), "arm": arm}
    command = [sys.executable, "-m", "bench.quantize_layer", json.dumps(settings)]
    child = subprocess.Popen(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True)
    most = 0
    try:
        while child.poll() is None:
            most = max(most, own_bytes(child.pid))
            time.sleep(SAMPLE_S)
    finally:
        child.kill()
    assert child.stdout is not None
    text = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"bench quantize_layer: {arm}: the process ended with {child.returncode}")
    return {**json.loads(text.splitlines()[-1]), "peak_own_bytes": most}


def check(before: Checkpoint, after: Checkpoint, error: float | None) -> None:
    """Raises ValueError: something is not as the module says."""
    linears = {name.removesuffix(".weight") for name in before.names if name.endswith("_proj.weight")}
    wrong = sorted(name for name in linears if f"{name}.qweight" not in after or f"{name}.weight" in after)
    for name in sorted(before.names - {f"{name}.weight" for name in linears}):
        if name not in after or after.get(name).dtype != torch.bfloat16 or not after.get(name).equal(before.get(name)):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"bench quantize_layer: {after.folder.name}: want linears in INT4, the rest as it was; got {wrong}"
        )
    if error is None or not error < LARGEST_ERROR:
        raise ValueError(f"bench quantize_layer: {after.folder.name}: want an error below {LARGEST_ERROR}; got {error}")


def measured(plan: Plan, arm: str, covered: Coverage) -> LayerRow:
    """One arm; its files are deleted."""
    model, out = plan.model, plan.folder / arm
    cost = in_a_process(plan, arm)
    before, after = Checkpoint(model), Checkpoint(out)
    check(before, after, cost["hidden_error"])
    prefix = LAYER.format(0)
    layer = [before.get(name) for name in before.names if name.startswith(prefix)]
    total = sorted(covered.total().flatten().tolist())
    experts = covered.experts(plan.least_tokens)
    commit, dirty = record.commit()
    row = LayerRow(
        arm=arm, shape=SHAPE, experts=plan.experts, experts_per_token=plan.shape["num_experts_per_tok"],
        range=plan.range, samples=plan.samples, tokens=plan.tokens,
        iterations=plan.iterations if arm == "autoround" else None, least_tokens=plan.least_tokens,
        group_size=plan.group_size, threads=plan.threads, **cost,
        layer_bytes=sum(tensor.numel() * tensor.element_size() for tensor in layer),
        int4_bytes=(out / after.file_of(f"{prefix}{ROUTER}.weight")).stat().st_size,
        states_bytes=plan.samples * plan.tokens * plan.shape["hidden_size"] * ROW_BYTES,
        journal_bytes=(out / JOURNAL).stat().st_size,
        routed=(total[0], total[len(total) // 2], total[-1]),
        forced_experts=sum(one.forced > 0 for one in experts),
        forced_share=sum(one.forced for one in experts) / sum(one.forced + one.routed for one in experts),
        worst_forced_share=max(one.forced_share for one in experts),
        commit=commit, dirty=dirty, machine=record.machine(), date=record.now(), command=record.command(),
    )  # fmt: skip
    shutil.rmtree(out)
    return row


def run(plan: Plan, say: Callable[[str], None]) -> Iterator[LayerRow]:
    """All arms, one after another."""
    model = plan.model
    if not (model / CONFIG).is_file():
        say("writing the layer")
        make_layer(model, plan.shape)
    covered = coverage(model, token_ids(plan))
    for arm in plan.arms:
        for left in (plan.folder / arm, plan.folder / f"{arm}.part"):
            shutil.rmtree(left, ignore_errors=True)
        say(f"{arm}: quantising")
        yield measured(plan, arm, covered)


# -- the steps of a method --------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsRow:
    """CPU seconds, one thread, of what a method does to a linear (1536, 4096) of an expert with ``tokens`` tokens."""

    shape: str
    tokens: int
    group_size: int
    cpu_s: Mapping[str, float]
    commit: str
    dirty: bool
    machine: Mapping[str, object]
    date: str
    command: str


def steps(plan: Plan, tokens: int = 256) -> StepsRow:
    """nearest_RANGE; hessian and factor of its 4096 inputs, which gate and up share, and ``columns`` of GPTQ; start and
    step of AutoRound, product: (tokens, 4096) by the weight."""
    torch.set_num_threads(1)
    chance = torch.Generator().manual_seed(0)
    inner, hidden = plan.shape["moe_intermediate_size"], plan.shape["hidden_size"]
    weight = torch.empty(inner, hidden, dtype=torch.bfloat16).normal_(0, STD, generator=chance)
    x = torch.empty(tokens, hidden).normal_(generator=chance)
    scheme, found = Scheme(group_size=plan.group_size), {}
    nearest(weight[:16], scheme)  # what is loaded at first use

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = time.process_time() - start
        return result

    rounded = timed("nearest_minmax", lambda: nearest(weight, scheme, "minmax"))
    timed("nearest_weighted", lambda: nearest(weight, scheme, "weighted"))
    hessian = Hessian("x", hidden)
    timed("hessian", lambda: hessian.see("x", x))
    prepared = timed("factor", lambda: Prepared.of(hessian.total, GptqConfig()))
    timed("columns", lambda: quantise_linear(weight, prepared, scheme))
    learnt = timed("start", lambda: LearntRounding(weight, rounded))
    learnt.weight.grad = torch.empty(inner, hidden).normal_(generator=chance)
    timed("step", lambda: learnt.step(1e-3, 1e-3))
    wide = weight.float()
    timed("product", lambda: x @ wide.T)
    commit, dirty = record.commit()
    return StepsRow(
        shape=SHAPE, tokens=tokens, group_size=plan.group_size, cpu_s=found, commit=commit, dirty=dirty,
        machine=record.machine(), date=record.now(), command=record.command(),
    )  # fmt: skip


def table(rows: Sequence[LayerRow]) -> str:
    """Rows for a reader."""
    lines = [
        [
            row.arm, f"{row.wall_s:.0f}", f"{row.cpu_s:.0f}",
            " + ".join(f"{seconds:.0f}" for seconds in row.phases_s.values()),
            f"{row.peak_bytes / 1e9:.2f}", f"{row.peak_own_bytes / 1e9:.2f}",
            f"{row.layer_bytes / 1e9:.2f} -> {row.int4_bytes / 1e9:.2f}", f"{row.hidden_error:.1e}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["arm", "s", "CPU s", "before + method + after", "peak GB", "of its own", "layer GB", "error"]
    return tables.table(header, lines)


# -- command line -----------------------------------------------------------------------------------------------------
def add_options(options: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench quantize_layer``."""
    options.add_argument("--out", type=Path, required=True, help="folder of the layer (5 GB, kept) and what is made")
    options.add_argument("--arms", nargs="+", default=list(METHODS), choices=METHODS)
    options.add_argument("--samples", type=int, default=Plan.samples)
    options.add_argument("--tokens", type=int, default=Plan.tokens, help="of a sample")
    options.add_argument("--iterations", type=int, default=Plan.iterations, help="of autoround, for each expert")
    options.add_argument("--least-tokens", type=int, default=Plan.least_tokens, help="that every expert gets")
    options.add_argument("--experts", type=int, default=Plan.experts, help="128 make the layer; fewer a part of it")
    options.add_argument("--range", choices=RANGES, help="of the groups at first (default: the method's own)")
    options.add_argument("--steps", action="store_true", help="only what each step of a method takes for one linear")
    options.add_argument("--threads", type=int, default=Plan.threads)
    options.add_argument("--results", type=Path, default=RESULTS, help=f"JSON lines to add to ({RESULTS.name})")


def carry_out(given: argparse.Namespace) -> int:
    """Measure and print what the options ask for."""
    plan = Plan(
        folder=given.out.resolve(), arms=tuple(given.arms), samples=given.samples, tokens=given.tokens,
        iterations=given.iterations, least_tokens=given.least_tokens, threads=given.threads, experts=given.experts,
        range=given.range,
    )  # fmt: skip
    rows: list[LayerRow] = []
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if given.steps:
        row = steps(plan)
        with given.results.with_name(STEPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n")
        print(tables.table(["step", "CPU s"], [[name, f"{seconds:.2f}"] for name, seconds in row.cpu_s.items()]))
        return 0
    for made in run(plan, functools.partial(print, file=sys.stderr, flush=True)):
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(made), allow_nan=False) + "\n")
        rows.append(made)
    print(table(rows))
    return 0


if __name__ == "__main__":  # the process in which one arm quantises
    given = json.loads(sys.argv[1])
    name = given.pop("arm")
    print(json.dumps(quantise(Plan(**{**given, "folder": Path(given["folder"])}), name)))
