"""What a pipeline came to: rewards after each stage as a table, a picture and a page.

    rewards.png   held-out reward of each domain, stage by stage, with 95 % intervals (1.96 standard errors)
    index.html    the table, the picture, all scores, what each stage took and left; links to the stages' own pages

Both lie in the job's folder; links are relative, so the folder can be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from m3.train import report
from m3.train.pipeline_job import ERROR, RECORD, REWARD, Record

if TYPE_CHECKING:
    from rich.table import Table

PAGE, PICTURE = "index.html", "rewards.png"
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1><p class="note">{{ disclaimer }}</p><p>{{ subtitle }}</p>
<h2>Held-out reward after each stage</h2>
<table><tr><th>stage</th><th>how</th><th>from</th>{% for name in domains %}<th>{{ name }}</th>{% endfor %}
<th>steps</th><th>minutes</th></tr>
{% for row in rows %}<tr><td><a href="{{ row.link }}">{{ row.stage }}</a></td><td>{{ row.how }}</td>
<td>{{ row.start }}</td>{% for cell in row.rewards %}<td>{{ cell }}</td>{% endfor %}
<td>{{ row.steps }}</td><td>{{ row.minutes }}</td></tr>
{% endfor %}</table>
<p class="note">Mean and standard error over the held-out cases of each domain. A stage's name leads to its page.</p>
{% if picture %}<img src="{{ picture }}" alt="Held-out reward of each domain after each stage">{% endif %}
{% for table in others %}<h2>{{ table.title }}</h2>
<table><tr><th>stage</th>{% for name in table.names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>What each stage took and left</h2>
<table><tr><th>stage</th><th>what</th><th>path</th><th>sha256</th></tr>
{% for row in made %}<tr><td>{{ row.stage }}</td><td>{{ row.what }}</td><td>{{ row.path }}</td>
<td><code title="{{ row.sha256 }}">{{ row.sha256[:12] }}</code></td></tr>
{% endfor %}</table>
<p class="note">In full in stage.json of each stage. {{ version }}</p>
</body></html>
"""


def table(records: Sequence[Record]) -> Table:
    """Mean held-out reward and its standard error, a row a stage."""
    from rich.table import Table

    domains = _domains(records)
    made = Table(title="held-out reward after each stage (mean ± standard error)")
    made.add_column("stage")
    for name in domains:
        made.add_column(name, justify="right")
    made.add_column("steps", justify="right")
    made.add_column("time", justify="right")
    for record in records:
        rewards = [_cell(record, name) for name in domains]
        made.add_row(record.stage, *rewards, str(record.steps), clock(record.seconds))
    return made


def clock(seconds: float) -> str:
    """Minutes and seconds, "1:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def write_page(records: Sequence[Record], out: str | Path) -> Path:
    """Write the page, the picture, and the page of each stage under the job's folder ``out``; the page's path.

    Raises:
        ValueError: no record, or a stage without metrics.
    """
    out = Path(out)
    for record in records:
        if _lacks(out / record.stage / report.PAGE, out, [record]):
            report.write_report(out / record.stage)
    drawn = draw(records, out / PICTURE) if _domains(records) else None
    path = out / PAGE
    part = path.with_name(path.name + ".part")
    part.write_text(_render(records, out.resolve().name, drawn), encoding="utf-8")
    part.replace(path)
    return path


def page_of(records: Sequence[Record], out: str | Path) -> Path:
    """The page; written where it is not there, or older than a record: a kill may have come between them."""
    path = Path(out) / PAGE
    return write_page(records, out) if _lacks(path, Path(out), records) else path


def draw(records: Sequence[Record], path: Path) -> Path:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = [name for name in _domains(records) if name != "all"]
    figure = Figure(figsize=(1.6 + 1.5 * len(records), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, name in enumerate(domains):
        shift = 0.16 * (index - (len(domains) - 1) / 2)
        known = [(at, *record.rewards[name]) for at, record in enumerate(records) if name in record.rewards]
        axes.errorbar(
            [at + shift for at, _, _ in known],
            [mean for _, mean, _ in known],
            yerr=[1.96 * (error or 0.0) for _, _, error in known],
            fmt="o",
            capsize=3,
            label=name,
        )
        for at, mean, _ in known:
            axes.annotate(f"{mean:.2f}", (at + shift, mean), xytext=(7, 3), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(records)), [record.stage for record in records])
    axes.set_xlim(-0.5, len(records) - 0.5)
    axes.set_ylabel("held-out reward")
    axes.set_title("Held-out reward after each stage, 95 % intervals", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=110)
    part.replace(path)
    return path


# -- parts ------------------------------------------------------------------------------------------------------------
def _lacks(page: Path, out: Path, records: Sequence[Record]) -> bool:
    newest = max((out / record.stage / RECORD).stat().st_mtime_ns for record in records)
    return not page.is_file() or page.stat().st_mtime_ns < newest


def _domains(records: Sequence[Record]) -> list[str]:
    """Those that have a reward in some record, and "all"."""
    return list(dict.fromkeys(name for record in records for name in record.rewards))


def _cell(record: Record, name: str) -> str:
    """A domain's mean reward and its standard error, "0.785 ± 0.012"; "": the record has none."""
    if name not in record.rewards:
        return ""
    mean, error = record.rewards[name]
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def _render(records: Sequence[Record], folder: str, picture: Path | None) -> str:
    domains = _domains(records)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    last = records[-1]
    return environment.from_string(TEMPLATE).render(
        title="Training pipeline",
        subtitle=f"{len(records)} stages; folder {folder}",
        style=report.STYLE,
        disclaimer=report.DISCLAIMER,
        domains=domains,
        rows=[
            {
                "stage": record.stage,
                "link": f"{record.stage}/{report.PAGE}",
                "how": f"{record.kind}, {record.algorithm}",
                "start": ", ".join(record.inputs) or "the source's own model",
                "rewards": [_cell(record, name).replace(" ", "\N{NO-BREAK SPACE}") for name in domains],
                "steps": record.steps,
                "minutes": f"{record.seconds / 60:.1f}",
            }
            for record in records
        ],
        picture=picture.name if picture is not None else "",
        others=[found for domain in domains if (found := _others(records, domain))["names"]],
        made=[
            {"stage": record.stage, "what": what, "path": one.path, "sha256": one.sha256}
            for record in records
            for what, one in (("recipe", record.recipe), *record.inputs.items(), ("model", record.output))
        ],
        version=f"Version {last.version}" + (f", commit {last.commit}." if last.commit else "."),
    )


def _others(records: Sequence[Record], domain: str) -> dict[str, object]:
    """All scores of a domain but its reward."""
    ends = f"/{domain}"
    names = dict.fromkeys(name for record in records for name in record.scores if name.endswith(ends))
    kept = [name for name in names if not name.startswith((REWARD, ERROR))]
    return {
        "title": f"Other scores, {domain}",
        "names": [name.removesuffix(ends).replace("_", " ") for name in kept],
        "rows": [
            [record.stage, *(f"{record.scores[name]:.3f}" if name in record.scores else "" for name in kept)]
            for record in records
        ],
    }
