"""What the GPU kernels are to reach, as data; what was measured of it; the tables of docs/gpu_status.md.

A goal names rows (op, shape, M or density, arm), a measure of them, and the figure wanted on each GPU. Goals of
kernels are judged by the timing "cold" (gpu_timing.py), in bf16, without launches by hand. ``python -m bench goals``
prints them with what bench/results holds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench import record
from bench.record import GemmRow, LossRow, Row, SpecRow
from bench.tables import table, timed

GIB = 2**30
NOT_RUN = "not yet run"
BEGIN, END = "<!-- goals: python -m bench goals --write docs/gpu_status.md -->", "<!-- end of goals -->"
Peers = Mapping[str, Row]  # rows of the same case by arm, ours among them
Measure = Callable[[Row, Peers], float | None]


# -- measures ---------------------------------------------------------------------------------------------------------
def share_of_spec(row: Row, peers: Peers) -> float | None:
    return row.spec_share if isinstance(row, GemmRow | SpecRow) else None


def microseconds(row: Row, peers: Peers) -> float | None:
    return None if row.median_s is None else row.median_s * 1e6


def milliseconds(row: Row, peers: Peers) -> float | None:
    return None if row.median_s is None else row.median_s * 1e3


def beyond_roofline(row: Row, peers: Peers) -> float | None:
    """Microseconds over those of reading the weight at the bandwidth of the data sheet."""
    share = share_of_spec(row, peers)
    return None if share is None or row.median_s is None else (1 - share) * row.median_s * 1e6


def over(*names: str) -> Measure:
    """How many times as fast as the fastest of the peers named that has a time."""

    def measure(row: Row, peers: Peers) -> float | None:
        found = [value[0] for name, value in (row.ratios or {}).items() if name in names]
        return min(found, default=None)

    return measure


def peak_gib(row: Row, peers: Peers) -> float | None:
    return row.peak_bytes / GIB if isinstance(row, LossRow) and row.peak_bytes is not None else None


def workspace_gib(row: Row, peers: Peers) -> float | None:
    """Of the peak, what is neither a gradient that is returned nor dW while it is added up in fp32."""
    if not isinstance(row, LossRow) or row.peak_bytes is None:
        return None
    d_hidden = row.gradient_bytes - row.hidden * row.vocabulary * (4 if row.dtype == "fp32" else 2)
    return (row.peak_bytes - d_hidden - 4 * row.hidden * row.vocabulary) / GIB


def peak_mib(row: Row, peers: Peers) -> float | None:
    return row.peak_bytes / 2**20 if isinstance(row, SpecRow) and row.peak_bytes is not None else None


def gradient_error(row: Row, peers: Peers) -> float | None:
    """The error of dW over that of the plain way, all logits and autograd."""
    plain = peers.get("torch")
    values = [
        each.errors.get("d_weight") if isinstance(each, LossRow) and each.errors else None for each in (row, plain)
    ]
    return values[0] / values[1] if values[0] is not None and values[1] else None


# -- goals ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of a table of goals."""

    family: str
    regime: str
    what: str
    shapes: tuple[str, ...]
    arm: str
    measure: Measure
    want: Mapping[str, float]  # by GPU, as in CARDS; "" for any
    at_most: bool = False
    ms: tuple[int, ...] = ()
    density: float | None = None

    def concerns(self, row: Row) -> bool:
        """Whether a row is of this goal's cases, whatever its arm."""
        if row.device == "cpu" or row.shape not in self.shapes:
            return False
        if isinstance(row, GemmRow):
            return row.m in self.ms and row.timing == "cold" and row.x_dtype == "bf16"
        if isinstance(row, LossRow):
            return row.density == self.density
        return isinstance(row, SpecRow)

    def wanted(self, gpu: str) -> float | None:
        """The figure wanted on a GPU of that name; None where there is no goal for it."""
        return next((want for card, want in self.want.items() if re.search(rf"\b{card}\b", gpu)), None)

    def reached(self, got: float, gpu: str) -> bool:
        want = self.wanted(gpu)
        assert want is not None
        return got <= want if self.at_most else got >= want

    def want_text(self, card: str) -> str:
        want = self.want.get(card, self.want.get(""))
        return "" if want is None else f"{'<=' if self.at_most else '>='} {want:g}"


