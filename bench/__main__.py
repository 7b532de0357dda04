"""``python -m bench FAMILY | engine | serving | serving_load | train | quantize | quantize_layer | roofline``: measure;
``report | goals``: to a document.

FAMILY: decoder, int4, skinny, policy_loss or spec_decode.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import (
    decoder,
    engine,
    engine_inputs,
    engine_report,
    gpu_goals,
    gpu_timing,
    int4,
    int4_gpu,
    policy_loss,
    policy_loss_report,
    quantize,
    quantize_layer,
    record,
    roofline,
    serving,
    serving_load,
    skinny,
    skinny_report,
    spec_decode,
    spec_decode_cases,
    spec_decode_gpu,
    spec_decode_report,
    tables,
    train,
    workloads,
)


def numbers(text: str) -> tuple[int, ...]:
    """A comma-separated list of positive integers."""
    values = tuple(int(part) for part in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"want positive numbers with commas; got {text!r}")
    return values


def shares(text: str) -> tuple[float, ...]:
    """A comma-separated list of numbers in (0, 1]."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"want numbers above 0 and at most 1 with commas; got {text!r}")
    return values


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def pair(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"want NAME=PATH; got {text!r}")
    return name, path


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    gemm = commands.add_parser("int4", help="INT4 GEMM and experts against other projects")
    presets = sorted([*workloads.PRESETS, *int4_gpu.PRESETS])
    gemm.add_argument("--preset", choices=presets, help="a named list of shapes (default: default; on a GPU: gpu)")
    gemm.add_argument("--shapes", type=words, help=f"of {', '.join([*workloads.LINEARS, *workloads.EXPERTS])}")
    gemm.add_argument("--m", type=numbers, help="rows of x (default: 1,4,16,128; on a GPU 1,4,16,32,64,128,256,1024)")
    gemm.add_argument("--dtypes", type=words, help=f"of x on a GPU: {', '.join(int4_gpu.X_DTYPES)} (default: bf16)")
    gemm.add_argument("--threads", type=numbers, default=(1, 2), help="default: 1,2")
    every = ", ".join(int4_gpu.EVERY)
    gemm.add_argument("--arms", type=words, help=f"default: {', '.join(int4.DEFAULT_ARMS)}; on a GPU: {every}")
    gemm.add_argument("--isa", type=words, default=(), help="also run our arms so, as m3_int8@avx2")
    gemm.add_argument("--seconds", type=float, help="for each shape, M and thread count (default: 6; on a GPU: 0.25)")
    gemm.add_argument("--rounds", type=int, help="at least this many (default: 5; on a GPU: 20)")
    gemm.add_argument("--asymmetric", action="store_true", help="weights with zero points")
    gemm.add_argument("--memory", type=float, default=6.0, help="GB that the copies of a case may take (default: 6)")
    gemm.add_argument(
        "--malloc-huge-pages", action="store_true", help="let glibc put every library's memory in huge pages"
    )
    gemm.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    gemm.add_argument("--out", type=Path, help=f"JSON lines to add to (default: {record.RESULTS.name}/int4.jsonl)")

    few = commands.add_parser("skinny", help="INT4 GEMM of few rows over that of one, beside the roofline")
    few.add_argument("--preset", choices=sorted(skinny.PRESETS), help="default: acceptance")
    few.add_argument("--shapes", type=words, help=f"of {', '.join(workloads.SKINNY_LINEARS)}")
    few.add_argument("--modes", type=words, help=f"of {', '.join(skinny.MODES)}")
    few.add_argument("--isa", type=words, help="default: avx2 and the best of this machine")
    few.add_argument("--m", type=numbers, help="rows of x, 1 among them (default: 1,2,4,8)")
    few.add_argument("--seconds", type=float, help="for each shape and store")
    few.add_argument("--rounds", type=int, help="at least this many")
    few.add_argument("--out", type=Path, help=f"JSON lines to add to (default: {record.RESULTS.name}/skinny.jsonl)")

    loss = commands.add_parser("policy_loss", help="the fused policy loss against other projects")
    loss.add_argument("--preset", choices=sorted(policy_loss.PRESETS), help="default: acceptance; on a GPU: gpu")
    loss.add_argument("--shapes", type=words, help=f"of {', '.join(workloads.LOSS_HEADS)}")
    loss.add_argument("--dtypes", type=words, help=f"of {', '.join(workloads.DTYPES)}")
    loss.add_argument("--densities", type=shares, help="shares of the tokens that count, as 1.0,0.4")
    loss.add_argument("--threads", type=numbers)
    loss.add_argument("--arms", type=words, help=f"of {', '.join(policy_loss.ARMS)}")
    loss.add_argument("--seconds", type=float, help="for each shape, dtype, density and thread count")
    loss.add_argument("--rounds", type=int, help="at least this many")
    loss.add_argument("--no-memory", action="store_true", help="do not measure the peak of each arm")
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    loss.add_argument(
        "--out", type=Path, help=f"JSON lines to add to (default: {record.RESULTS.name}/policy_loss.jsonl)"
    )

    trees = commands.add_parser("spec_decode", help="tree drafting and verification against torch")
    trees.add_argument("--preset", choices=sorted(spec_decode.PRESETS), help="default: acceptance")
    cases = list(dict.fromkeys([*spec_decode_cases.CASES, *spec_decode_gpu.CASES]))
    trees.add_argument("--cases", type=words, help=f"of {', '.join(cases)}")
    trees.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    trees.add_argument("--threads", type=numbers)
    trees.add_argument("--seconds", type=float, help="for each case and thread count")
    trees.add_argument("--rounds", type=int, help="at least this many")
    trees.add_argument("--no-memory", action="store_true", help="do not measure peaks")
    trees.add_argument(
        "--out", type=Path, help=f"JSON lines to add to (default: {record.RESULTS.name}/spec_decode.jsonl)"
    )

    whole = commands.add_parser("engine", help="tokens per second of our engine and of others")
    whole.add_argument("--preset", choices=sorted(engine.PRESETS), help="default: acceptance")
    whole.add_argument("--cases", type=words, help=f"of {', '.join(engine_inputs.CASES)}")
    whole.add_argument("--arms", type=words, help=f"of {', '.join(engine.ENTRANTS)}")
    whole.add_argument("--threads", type=numbers)
    whole.add_argument("--seconds", type=float, help="for each case and thread count")
    whole.add_argument("--rounds", type=int, help="at least this many")
    whole.add_argument("--draft", help="folder of a draft model for the arms that speculate")
    whole.add_argument("--model", type=pair, action="append", metavar="NAME=PATH", help="int4, onnx_int4, q4_0, ...")
    whole.add_argument(
        "--peer-python", type=pair, action="append", metavar="KIND=PATH", help="interpreter of vllm, onnx_genai, ..."
    )
    whole.add_argument("--out", type=Path, help=f"JSON lines to add to (default: {record.RESULTS.name}/engine.jsonl)")

    servers = commands.add_parser("serving", help="m3 serve against other servers: requests per second, latencies")
    serving.add_options(servers)

    crowd = commands.add_parser("serving_load", help="m3 serve under a crowd, some of whom hang up or send nonsense")
    serving_load.add_options(crowd)

    update = commands.add_parser("train", help="one update of a small model against TRL's trainer")
    train.add_options(update)

    rounding = commands.add_parser("quantize", help="INT4 of a small model by several methods and another project's")
    quantize.add_options(rounding)

    large = commands.add_parser("quantize_layer", help="one layer of Qwen3-235B-A22B's shape to INT4: time and memory")
    quantize_layer.add_options(large)

    dense = commands.add_parser("decoder", help="dense products against torch, beside the roofline")
    dense.add_argument("--shapes", type=words, help=f"of {', '.join(decoder.SHAPES)}")
    dense.add_argument("--dtypes", type=words, help=f"of {', '.join(decoder.DTYPES)}")
    dense.add_argument("--m", type=numbers, help="rows of x (default: 1,2,4,8,32,512)")
    dense.add_argument("--threads", type=numbers)
    dense.add_argument("--seconds", type=float, help="for each shape, dtype, M and thread count")

    ceilings = commands.add_parser("roofline", help="what this machine can do at best")
    ceilings.add_argument("--threads", type=numbers, default=(1, 2))

    report = commands.add_parser("report", help="write docs/benchmarks.md and its plots from the rows")
    report.add_argument("--results", type=Path, default=record.RESULTS)
    report.add_argument("--out", type=Path, default=record.ROOT / "docs" / "benchmarks.md")

    goals = commands.add_parser("goals", help="the goals of the GPU kernels with what was measured of each")
    goals.add_argument("--results", type=Path, default=record.RESULTS)
    goals.add_argument("--write", type=Path, help="a document whose tables of goals to renew, as docs/gpu_status.md")
    return top


