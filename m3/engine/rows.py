"""From requests to the tensors of a pass: rows, slots, pages, and the parameters of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3.engine.request import Request
from m3kernels.decoder.program import Batch


def slots_of(pages: Sequence[int], page_size: int, start: int, stop: int) -> list[int]:
    """Slots of positions start .. stop - 1 of a request that owns these pages."""
    return [pages[at // page_size] * page_size + at % page_size for at in range(start, stop)]


def page_table(requests: Sequence[Request], device: torch.device) -> Tensor:
    """(B, most pages) int32, padded with 0, which nothing reads."""
    most = max((len(request.pages) for request in requests), default=0)
    rows = [request.pages + [0] * (most - len(request.pages)) for request in requests]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(len(requests), most)


class RowBuilder:
    """Collects the rows of a pass, request by request: first those that attend causally, then trees."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self.page_size, self.device = page_size, device
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.starts: list[int] = [0]
        self.keys: list[int] = []
        self.requests: list[Request] = []
        self.picked: list[int] = []

    def add(self, request: Request, tokens: list[int], start: int, *, shift: int = 0) -> int:
        """Tokens at positions start .. in the cache, causally; the first row's index. shift: added to the angle."""
        first, stop = len(self.tokens), start + len(tokens)
        self.tokens += tokens
        self.positions += range(start + shift, stop + shift)
        self.slots += slots_of(request.pages, self.page_size, start, stop)
        self._close(request, stop)
        return first

    def add_nodes(self, request: Request, tokens: list[int], positions: list[int], slot: int, keys: int) -> int:
        """Nodes of a tree in slots slot .., which see ``keys`` keys of the cache, masked; the first row's index."""
        first = len(self.tokens)
        self.tokens += tokens
        self.positions += positions
        self.slots += slots_of(request.pages, self.page_size, slot, slot + len(tokens))
        self._close(request, keys)
        return first

    def _close(self, request: Request, keys: int) -> None:
        self.requests.append(request)
        self.keys.append(keys)
        self.starts.append(len(self.tokens))

    def batch(self, causal: int, tree_lens: list[int] | None = None, mask_bits: Tensor | None = None) -> Batch:
        """The pass; the first ``causal`` requests attend causally. tree_lens: of all requests."""

        def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return Batch(
            tokens=tensor(self.tokens, torch.int64),
            positions=tensor(self.positions, torch.int64),
            slots=tensor(self.slots, torch.int64),
            cu_seqlens=tensor(self.starts, torch.int32),
            cache_seqlens=tensor(self.keys, torch.int32),
            block_table=page_table(self.requests, self.device),
            picked=tensor(self.picked, torch.int64),
            causal=causal,
            tree_lens=None if tree_lens is None else tensor(tree_lens, torch.int32),
            mask_bits=mask_bits,
        )


class SamplingTensors:
    """Parameters of tree_verify for the same requests again and again: made when the requests change."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._requests: list[Request] = []  # themselves, not their ids, which may come again
        self._made: dict[str, Any] = {}

    def of(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Keyword arguments of tree_verify, position aside."""
        if not self._made or list(requests) != self._requests:
            self._requests, self._made = list(requests), self._make(requests)
        return self._made

    def _make(self, requests: Sequence[Request]) -> dict[str, Any]:
        params = [request.params for request in requests]

        def column(values: list[Any], dtype: torch.dtype, idle: Any) -> Tensor | None:
            if all(value == idle for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=self.device)

        temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=self.device)
        return {
            "temperature": temperature,
            "top_k": column([p.top_k for p in params], torch.int32, 0),
            "top_p": column([p.top_p for p in params], torch.float32, 1.0),
            "min_p": column([p.min_p for p in params], torch.float32, 0.0),
            "seed": torch.tensor([request.seed for request in requests], dtype=torch.int64, device=self.device),
        }