CARDS = ("H100", "H200")
CUBLAS, MARLIN, HUMMING = over("torch_dense"), over("marlin"), over("humming", "humming_grouped")
BIG, HUGE = ("8192x8192",), ("qwen2.5-32b.gate_up", "qwen2.5-32b.down")
SMALL = ("qwen3-235b-a22b.qkv", "qwen3-235b-a22b.o")
EXPERTS = ("qwen3-235b-a22b.moe",)
FEW = (1, 4, 16)
SHARE = "share of the data sheet's bandwidth"


def of(family: str, arm: str) -> Callable[..., Goal]:
    """Goals of a family for one arm."""

    def make(regime: str, what: str, measure: Measure, want: float | Mapping[str, float], **fields: object) -> Goal:
        wanted = want if isinstance(want, Mapping) else {"": want}
        values = {"arm": arm, **fields}
        return Goal(family=family, regime=regime, what=what, measure=measure, want=wanted, **values)  # type: ignore[arg-type]

    return make


def int4_goals() -> list[Goal]:
    dense, fast = of("int4", "m3_cuda"), of("int4", "m3_cuda_fast")
    few = {"shapes": BIG, "ms": FEW}
    found = [
        dense("dense, 35 MB, M = 1, 4, 16", SHARE, share_of_spec, {"H100": 0.60, "H200": 0.52}, **few),
        dense("dense, 35 MB, M = 1, 4, 16", "us", microseconds, {"H100": 17, "H200": 14}, at_most=True, **few),
        dense("dense, 35 MB, M = 1, 4, 16", "times as fast as cuBLAS", CUBLAS, {"H100": 3.3}, **few),
        dense("dense, 35 MB, M = 1, 4, 16", "times as fast as Marlin", MARLIN, {"H100": 1.55, "H200": 1.45}, **few),
        dense("dense, 70 MB or more, M = 1", SHARE, share_of_spec, {"H100": 0.75, "H200": 0.65}, shapes=HUGE, ms=(1,)),
        dense(
            "dense, 17 to 20 MB, M = 1",
            "us beyond the roofline",
            beyond_roofline,
            5,
            at_most=True,
            shapes=SMALL,
            ms=(1,),
        ),
        dense("dense, 17 to 20 MB, M = 1", "times as fast as Marlin", MARLIN, 1.25, shapes=SMALL, ms=(1,)),
        dense("dense, 17 to 20 MB, M = 1", "times as fast as Humming", HUMMING, 1.25, shapes=SMALL, ms=(1,)),
    ]
    for m, want in ((32, 22), (64, 26), (128, 34)):
        found.append(
            fast(f"dense, 35 MB, M = {m}", "us", microseconds, {"H200": want}, at_most=True, shapes=BIG, ms=(m,))
        )
    many = {"shapes": BIG, "ms": (256, 1024)}
    found += [
        fast("dense, 35 MB, M = 256, 1024", "times as fast as cuBLAS", CUBLAS, 1.0, **many),
        fast("dense, 35 MB, M = 256, 1024", "times as fast as Marlin", MARLIN, 1.65, **many),
    ]
    one = {"shapes": EXPERTS, "ms": (1,)}
    found += [
        dense("experts, M = 1, routing included", "us", microseconds, {"H100": 36}, at_most=True, **one),
        dense("experts, M = 1, routing included", "times as fast as Humming", HUMMING, 1.1, **one),
        dense("experts, M = 1, routing included", "times as fast as Marlin", MARLIN, 1.3, **one),
    ]
    for m, h100, h200 in ((16, 320, 245), (64, 490, 375)):
        where = {"shapes": EXPERTS, "ms": (m,)}
        found += [
            dense(f"experts, M = {m}", SHARE, share_of_spec, {"H100": 0.75, "H200": 0.68}, **where),
            dense(f"experts, M = {m}", "us", microseconds, {"H100": h100, "H200": h200}, at_most=True, **where),
        ]
    triton = {"arm": "m3_triton", "shapes": BIG, "ms": FEW}
    return [
        *found,
        fast("experts, M = 1024", "times as fast as Humming", HUMMING, 1.0, shapes=EXPERTS, ms=(1024,)),
        fast("experts, M = 1024", "times as fast as Marlin", MARLIN, 1.5, shapes=EXPERTS, ms=(1024,)),
        dense("Triton, dense, 35 MB, M = 1, 4, 16", "times as fast as gemlite", over("gemlite"), 1.0, **triton),
        dense("Triton, dense, 35 MB, M = 1, 4, 16", "times as fast as the CUDA room", over("m3_cuda"), 0.75, **triton),
    ]