def run_int4(arguments: argparse.Namespace) -> int:
    from bench import report

    if arguments.device == "cuda":
        return run_int4_gpu(arguments)
    say = functools.partial(print, file=sys.stderr, flush=True)
    preset = arguments.preset or "default"
    if preset not in workloads.PRESETS:
        raise SystemExit(f"bench int4: preset: {preset} is of --device cuda")
    shapes = [workloads.find(name) for name in arguments.shapes or workloads.PRESETS[preset]]
    acceptance = arguments.preset == "acceptance"
    out = arguments.out or record.RESULTS / "int4.jsonl"
    arms = arguments.arms or int4.DEFAULT_ARMS
    plan = int4.Plan(
        ms=arguments.m or (1, 4, 16, 128),
        threads=arguments.threads,
        arms=(*arms, *(f"{arm}@{isa}" for isa in arguments.isa for arm in int4.OURS if arm in arms)),
        symmetric=not arguments.asymmetric,
        seconds=6.0 if arguments.seconds is None else arguments.seconds,
        scaling=acceptance,
        limit_bytes=int(arguments.memory * 1e9),
        min_rounds=arguments.rounds or 5,
    )
    for name in plan.arms:
        int4.factory(name)
    found: list[record.Row] = []
    for shape in shapes:
        case: list[record.Row] = []
        for row in int4.run(shape, plan, say):
            record.append(out, [row])
            case.append(row)
        print(report.tables(case), flush=True)
        found += case
    if acceptance:
        lines = report.acceptance(found)
        print(tables.acceptance_table(lines))
        return 0 if all(line.passed for line in lines) else 1
    return 0


