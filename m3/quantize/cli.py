"""``m3 quantize``: a checkpoint to INT4 by rounding to nearest, GPTQ or AutoRound, a layer at a time."""

from __future__ import annotations

import dataclasses
import enum
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3.terminal import Bar, Debug, Threads, console, one_line_errors, set_threads
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.models.tokenizer import Tokenizer
    from m3.quantize.record import Report, ShardRecord

MB, GB = 1e6, 1e9
LEAST_TOKENS = 256  # of an expert (ours: some hundreds tell the directions that its inputs have)
HELD_OUT_TOKENS = 256  # of each held-out passage (ours: what a small checkpoint passes through in seconds)


class Method(enum.StrEnum):
    """How the integers are found."""

    rtn = "rtn"
    gptq = "gptq"
    autoround = "autoround"
    package = "package"


class Range(enum.StrEnum):
    """How the range of a group is found."""

    minmax = "minmax"
    mse = "mse"
    weighted = "weighted"


@one_line_errors
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a built-in name, or owner/name on the hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder (GPTQ form, for m3, vLLM, gptqmodel).")],
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            help="rtn: nearest, no calibration; gptq; autoround: learnt, best, slowest; "
            "package: the PyPI package auto-round, for models of other architectures.",
        ),
    ] = Method.rtn,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Columns that share a scale: 32, 64, 128, ... or -1 for a whole row.")
    ] = 128,
    symmetric: Annotated[bool, typer.Option("--sym/--asym", help="Zero point 8, or one kept for every group.")] = True,
    range_: Annotated[
        Range | None,
        typer.Option(
            "--range", help="minmax: plain; mse: least error; weighted: large weights first. Default: the method's."
        ),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Round the output head too.")] = False,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration", help="What gptq and autoround learn from: self (the model's answers), or a file."
        ),
    ] = "self",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each.")] = 512,
    iterations: Annotated[int, typer.Option("--iterations", min=0, help="Of autoround, for each layer.")] = 200,
    act_order: Annotated[bool, typer.Option("--act-order", help="gptq: columns in the order of their inputs.")] = False,
    least_tokens: Annotated[
        int | None,
        typer.Option(
            "--least-tokens", min=0, help=f"Every expert learns from so many tokens at least. Default: {LEAST_TOKENS}."
        ),
    ] = None,
    apart: Annotated[
        bool, typer.Option("--experts-apart", help="autoround: an expert at a time, in the memory of one.")
    ] = False,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="A linear that stays as it is, by its full name; repeatable.")
    ] = None,
    keep_budget: Annotated[
        str | None,
        typer.Option("--keep-budget", help="Keep the linears that lose most, for 5% or 200MB more: measured first."),
    ] = None,
    float_prefix: Annotated[
        bool, typer.Option("--float-prefix", help="Layers learn from inputs of layers that are not quantised.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn, of the calibration set and in autoround.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with a run that was cut short, or throw it away.")
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Perplexity and KL on held-out text, for the report.")
    ] = True,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Make a checkpoint INT4. The same command goes on with a run that was cut short.

    About two layers are in memory, whatever the size of the model. report.html beside the model says what it cost.
    """
    from m3.models.hub import resolve
    from m3.models.tokenizer import Tokenizer
    from m3.quantize.autoround import AutoRoundConfig
    from m3.quantize.budget import keep_under_budget
    from m3.quantize.calibration import CalibrationConfig, calibration_of
    from m3.quantize.gptq import GptqConfig
    from m3.quantize.job import JOURNAL, RESPONSES, JobConfig, check_out, part_of, quantize_checkpoint
    from m3.quantize.package import quantize_with_package
    from m3.quantize.report import write_page
    from m3.quantize.scheme import Scheme

    set_threads(threads)
    least = LEAST_TOKENS if least_tokens is None else least_tokens
    gptq = GptqConfig(act_order=act_order, least_tokens=least)
    autoround = AutoRoundConfig(iterations=iterations, least_tokens=least, apart=apart, seed=seed)
    if range_ is not None:
        gptq = dataclasses.replace(gptq, start=str(range_))
        autoround = dataclasses.replace(autoround, start=str(range_))
    if method == Method.package and (keep or keep_budget or head or float_prefix):
        raise refuse(
            "quantize", "--keep, --keep-budget, --head, --float-prefix", "a method of ours", "--method package"
        )
    scheme = Scheme(group_size=group_size, symmetric=symmetric)
    with Bar(model) as bar:
        folder = resolve(model, bar.fetch)
    check_out(out, folder)
    if not resume and part_of(out).is_dir():
        shutil.rmtree(part_of(out))
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    ids = None
    if method != Method.rtn or keep_budget is not None:
        wanted = CalibrationConfig(samples=samples, tokens=tokens, seed=seed, least_tokens=least)
        with Bar("calibration") as bar:
            store = part_of(out) / RESPONSES
            ids = calibration_of(calibration, folder, wanted, store=store, progress=bar.step).stacked()
    if method == Method.package:
        assert ids is not None
        quantize_with_package(folder, out, scheme, autoround, ids)
        console.print(f"{out}", highlight=False, soft_wrap=True)
        return
    config = JobConfig(
        method=str(method),
        scheme=scheme,
        range=str(range_ or Range.weighted),
        gptq=gptq,
        autoround=autoround,
        quantised_prefix=not float_prefix,
        keep=tuple(keep or ()),
        head=head,
    )
    if keep_budget is not None and ids is not None:
        with Bar("measuring linears") as bar:
            found = keep_under_budget(folder, keep_budget, ids, config.scheme, config.range, part_of(out), bar.step)
        config = dataclasses.replace(config, keep=tuple(sorted({*config.keep, *found})))
        console.print(f"{len(found)} linears stay as they are", highlight=False)
    if (part_of(out) / JOURNAL).is_file():
        console.print(f"going on in {part_of(out)}", highlight=False, soft_wrap=True)
    with Bar("quantising") as bar:
        report = quantize_checkpoint(
            folder,
            out,
            config,
            calibration=ids,
            held_out=held_out(tokenizer) if measure and tokenizer is not None else (),
            progress=bar.step,
            shard_done=_Log(),
            beside=write_page,
        )
    summarise(report, out, group_size, folder)


class _Log:
    """A line for every finished layer, with the time that the rest will take."""

    def __init__(self) -> None:
        self.started = self.count = 0.0

    def __call__(self, record: ShardRecord, left: int) -> None:
        self.started = self.started or time.monotonic() - record.seconds
        self.count += record.layer >= 0
        if record.layer < 0:
            return
        seconds = (time.monotonic() - self.started) / self.count * left
        error = "" if record.hidden_error is None else f", error of hidden states {record.hidden_error:.1e}"
        console.print(
            f"layer {record.layer + 1} of {record.layer + 1 + left}: {record.seconds:.1f} s{error}; "
            f"{duration(seconds)} left",
            highlight=False,
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def held_out(tokenizer: Tokenizer) -> list[list[int]]:
    """The passages of the text that comes with the package."""
    from m3.quantize.perplexity import mixed_text

    return [tokenizer.encode(passage)[:HELD_OUT_TOKENS] for passage in mixed_text()]


def summarise(report: Report, out: Path, group_size: int, folder: Path) -> None:
    """What came out, in a few lines."""
    from m3.checkpoint import CONFIG, read_json
    from m3.models.decoder import DecoderConfig

    linears, linears_bf16 = report.linears
    share = f" ({100 * linears / linears_bf16:.1f}%)" if linears_bf16 else ""
    found = report.comparison
    lines = [
        f"{out}: linears {linears_bf16 / MB:.1f} MB in bf16 -> {linears / MB:.1f} MB{share}; "
        f"the rest {(report.nbytes - linears) / MB:.1f} MB"
    ]
    if found is not None:
        lines.append(
            f"held-out text: perplexity {found.perplexity.mean:.2f} -> {found.perplexity_quantised.mean:.2f}, "
            f"KL {found.kl.mean:.4f} nats a token ({found.kl.low:.4f} to {found.kl.high:.4f})"
        )
    lines.append(f"{report.seconds:.0f} s, peak memory {report.peak_memory / GB:.2f} GB; {out / 'report.html'}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if report.blind:
        console.print(
            f"note: {report.blind} experts learnt from no token; --least-tokens 256 gives them the likeliest ones",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    model = DecoderConfig.from_hf(read_json(folder / CONFIG))
    widths = {model.hidden_size, model.num_heads * model.head_dim}
    widths |= {model.moe_intermediate_size} if model.num_experts else {model.intermediate_size}
    if group_size > 0 and any(width % group_size for width in widths):
        console.print(
            f"note: {group_size} does not divide every width of this model ({sorted(widths)}), which vLLM wants; "
            "--group-size 64 or 32 may",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