def spec_goals() -> list[Goal]:
    """By number of requests: 1, 8, 64."""
    goal, found = of("spec_decode", "m3_cuda"), []
    at_most = {"at_most": True}
    kinds = {
        "greedy": ((12, 15, 45), ("greedy",)),
        "sampled, no filter": ((15, 20, 60), ("target_only", "coupled")),
        "sampled, top-k 20, top-p 0.95": ((25, 35, 120), ("target_only.filtered", "coupled.filtered")),
    }
    for kind, (limits, modes) in kinds.items():
        for requests, limit in zip((1, 8, 64), limits, strict=True):
            shapes = tuple(f"verify.n32.v151936.b{requests}.{mode}" for mode in modes)
            found.append(
                goal(f"tree_verify, {kind}, batch {requests}", "us", microseconds, limit, shapes=shapes, **at_most)
            )
    modes = ("greedy", *kinds["sampled, no filter"][1], *kinds["sampled, top-k 20, top-p 0.95"][1])
    for requests, times, scratch in ((1, 3, 1), (8, 6, 4), (64, 12, 16)):
        shapes = tuple(f"verify.n32.v151936.b{requests}.{mode}" for mode in modes)
        what = "times as fast as softmax of all rows, filters and a walk"
        found.append(goal(f"tree_verify, batch {requests}", what, over("torch_all_rows"), times, shapes=shapes))
        found.append(
            goal(f"tree_verify, batch {requests}", "MiB allocated", peak_mib, scratch, shapes=shapes, **at_most)
        )
    for op, stem, limits in (
        ("tree_finalize", "finalize.n32.b", (5, 6, 8)),
        ("tree_commit, 94 layers, 4 tokens", "commit.qwen3-235b-a22b.tp8.b", (8, 10, 25)),
    ):
        for requests, limit in zip((1, 8, 64), limits, strict=True):
            shapes = (f"{stem}{requests}",)
            found.append(goal(f"{op}, batch {requests}", "us", microseconds, limit, shapes=shapes, **at_most))
    attention = {"shapes": ("qwen3-235b-a22b.verify32.c4096.b8",)}
    regime = "tree_attention, 32 nodes, context 4096, batch 8"
    found.append(goal(regime, SHARE, share_of_spec, 0.6, **attention))
    cost = "time over that without the gate"
    gated = {"arm": "m3_cuda_gated", "at_most": True}
    found.append(
        goal(regime, cost, lambda row, peers: inverse(over("m3_cuda")(row, peers)), 1.03, **gated, **attention)
    )
    return found


def inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def loss_goals() -> list[Goal]:
    goal = of("policy_loss", "m3_one_pass@cuda")
    short, at_most = {"shapes": ("qwen3-8b.t8192",), "density": 1.0}, {"at_most": True}
    regime = "8192 tokens, 4096 x 151936"
    return [
        goal(regime, "ms, loss and both gradients", milliseconds, {"H100": 50}, **short, **at_most),
        goal(regime, "speed over that of the three bare products", over("gemms"), 0.84, **short),
        goal(regime, "peak, GiB", peak_gib, 4.5, **short, **at_most),
        goal(regime, "workspace beside dX and fp32 dW, GiB", workspace_gib, 1.3, **short, **at_most),
        goal(regime, "times as fast as Liger's scaled cross entropy", over("liger_ce"), 1.15, **short),
        goal(regime, "times as fast as verl's torch loss", over("verl"), 3, **short),
        goal(regime, "times as fast as Liger's GRPO loss", over("liger_loss"), 8, **short),
        goal(regime, "error of dW over that of plain torch", gradient_error, 1.0, **short, **at_most),
        goal(
            f"{regime}, 40 % count",
            "times as fast as Liger's scaled cross entropy",
            over("liger_ce"),
            2.5,
            **{**short, "density": 0.4},
        ),
        goal(
            "65536 tokens",
            "workspace beside dX and fp32 dW, GiB",
            workspace_gib,
            1.3,
            shapes=("qwen3-8b.t65536",),
            density=1.0,
            **at_most,
        ),
    ]