# -- on a GPU ---------------------------------------------------------------------------------------------------------
def judged(found: Sequence[record.Row]) -> int:
    """Print what became of the goals of a GPU; 1 if an arm of ours failed its gate or broke."""
    print(gpu_goals.verdicts(found), flush=True)
    wrong = gpu_timing.broken(found)
    for line in wrong:
        print(f"WRONG: {line}", flush=True)
    return 1 if wrong else 0


def int4_gpu_plan(arguments: argparse.Namespace) -> int4_gpu.Plan:
    """The preset, with what the command line says in place of its fields."""
    preset = arguments.preset or "gpu"
    if preset not in int4_gpu.PRESETS:
        raise SystemExit(f"bench int4: preset: {preset} is of --device cpu")
    fields = {
        "shapes": arguments.shapes,
        "ms": arguments.m,
        "dtypes": arguments.dtypes,
        "arms": arguments.arms,
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
    }
    changes = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(int4_gpu.PRESETS[preset], **changes)


def run_int4_gpu(arguments: argparse.Namespace) -> int:
    from bench import report

    say = functools.partial(print, file=sys.stderr, flush=True)
    plan = int4_gpu_plan(arguments)
    shapes = [workloads.find(name) for name in plan.shapes]
    out = arguments.out or record.RESULTS / "int4_cuda.jsonl"
    gpu_timing.clock(plan.device)
    found: list[record.Row] = []
    for shape in shapes:
        for case in int4_gpu.run(shape, plan, say):
            record.append(out, case)
            print(report.tables(case), flush=True)
            found += case
    return judged(found)


