"""A run as one self-contained HTML page: curves, rewards by domain and rubric, step penalties, rollouts with credit.

Everything comes from the run's own files: recipe.json, metrics.jsonl, timings.jsonl, scores.json, the newest of
samples/. The page needs no network and no script.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from m3.train.metrics import METRICS, SAMPLES, TIMINGS, read_metrics
from m3.train.recipe import RESOLVED, flat, read
from m3.train.run_stage import SCORES
from m3kernels.checks import refuse

PAGE = "report.html"
DISCLAIMER = "Research software: not a medical device, not for the care of patients."
OTHERS = "Others"
PER_DOMAIN, PER_RUBRIC, PENALTIES = "Rewards per stage or domain", "Rewards per rubric", "Step penalties"
TOGETHER = (PER_DOMAIN, PER_RUBRIC, PENALTIES)  # sections of one figure: their metrics have one scale
COLOURS = ("#0b5c7a", "#d1603d", "#4b8f52", "#8a5aa8", "#b8860b", "#c2457f", "#5d6b78", "#2f9c95", "#7a4b2a", "#000000")
Rows = Sequence[Mapping[str, float]]
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (  # title, names or their beginnings; the longest that fits takes it
    ("Rewards", ("reward", "group_std", "coverage", "diagnosis")),
    (PER_DOMAIN, ("reward/",)),
    (PER_RUBRIC, ("rubric/",)),
    (PENALTIES, ("violations/", "gamma", "repeat_score", "logical_score", "phrasing_score", "safe")),
    ("Consultations", ("turns", "discarded/", "rollouts_failed", "groups", "cut")),
    ("Policy", ("entropy", "kl", "approx_kl", "ratio", "clip", "dual_clip", "sampler", "advantage", "reverse_kl",
                "outcome")),
    ("Optimiser", ("loss", "grad_norm", "lr")),
    ("Tokens", ("tokens", "samples", "rows_")),
    ("Time and memory", ("batch_seconds", "logprobs_seconds", "update_seconds", "refresh_seconds", "rollout_seconds",
                         "peak_memory")),
    (OTHERS, ("",)),
)  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1c2733 }
h1, h2 { line-height: 1.2 } .note { color: #5d6b78 } .curves { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0 } table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f3f6f8 }
pre { white-space: pre-wrap; background: #f3f6f8; padding: 10px } .policy { color: #0b5c7a; font-weight: 600 }
tr.title td { font-weight: 600; background: #fff; padding-top: 10px } img { max-width: 100% }
"""
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1><p class="note">{{ disclaimer }}</p><p>{{ subtitle }}</p>
{% if scores %}<h2>Held-out cases, after the last step</h2>
<table><tr><th></th>{% for name in domains %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in scores %}<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for section in sections %}<h2>{{ section.title }}</h2><div class="curves">
{% for svg in section.svgs %}<figure>{{ svg }}</figure>
{% endfor %}</div>
{% endfor %}
{% if rollouts %}<h2>Rollouts of {{ rollouts_of }}</h2>
<p class="note">Each turn of the policy with its factor (gamma, Eq 7) and its advantage.</p>
{% for rollout in rollouts %}<details{% if loop.first %} open{% endif %}><summary>{{ rollout.title }}</summary>
<pre>{% for line in rollout.lines %}<span class="{{ line.kind }}">{{ line.text }}</span>
{% endfor %}</pre></details>
{% endfor %}{% endif %}
<h2>First and last steps</h2>
<table><tr><th>metric</th><th>first {{ window }}</th><th>last {{ window }}</th></tr>
{% for title, rows in summary %}<tr class="title"><td colspan="3">{{ title }}</td></tr>
{% for row in rows %}<tr><td>{{ row.name }}</td><td>{{ row.first }}</td><td>{{ row.last }}</td></tr>
{% endfor %}{% endfor %}</table>
<h2>Recipe</h2><table>{% for key, value in recipe %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></body></html>
"""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, also of one that goes on; its path.

    Raises:
        ValueError: the folder holds no run, or one without a step.
    """
    run = Path(run)
    path = Path(out) if out is not None else run / PAGE
    page = render(run)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def render(run: Path) -> str:
    """The page, one HTML text. Raises ValueError as ``write_report``."""
    metrics = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    if not metrics:
        raise refuse("report", str(run), f"a run with {METRICS}", "none, or no step")
    timings = read_metrics(run / TIMINGS) if (run / TIMINGS).is_file() else []
    recipe = read(run / RESOLVED) if (run / RESOLVED).is_file() else None
    scores = json.loads((run / SCORES).read_text(encoding="utf-8")) if (run / SCORES).is_file() else {}
    rollouts, rollouts_of = newest_rollouts(run)
    window = max(1, len(metrics) // 10)
    names = grouped([*columns(metrics), *columns(timings)])
    found = {name: (metrics if name in columns(metrics) else timings) for _, some in names for name in some}
    sections = [
        {"title": title, "svgs": figures(title, {name: found[name] for name in some if _moves(name, found[name])})}
        for title, some in names
    ]
    domains = list(dict.fromkeys(name.partition("/")[2] for name in scores))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    what = "" if recipe is None else f"{recipe.stage}, {recipe.algorithm}, seed {recipe.seed}; "
    return environment.from_string(TEMPLATE).render(
        title=f"Training run {run.resolve().name}",
        disclaimer=DISCLAIMER,
        style=STYLE,
        subtitle=f"{what}{int(metrics[-1]['step'])} steps",
        window=window,
        domains=domains,
        scores=[
            (
                name,
                [
                    f"{scores[one]:.3f}" if (one := f"{name}/{domain}".rstrip("/")) in scores else ""
                    for domain in domains
                ],
            )
            for name in dict.fromkeys(name.partition("/")[0] for name in scores)
        ],
        summary=[
            (
                title,
                [
                    {
                        "name": name,
                        "first": _mean(name, found[name][:window]),
                        "last": _mean(name, found[name][-window:]),
                    }
                    for name in some
                ],
            )
            for title, some in names
        ],
        sections=[section for section in sections if section["svgs"]],
        rollouts=rollouts,
        rollouts_of=rollouts_of,
        recipe=[] if recipe is None else [(key, str(value)) for key, value in flat(recipe.to_json())],
    )


def columns(rows: Rows) -> list[str]:
    """Names of all rows, in the order in which they appear; a stage that has no group yet comes later."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]


def grouped(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, names) of GROUPS; groups without a name are left out. "DOMAIN/name" is grouped as "name" is."""
    found: dict[str, list[str]] = {title: [] for title, _ in GROUPS}
    for name in names:
        title = _group(name)
        found[title if title != OTHERS else _group(name.partition("/")[2] or name)].append(name)
    return [(title, some) for title, some in found.items() if some]


def _group(name: str) -> str:
    fitting = [(len(begin), title) for title, begins in GROUPS for begin in begins if name.startswith(begin)]
    return max(fitting)[1]


def figures(title: str, metrics: Mapping[str, Rows]) -> list[Any]:
    """SVGs of a section: one of each metric, or one of all."""
    if title in TOGETHER:
        return [curves(metrics)] if metrics else []
    return [curve(name, rows) for name, rows in metrics.items()]


def curve(name: str, rows: Rows) -> Any:
    """An SVG of a metric over the steps: the points, and their mean over a tenth of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.1))
    axes = figure.add_axes((0.16, 0.12, 0.81, 0.76))  # fixed: a layout that is sought costs as much as the drawing
    steps, values, smooth = _smoothed(name, rows)
    axes.plot(steps, values, color="#9fb8c6", linewidth=0.8)
    axes.plot(steps, smooth, color=COLOURS[0], linewidth=1.6)
    axes.set_title(name, fontsize=9, parse_math=False)
    return _svg(figure)


def curves(metrics: Mapping[str, Rows]) -> Any:
    """An SVG of several metrics of one scale: of each its mean over a tenth of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, rows) in enumerate(metrics.items()):
        steps, values, smooth = _smoothed(name, rows)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
        dashed = "-" if index < len(COLOURS) else "--"
        axes.plot(steps, smooth, color=colour, linewidth=1.6, linestyle=dashed, label=name)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _svg(figure)


def _smoothed(name: str, rows: Rows) -> tuple[list[float], list[float], list[float]]:
    """(steps, values, their means over a tenth of the run)."""
    steps = [row["step"] for row in rows if name in row]
    values = [row[name] for row in rows if name in row]
    width = max(1, len(values) // 10)
    smooth = [sum(values[max(0, at - width + 1) : at + 1]) / min(at + 1, width) for at in range(len(values))]
    return steps, values, smooth


def _svg(figure: Any) -> Any:
    import markupsafe
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.ticker import MaxNLocator

    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])


def newest_rollouts(run: Path) -> tuple[list[dict[str, Any]], str]:
    """(rollouts, name of their file) of the last samples that the run wrote."""
    files = sorted((run / SAMPLES).glob("step-*.txt"))
    if not files:
        return [], ""
    found: list[dict[str, Any]] = []
    kind = "given"
    for line in files[-1].read_text(encoding="utf-8").split("\n"):
        if line.startswith("==== "):
            found.append({"title": line.removeprefix("==== "), "lines": []})
            kind = "given"
        elif found:
            if line.startswith("-- "):
                kind = "policy" if line.startswith("-- policy") else "given"
            found[-1]["lines"].append({"kind": kind, "text": line})
    return found, files[-1].stem


def _moves(name: str, rows: Rows) -> bool:
    """Whether there is a curve to see, beyond rounding."""
    values = [row[name] for row in rows if name in row]
    return bool(values) and max(values) - min(values) > 1e-6 * max(map(abs, values))


def _mean(name: str, rows: Rows) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{sum(values) / len(values):.4g}" if values else "-"