GOALS = (*int4_goals(), *spec_goals(), *loss_goals())
FAMILIES = {
    "int4": "INT4 (weights in bf16 x INT4, groups of 128; K and N of Qwen3-235B-A22B, Qwen2.5-32B, 8192 x 8192)",
    "spec_decode": "Trees (32 nodes, vocabulary 151936, bf16)",
    "policy_loss": "Policy loss (bf16)",
}


# -- verdicts ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A goal, one row of its cases (None: nothing of it was run), and the figure (None: not measured)."""

    goal: Goal
    row: Row | None = None
    got: float | None = None

    @property
    def gpu(self) -> str:
        return "" if self.row is None else str(self.row.machine.get("gpu", ""))

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        return "met" if self.goal.reached(self.got, self.gpu) else "MISSED"


def case_of(row: Row) -> str:
    """What tells a row from others of its goal."""
    if isinstance(row, GemmRow):
        return f"{row.shape} M={row.m}"
    return row.shape


def findings(rows: Iterable[Row]) -> list[Finding]:
    """For every goal, a finding for each case and GPU that has rows; goals of ops without any row are left out."""
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in record.latest(rows):
        cases.setdefault((*row.key[:-1],), {})[row.arm] = row
    found = []
    for goal in GOALS:
        for arms in cases.values():
            first = next(iter(arms.values()))
            if not goal.concerns(first) or goal.wanted(str(first.machine.get("gpu", ""))) is None:
                continue
            ours = arms.get(goal.arm)
            usable = ours is not None and bool(timed([ours])) and getattr(ours, "launch", None) != "eager"
            got = goal.measure(ours, arms) if ours is not None and usable else None
            found.append(Finding(goal=goal, row=ours or first, got=got))
    return found


def verdicts(rows: Iterable[Row]) -> str:
    """A table for people: every goal that the rows concern, with its figure, met or not."""
    found = findings(rows)
    if not found:
        return "\nno goal concerns these rows\n"
    body = []
    for each in found:
        assert each.row is not None
        want = each.goal.wanted(each.gpu)
        sign = "<=" if each.goal.at_most else ">="
        got = "" if each.got is None else f"{each.got:.3g}"
        body.append(
            (each.goal.regime, case_of(each.row), each.goal.what, each.goal.arm, f"{sign} {want:g}", got, each.verdict)
        )
    met = sum(each.verdict == "met" for each in found)
    unmeasured = sum(each.got is None for each in found)
    header = ("goal", "case", "measure", "arm", "want", "got", "")
    return f"\n{table(header, body)}\n\n{met} of {len(found)} figures meet their goal, {unmeasured} not measured\n"


# -- docs/gpu_status.md -----------------------------------------------------------------------------------------------
def measured(results: Path) -> list[Row]:
    """The rows of a GPU in results/*.jsonl."""
    rows = (row for path in sorted(results.glob("*.jsonl")) for row in record.read(path))
    return [row for row in rows if row.device != "cpu"]


def measured_text(found: Sequence[Finding]) -> str:
    """What was measured of one goal, GPU by GPU."""
    if not found:
        return NOT_RUN
    parts = []
    for each in found:
        assert each.row is not None
        figure = each.verdict if each.got is None else f"{each.got:.3g} {each.verdict}"
        parts.append(f"{case_of(each.row)}: {figure} ({each.gpu}, {each.row.commit})")
    return "; ".join(parts)


def status(rows: Iterable[Row]) -> str:
    """A table of goals for each family, as docs/gpu_status.md holds them."""
    found, parts = findings(rows), []
    for family, heading in FAMILIES.items():
        body = []
        for goal in (goal for goal in GOALS if goal.family == family):
            mine = [each for each in found if each.goal is goal]
            wants = [goal.want_text(card) for card in CARDS]
            body.append((goal.regime, goal.what, *wants, measured_text(mine)))
        header = ("goal", "measure", *(f"want, {card}" for card in CARDS), "measured")
        parts.append(f"{heading}:\n\n{table(header, body)}\n")
    return "\n".join(parts)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Renew what stands between the marks of goals in a document. Raises ValueError where it has no marks."""
    before, mark, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"goals: {path.name}: want the marks {BEGIN!r} and {END!r}; got none")
    path.write_text(f"{before}{BEGIN}\n\n{status(rows)}\n{END}{after}")
