"""What an engine is told once: sizes of the cache and of a step (EngineConfig), and how it speculates (Speculation)."""

from __future__ import annotations

import dataclasses

import torch

from m3kernels.checks import refuse

KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def _check(op: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(op, name, f"an int in {low}..{high}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    page_size: tokens of a page of the cache. num_pages: pages; 0: as many as memory_mb holds.
    memory_mb: of the cache, in 10^6 bytes, where num_pages is 0. kv_dtype: "fp32", "bf16", "fp16" or "int8" (with one
        fp32 scale a head and token). max_context: tokens of a sequence; 0: the model's own.
    max_running: sequences of one step. max_step_tokens: rows of one step; longer prompts are cut into chunks.
    max_waiting: requests that may wait; more are refused or made to wait outside.
    prefix_reuse: share the pages of equal prompt beginnings.
    """

    page_size: int = 16
    num_pages: int = 0
    memory_mb: int = 512
    kv_dtype: str = "fp32"
    max_context: int = 0
    max_running: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 256
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        op = "EngineConfig"
        _check(op, "page_size", self.page_size, 1, 4096)
        _check(op, "num_pages", self.num_pages, 0, 2**31 - 1)
        _check(op, "memory_mb", self.memory_mb, 1, 2**31 - 1)
        _check(op, "max_context", self.max_context, 0, 2**31 - 1)
        _check(op, "max_running", self.max_running, 1, 4096)
        _check(op, "max_step_tokens", self.max_step_tokens, 1, 2**20)
        _check(op, "max_waiting", self.max_waiting, 1, 2**31 - 1)
        if self.kv_dtype not in KV_DTYPES:
            raise refuse(op, "kv_dtype", ", ".join(map(repr, KV_DTYPES)), repr(self.kv_dtype))
        if self.max_step_tokens < self.max_running:
            raise refuse(op, "max_step_tokens", f"at least max_running = {self.max_running}", self.max_step_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How a tree is drafted: ``steps`` of the draft, ``topk`` nodes expanded in each, ``nodes`` kept with the root.

    A chain of k drafts is Shape(steps=k, topk=1, nodes=k + 1).
    """

    steps: int
    topk: int
    nodes: int

    def __post_init__(self) -> None:
        op = "Shape"
        _check(op, "steps", self.steps, 1, 64)
        _check(op, "topk", self.topk, 1, 64)
        candidates = self.topk + (self.steps - 1) * self.topk**2
        _check(op, "nodes", self.nodes, 2, min(1024, candidates + 1))

    @classmethod
    def chain(cls, drafts: int) -> Shape:
        return cls(steps=drafts, topk=1, nodes=drafts + 1)

    @property
    def expanded(self) -> int:
        """Nodes that the draft runs over after the root."""
        return (self.steps - 1) * self.topk

    @property
    def slots(self) -> int:
        """Slots of the cache from the root on that a step may write, by the target or by the draft."""
        return max(self.nodes, 1 + self.expanded)

    def __str__(self) -> str:
        return f"chain {self.steps}" if self.topk == 1 else f"tree {self.steps}x{self.topk}, {self.nodes} nodes"


CHAINS = (Shape.chain(1), Shape.chain(2), Shape.chain(3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How the engine drafts.

    shapes: the controller chooses among these and no speculation, by measured speed; with adaptive False the first is
        always used. shared_noise: rank drafts with the noise that draws the tokens, from this temperature on (0:
        never); it never changes a token (docs/numerics.md). expert_budget: for a mixture of experts, keep as many nodes
        as are worth the experts that they touch.
    """

    shapes: tuple[Shape, ...] = CHAINS
    adaptive: bool = True
    shared_noise: float = 0.9
    expert_budget: bool = True

    def __post_init__(self) -> None:
        if not self.shapes or not all(isinstance(shape, Shape) for shape in self.shapes):
            raise refuse("Speculation", "shapes", "one or more Shape", repr(self.shapes)[:200])
        if not 0 <= self.shared_noise < float("inf"):
            raise refuse("Speculation", "shared_noise", "a temperature, 0 for never", self.shared_noise)
