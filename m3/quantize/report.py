"""What a run of quantisation did, beside the model: report.json, and report.html, one page with plots.

The page needs no network and no script.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from m3.checkpoint import write_json
from m3.quantize.coverage import heat_map
from m3.quantize.evaluate import Estimate

if TYPE_CHECKING:
    from m3.quantize.record import Report

RESULT, PAGE = "report.json", "report.html"
WORST = 12  # linears in the table
MB, GB = 1e6, 1e9
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1c2733 }
h1, h2 { line-height: 1.2 } .note { color: #5d6b78 } figure { margin: 0 } table { border-collapse: collapse }
td, th { padding: 2px 10px; text-align: right } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f3f6f8 } svg { max-width: 100% }
"""
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1><table>{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% if quality %}<h2>Held-out text: {{ tokens }} tokens of {{ passages }} passages</h2>
<table><tr><th></th><th>mean</th><th>95% of the means of passages drawn again</th></tr>
{% for name, mean, interval in quality %}<tr><td>{{ name }}</td><td>{{ mean }}</td><td>{{ interval }}</td></tr>
{% endfor %}</table>
<p class="note">KL of the quantised model's next-token distribution from the other's, nats a token. The text is small:
it ranks forms of one model and is no public benchmark.</p>{% endif %}
{% for figure, caption in figures %}<h2>{{ caption }}</h2><figure>{{ figure }}</figure>
{% endfor %}
{% if worst %}<h2>Linears with the largest error</h2>
<table><tr><th>linear</th><th>of the weight</th><th>of its outputs</th></tr>
{% for name, weight, output in worst %}<tr><td>{{ name }}</td><td>{{ weight }}</td><td>{{ output }}</td></tr>
{% endfor %}</table>{% endif %}
<p class="note">Errors are squared error over squared size. The error of hidden states after a layer is that of all
layers up to it, on the calibration set and the held-out text.</p></body></html>
"""


def write_result(folder: Path, report: Report) -> None:
    """report.json in ``folder``."""
    write_json(folder / RESULT, dataclasses.asdict(report))


def write_page(folder: Path, report: Report) -> None:
    """report.html in ``folder``."""
    (folder / PAGE).write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page."""
    linears, linears_bf16 = report.linears
    settings, scheme = report.settings, report.settings["scheme"]
    found = report.comparison
    quality = []
    if found is not None:
        quality = [
            row("perplexity before", found.perplexity, 3),
            row("perplexity, quantised", found.perplexity_quantised, 3),
            row("KL", found.kl, 4),
            row("same likeliest token", found.same_top, 3),
        ]
    facts = [
        ("method", settings["method"]),
        ("grid", f"{'symmetric' if scheme['symmetric'] else 'asymmetric'}, groups of {scheme['group_size']}"),
        ("calibration", "{} sequences of {} tokens".format(*report.calibration)),
        ("left as they are, beside embedding, norms, router and head", f"{len(settings['keep'])} linears"),
        ("files before", f"{report.nbytes_before / MB:.1f} MB"),
        ("tensors after", f"{report.nbytes / MB:.1f} MB"),
        ("linears", f"{linears_bf16 / MB:.1f} MB in bf16, {linears / MB:.1f} MB packed with scales and zeros"),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", f"{report.peak_memory / GB:.2f} GB"),
    ]
    experts = [shard for shard in report.shards if shard.routed is not None]
    if experts:
        fewest = min(min(shard.routed or (0,)) for shard in experts)
        forced = [tokens for shard in experts for tokens in shard.forced or ()]
        facts += [
            ("fewest tokens that a router gave an expert", f"{fewest}"),
            ("forced on experts that had too few", f"{sum(forced)} tokens, {sum(map(bool, forced))} experts"),
            ("experts that learnt from no token", f"{report.blind}"),
        ]
    errors = {
        f"{'' if shard.layer < 0 else f'model.layers.{shard.layer}.'}{name}": error
        for shard in report.shards
        for name, error in shard.errors.items()
    }
    worst = sorted(errors, key=lambda name: (errors[name].output or 0.0, errors[name].weight), reverse=True)[:WORST]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return page.from_string(TEMPLATE).render(
        title="Quantisation to INT4",
        style=STYLE,
        facts=facts,
        quality=quality,
        tokens=0 if found is None else found.tokens,
        passages=0 if found is None else found.passages,
        figures=figures(report),
        worst=[(name, short(errors[name].weight), short(errors[name].output)) for name in worst],
    )


def row(name: str, estimate: Estimate, digits: int) -> tuple[str, str, str]:
    low, mean, high = (f"{value:.{digits}f}" for value in (estimate.low, estimate.mean, estimate.high))
    return name, mean, f"{low} to {high}"


def short(value: float | None) -> str:
    return "none seen" if value is None else f"{value:.2e}"


def figures(report: Report) -> list[tuple[Any, str]]:
    """(SVG, caption) of error and time over layers."""
    from matplotlib.figure import Figure

    layers = [shard for shard in report.shards if shard.layer >= 0]
    made = []

    def axes(label: str, scale: str) -> tuple[Any, Any]:
        figure = Figure(figsize=(9, 3), layout="constrained")
        one = figure.subplots()
        one.set(xlabel="layer", ylabel=label, yscale=scale)
        return figure, one

    by_kind: dict[str, list[tuple[int, float]]] = {}
    for shard in layers:
        kinds: dict[str, list[float]] = {}
        for name, error in shard.errors.items():
            value = error.weight if error.output is None else error.output
            kinds.setdefault(name.rpartition(".")[2], []).append(value)
        for kind, values in kinds.items():
            by_kind.setdefault(kind, []).append((shard.layer, statistics.fmean(values)))
    if by_kind:
        figure, one = axes("squared error / squared size", "log")
        for kind, points in by_kind.items():
            one.plot(*zip(*points, strict=True), marker=".", label=kind)
        one.legend(fontsize=7, ncols=4)
        made.append((svg(figure), "Error of the outputs of linears (of experts: the mean)"))
    hidden = [(shard.layer, shard.hidden_error) for shard in layers if shard.hidden_error is not None]
    if hidden:
        figure, one = axes("squared error / squared size", "log")
        one.plot(*zip(*hidden, strict=True), marker=".")
        made.append((svg(figure), "Error of the hidden states after each layer"))
    if layers:
        figure, one = axes("seconds", "linear")
        one.bar([shard.layer for shard in layers], [shard.seconds for shard in layers])
        made.append((svg(figure), "Time of each layer"))
    experts = [shard for shard in layers if shard.routed is not None]
    if experts:
        total = torch.tensor([shard.routed for shard in experts])
        made.append((svg(heat_map(total, [shard.layer for shard in experts])), "Tokens that routers gave experts"))
    return made


def svg(figure: Any) -> Any:
    """A figure as markup."""
    import markupsafe

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])