def skinny_plan(arguments: argparse.Namespace) -> skinny.Plan:
    """The preset, with what the command line says in place of its fields."""
    fields = {
        "shapes": arguments.shapes,
        "modes": arguments.modes,
        "isas": arguments.isa,
        "ms": arguments.m,
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
    }
    changes = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(skinny.PRESETS[arguments.preset or "acceptance"], **changes)


def run_skinny(arguments: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    plan = skinny_plan(arguments)
    for shape in plan.shapes:
        workloads.look_up(shape, workloads.SKINNY_LINEARS)
    out = arguments.out or record.RESULTS / "skinny.jsonl"
    found: list[record.SkinnyRow] = []
    peaks: dict[str, float] = {}
    for shape in plan.shapes:
        for case in skinny.run(shape, plan, say, peaks):
            record.append(out, case)
            print(skinny_report.tables(case), flush=True)
            found += case
    lines = skinny_report.acceptance(found)
    if arguments.preset and lines:
        print(tables.acceptance_table(lines))
        return 0 if all(line.passed for line in lines) else 1
    return 0


def loss_plan(arguments: argparse.Namespace) -> policy_loss.Plan:
    """The preset, with what the command line says in place of its fields."""
    plan = policy_loss.PRESETS[arguments.preset or ("gpu" if arguments.device == "cuda" else "acceptance")]
    fields = {
        "heads": arguments.shapes,
        "dtypes": arguments.dtypes,
        "densities": arguments.densities,
        "threads": arguments.threads,
        "arms": arguments.arms,
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
        "device": arguments.device,
        "memory": not arguments.no_memory,
    }
    return dataclasses.replace(plan, **{name: value for name, value in fields.items() if value is not None})


def run_policy_loss(arguments: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    plan = loss_plan(arguments)
    heads = [workloads.find_head(name) for name in plan.heads]
    out = arguments.out or record.RESULTS / ("policy_loss_cuda.jsonl" if plan.device == "cuda" else "policy_loss.jsonl")
    found: list[record.LossRow] = []
    for head in heads:
        for case in policy_loss.run(head, plan, say):
            record.append(out, case)
            print(policy_loss_report.tables(case), flush=True)
            found += case
    if plan.device == "cuda":
        return judged(found)
    lines = policy_loss_report.acceptance(found)
    if arguments.preset and lines:
        print(tables.acceptance_table(lines, "case"))
        return 0 if all(line.passed for line in lines) else 1
    return 0


def spec_plan(arguments: argparse.Namespace) -> spec_decode.Plan:
    """The preset, with what the command line says in place of its fields."""
    plan = spec_decode.PRESETS[arguments.preset or "acceptance"]
    fields = {
        "cases": arguments.cases,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
        "memory": False if arguments.no_memory else None,
    }
    return dataclasses.replace(plan, **{name: value for name, value in fields.items() if value is not None})


def run_spec_decode_gpu(arguments: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    fields = {"cases": arguments.cases, "seconds": arguments.seconds, "min_rounds": arguments.rounds}
    plan = spec_decode_gpu.Plan(**{name: value for name, value in fields.items() if value is not None})
    out = arguments.out or record.RESULTS / "spec_decode_cuda.jsonl"
    found: list[record.SpecRow] = []
    for case in spec_decode_gpu.run(plan, say):
        record.append(out, case)
        print(spec_decode_report.tables(case), flush=True)
        found += case
    return judged(found)


def run_spec_decode(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda":
        return run_spec_decode_gpu(arguments)
    say = functools.partial(print, file=sys.stderr, flush=True)
    out = arguments.out or record.RESULTS / "spec_decode.jsonl"
    found: list[record.SpecRow] = []
    for case in spec_decode.run(spec_plan(arguments), say):
        record.append(out, case)
        print(spec_decode_report.tables(case), flush=True)
        found += case
    lines = spec_decode_report.acceptance(found)
    if arguments.preset and lines:
        print(tables.acceptance_table(lines, "mode"))
        return 0 if all(line.passed for line in lines) else 1
    return 0


def engine_plan(arguments: argparse.Namespace) -> engine.Plan:
    """The preset, with what the command line says in place of its fields."""
    plan = engine.PRESETS[arguments.preset or "acceptance"]
    fields = {
        "cases": arguments.cases,
        "arms": arguments.arms,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
        "draft": arguments.draft,
        "models": dict(arguments.model or ()),
        "pythons": dict(arguments.peer_python or ()),
    }
    return dataclasses.replace(plan, **{name: value for name, value in fields.items() if value is not None})


def run_engine(arguments: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    out = arguments.out or record.RESULTS / "engine.jsonl"
    found: list[record.EngineRow] = []
    for case in engine.run(engine_plan(arguments), say):
        record.append(out, case)
        print(engine_report.tables(case), flush=True)
        found += case
    lines = engine_report.acceptance(found)
    if arguments.preset and lines:
        print(tables.acceptance_table(lines, "weights"))
        return 0 if all(line.passed for line in lines) else 1
    return 0


def run_goals(arguments: argparse.Namespace) -> int:
    rows = gpu_goals.measured(arguments.results)
    if arguments.write:
        gpu_goals.write(arguments.write, rows)
    else:
        print(gpu_goals.status(rows))
    return 0


def run_decoder(arguments: argparse.Namespace) -> int:
    say = functools.partial(print, file=sys.stderr, flush=True)
    fields = {
        "shapes": arguments.shapes,
        "dtypes": arguments.dtypes,
        "ms": arguments.m,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
    }
    plan = dataclasses.replace(decoder.Plan(), **{name: value for name, value in fields.items() if value is not None})
    print(decoder.run(plan, say))
    return 0


def start_again(tunables: str) -> None:
    """This command once more, under settings of glibc's malloc, which are read when a process starts."""
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], environment)


def main() -> int:
    arguments = parser().parse_args()
    if arguments.command == "int4":
        if arguments.malloc_huge_pages and not record.malloc_huge_pages():
            start_again(record.HUGE_MALLOC)
        return run_int4(arguments)
    if arguments.command == "skinny":
        return run_skinny(arguments)
    if arguments.command == "policy_loss":
        if arguments.device == "cpu" and not record.malloc_keeps():
            start_again(record.KEEPING_MALLOC)
        return run_policy_loss(arguments)
    if arguments.command == "spec_decode":
        if arguments.device == "cpu" and not record.malloc_keeps():
            start_again(record.KEEPING_MALLOC)
        return run_spec_decode(arguments)
    if arguments.command == "engine":
        return run_engine(arguments)
    if arguments.command == "serving":
        return serving.carry_out(arguments)
    if arguments.command == "serving_load":
        return serving_load.carry_out(arguments)
    if arguments.command == "train":
        return train.carry_out(arguments)
    if arguments.command == "quantize":
        return quantize.carry_out(arguments)
    if arguments.command == "quantize_layer":
        return quantize_layer.carry_out(arguments)
    if arguments.command == "decoder":
        return run_decoder(arguments)
    if arguments.command == "roofline":
        for threads in arguments.threads:
            print(roofline.describe(roofline.measured(threads, record.cpu_model())))
        return 0
    if arguments.command == "goals":
        return run_goals(arguments)
    from bench import report

    report.write(arguments.results, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
