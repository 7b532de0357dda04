"""Decides from measurements whether to speculate in the next step, and how: never slower than plain decoding, but for
the price of finding out.

Two models, both fitted while serving. Speed: for each number of running requests (to a power of two) and each way of
decoding, tokens and seconds of a step. The fastest way is used; the others are tried again for a small share of the
time. Cost of a pass over m rows: c0 + c1 m (+ c2 experts read), by least squares; it tells tree_budget how many nodes
are worth verifying.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3.engine.config import Shape

TRIALS = 3  # first steps of every way of decoding, before any is compared
MEMORY = 0.1  # weight of a new measurement
PROBE_SHARE = 0.01  # of the time, lost in trying what was slower
OUTLIER = 3.0  # a step that took so many times longer than usual says nothing about the way it went
MOST_ROWS = 256  # of the cost table


@dataclasses.dataclass
class Speed:
    """Seconds and tokens of a step, running averages."""

    count: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    outliers: int = 0  # in a row

    def add(self, seconds: float, tokens: float) -> None:
        self.count += 1
        if self.count > TRIALS and seconds > OUTLIER * self.seconds:
            self.outliers += 1
            if self.outliers < TRIALS:
                return
            self.seconds = seconds  # it is the new normal
        self.outliers = 0
        if self.count <= TRIALS:  # the first step warms caches: the least is nearest to the truth
            self.seconds = seconds if self.count == 1 else min(self.seconds, seconds)
        else:
            self.seconds += MEMORY * (seconds - self.seconds)
        self.tokens += max(MEMORY, 1 / self.count) * (tokens - self.tokens)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Controller:
    """Chooses among ``shapes`` and plain decoding (None)."""

    def __init__(self, shapes: tuple[Shape, ...], *, adaptive: bool = True) -> None:
        self.shapes, self.adaptive = shapes, adaptive
        self._speeds: dict[int, dict[Shape | None, Speed]] = {}
        self._credit = 0.0  # seconds that may be lost in trying
        self._probe = 0

    def _of(self, requests: int) -> dict[Shape | None, Speed]:
        bucket = (max(requests, 1) - 1).bit_length()
        if bucket not in self._speeds:
            self._speeds[bucket] = {way: Speed() for way in (None, *self.shapes)}
        return self._speeds[bucket]

    def choose(self, requests: int) -> Shape | None:
        """The way to decode for so many requests."""
        if not self.adaptive:
            return self.shapes[0]
        speeds = self._of(requests)
        best = max(speeds, key=lambda way: speeds[way].rate)
        for way, speed in speeds.items():
            hopeless = speed.count and speed.rate < 0.6 * speeds[best].rate
            if speed.count < TRIALS and not hopeless:
                return way
        others = [way for way in speeds if way != best]
        way = others[self._probe % len(others)]
        loss = speeds[way].seconds - speeds[way].tokens / max(speeds[best].rate, 1e-9)
        if loss <= self._credit:
            self._credit = 0.0
            self._probe += 1
            return way
        return best

    def record(self, requests: int, way: Shape | None, seconds: float, tokens: int) -> None:
        """A step of ``requests`` that decoded and nothing else."""
        if self.adaptive:
            self._of(requests)[way].add(seconds, tokens)
            self._credit += PROBE_SHARE * seconds

    def report(self) -> list[dict[str, object]]:
        """What has been measured: one row a number of requests and way of decoding."""
        return [
            {
                "requests": 1 << bucket,
                "way": "plain" if way is None else str(way),
                "steps": speed.count,
                "tokens_per_step": speed.tokens,
                "seconds_per_step": speed.seconds,
            }
            for bucket, speeds in sorted(self._speeds.items())
            for way, speed in speeds.items()
            if speed.count
        ]


class PassCost:
    """Seconds of a target pass as c0 + c1 rows + c2 experts, by recursive least squares that forgets."""

    def __init__(self, *, experts: bool) -> None:
        self.terms = 3 if experts else 2
        self._normal = torch.zeros(self.terms, self.terms, dtype=torch.float64)
        self._right = torch.zeros(self.terms, dtype=torch.float64)
        self.count = 0

    def add(self, rows: int, experts: float, seconds: float) -> None:
        x = torch.tensor([1.0, rows, experts][: self.terms], dtype=torch.float64)
        self._normal.mul_(0.99).add_(torch.outer(x, x))
        self._right.mul_(0.99).add_(x, alpha=seconds)
        self.count += 1

    def coefficients(self) -> list[float]:
        """c0, c1 (, c2), none below 0; zeros before there are measurements."""
        ridge = torch.eye(self.terms, dtype=torch.float64) * 1e-9 * max(float(self._normal.diagonal().sum()), 1e-9)
        return torch.linalg.solve(self._normal + ridge, self._right).clamp(min=0).tolist()

    def table(self, least: int) -> tuple[Tensor, float] | None:
        """(cost of m rows, m = 0 .., without experts; cost of an expert) for tree_budget; None while unknown."""
        if self.count < 8:
            return None
        c0, c1, *rest = self.coefficients()
        if c0 + c1 <= 0:
            return None
        rows = torch.arange(max(MOST_ROWS, least) + 1, dtype=torch.float64)
        return c0 + c1 * rows + 1e-12, rest[0] if rest else 0.0
