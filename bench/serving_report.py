"""Rows of servers to prose: a table for each number of clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.record import ServingRow
from bench.tables import table, why_untimed

OURS = "m3_int4_draft"


def cases(rows: Iterable[ServingRow]) -> list[tuple[tuple[str, int], list[ServingRow]]]:
    """[((case, threads), rows)] in order of appearance."""
    found: dict[tuple[str, int], list[ServingRow]] = {}
    for row in rows:
        found.setdefault((row.shape, row.case_threads), []).append(row)
    return list(found.items())


def pair_ms(p50: float | None, p95: float | None) -> str:
    return "" if p50 is None or p95 is None else f"{p50 * 1e3:.0f} / {p95 * 1e3:.0f}"


def case_table(rows: Sequence[ServingRow]) -> str:
    """The arms of one case, the fastest first, those without a time last."""
    lines = []
    for row in sorted(rows, key=lambda row: -(row.requests_s or 0)):
        regret = "" if row.error is None else f"{row.error:.4f}"
        if row.requests_s is None or row.p20_s is None or row.p80_s is None:
            lines.append((f"{row.arm} ({row.software})", why_untimed(row), "", "", "", "", "", "", regret))
            continue
        ahead = (row.ratios or {}).get(OURS)
        lines.append(
            (
                f"{row.arm} ({row.software})",
                f"{row.requests_s:.2f} ({1 / row.p80_s:.2f} - {1 / row.p20_s:.2f})",
                f"{row.tokens_s:.0f}",
                "" if ahead is None else f"{1 / ahead[0]:.2f} ({1 / ahead[2]:.2f} - {1 / ahead[1]:.2f})",
                pair_ms(row.first_p50_s, row.first_p95_s),
                pair_ms(row.token_p50_s, row.token_p95_s),
                "" if row.gap_p95_s is None else f"{row.gap_p95_s * 1e3:.0f}",
                "" if row.resident_bytes is None else f"{row.resident_bytes / 1e6:.0f}",
                regret,
            )
        )
    header = ("arm", "requests/s (p20 - p80)", "tokens/s", f"{OURS} ahead (p20 - p80)")
    latencies = ("first token, ms, p50 / p95", "a token, ms, p50 / p95", "gap p95, ms")
    return table((*header, *latencies, "MB", "regret"), lines)


def title(row: ServingRow) -> str:
    who = "1 client" if row.clients == 1 else f"{row.clients} clients"
    return f"{who}, prompts of {row.prompt_tokens} tokens, answers of {row.new_tokens}"


def tables(rows: Iterable[ServingRow]) -> str:
    """Text for the terminal."""
    return "\n".join(
        f"\n{title(members[0])}, {threads} thread(s)\n\n{case_table(members)}" for (_, threads), members in cases(rows)
    )


def sections(rows: Sequence[ServingRow]) -> list[str]:
    """Parts of docs/benchmarks.md: every case of one machine."""
    return [
        f"### Servers: {title(members[0])}, {threads} thread(s)\n\n{case_table(members)}\n"
        for (_, threads), members in cases(rows)
    ]
