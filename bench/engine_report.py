"""Rows of whole engines to prose: a table of each case, and the promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.record import EngineRow, Row
from bench.tables import Line, acceptance_table, share, table, timed, why_untimed

OURS, PRECISIONS = "m3_int4", ("int4", "fp32", "bf16")
LLAMA = ("llama_q4_0", "llama_q4_0_flash")  # the faster of them counts
TRANSFORMERS = ("transformers_fp32", "transformers_bf16")
DECODE_OVER_LLAMA, PREFILL_OVER_LLAMA, DECODE_OVER_TRANSFORMERS = 1.2, 1.0, 8.0
DRAFT_GAIN, DRAFT_LEAST = 1.15, 0.97  # on one precision at batch 1; at any load


def cases(rows: Iterable[EngineRow]) -> list[tuple[tuple[str, int], list[EngineRow]]]:
    """[((case, threads), rows)] in order of appearance."""
    found: dict[tuple[str, int], list[EngineRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.case_threads), []).append(row)
    return list(found.items())


def case_lines(rows: Sequence[EngineRow]) -> list[tuple[str, ...]]:
    """The arms of one case, the fastest first, those without a time last."""
    lines = []
    for row in sorted(rows, key=lambda row: -(row.tokens_s or 0)):
        if row.tokens_s is None or row.p20_s is None or row.p80_s is None:
            lines.append((row.arm, why_untimed(row), "", "", "", "", "", regret_text(row.error), ""))
            continue
        ahead = (row.ratios or {}).get(OURS)
        lines.append(
            (
                row.arm,
                f"{row.tokens_s:.1f} ({1 / row.p80_s:.1f} - {1 / row.p20_s:.1f})",
                "" if ahead is None else f"{1 / ahead[0]:.2f}",
                "" if row.tokens_per_step is None else f"{row.tokens_per_step:.2f}",
                "" if row.step_bytes is None else f"{row.step_bytes / 1e6:.0f}",
                share(row.roofline_share),
                "" if row.others_cpu is None else f"{row.others_cpu:.2f}",
                regret_text(row.error),
                regret_text(row.rounding),
            )
        )
    return lines


def regret_text(nats: float | None) -> str:
    return "" if nats is None else f"{nats:.4f}"


def case_table(rows: Sequence[EngineRow]) -> str:
    header = (
        "arm",
        "tokens/s (p20 - p80)",
        f"{OURS} ahead",
        "tokens a step",
        "MB a step",
        "of roofline",
        "others' CPU",
    )
    return table((*header, "regret", "under fp32"), case_lines(rows))


def tables(rows: Iterable[EngineRow]) -> str:
    """Text for the terminal."""
    return "\n".join(
        f"\n{title(members[0])}, {threads} thread(s)\n\n{case_table(members)}" for (_, threads), members in cases(rows)
    )


def title(row: EngineRow) -> str:
    what = "prefill of" if row.op == "engine_prefill" else f"decode, batch {row.batch}, after"
    return f"{row.shape}: {what} {row.depth} tokens"


# -- promises ---------------------------------------------------------------------------------------------------------
def slowest_ratio(row: EngineRow | None, peers: Sequence[str]) -> tuple[str, tuple[float | None, ...]]:
    """The peer that ``row`` is least ahead of, and how far: median, p20, p80."""
    ratios = {} if row is None else {peer: value for peer, value in (row.ratios or {}).items() if peer in peers}
    if not ratios:
        return peers[0], (None, None, None)
    peer = min(ratios, key=lambda name: ratios[name][0])
    return peer, ratios[peer]


def against(row: Row, arm: EngineRow | None, what: str, peers: Sequence[str], want: float) -> Line:
    peer, (got, p20, p80) = slowest_ratio(arm, peers)
    return Line(
        shape=row.shape,
        threads=row.case_threads,
        case="" if arm is None else arm.weights,
        what=what,
        peer=peer,
        want=want,
        got=got,
        p20=p20,
        p80=p80,
    )


def acceptance(rows: Iterable[EngineRow]) -> list[Line]:
    """What was promised of INT4 against others, and of the draft against plain decoding."""
    lines = []
    for (shape, _), members in cases(rows):
        first, arms = members[0], {row.arm: row for row in timed(members)}
        ours = arms.get(OURS)
        if first.op == "engine_prefill":
            lines.append(against(first, ours, "prefill, times as fast", LLAMA, PREFILL_OVER_LLAMA))
            continue
        if first.batch == 1:
            lines.append(against(first, ours, "decode, times as fast", LLAMA, DECODE_OVER_LLAMA))
        if shape == "b1.d64":
            lines.append(against(first, ours, "decode, times as fast", TRANSFORMERS, DECODE_OVER_TRANSFORMERS))
            lines.append(draft_gain(first, arms))
        for weights in PRECISIONS:
            drafting = arms.get(f"m3_{weights}_draft")
            if drafting is not None:
                lines.append(
                    against(first, drafting, "with a draft, of plain", (f"m3_{weights}",), DRAFT_LEAST),
                )
    return lines


def draft_gain(row: EngineRow, arms: dict[str, EngineRow]) -> Line:
    """The precision on which the draft gains most."""
    found = [
        against(row, arms.get(f"m3_{w}_draft"), "best gain of a draft", (f"m3_{w}",), DRAFT_GAIN) for w in PRECISIONS
    ]
    return max(found, key=lambda line: line.got or 0)


def sections(rows: Sequence[EngineRow]) -> list[str]:
    """Whole engines: the promises if measured, then each case."""
    if not rows:
        return []
    parts = [f"### Promises of the engine\n{acceptance_table(acceptance(rows), 'weights')}"]
    for (_, threads), members in cases(rows):
        packages = {name: text for row in members for name, text in row.versions.items()}
        versions = ", ".join(f"{name} {text}" for name, text in sorted(packages.items()))
        parts.append(f"### {title(members[0])}, {threads} thread(s)\n\n{case_table(members)}\n\n{versions}.\n")
    return parts
