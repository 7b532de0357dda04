"""What a draft learns from: hidden states of the target at every token of a response, in memory-mapped fp16 files.

A row of ``states.f16`` is one token: the hidden states after ``aux_layers`` layers, one after another, and then the
final one, after the last norm; ``best.i32`` has the target's likeliest next token of the same row. A response of N
tokens, its prompt included, has N - 1 rows: what follows the last token is of no use. ``index.jsonl`` says which rows
are whose; its lines are those of a store. Rows are written before their line, so that a kill leaves at most rows that
nobody owns, which the next writer drops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m3.draft.store import LineFile, Response
from m3.models.decoder import Decoder
from m3kernels.checks import refuse

FORMAT = "m3 draft states 1"
INDEX, STATES, BEST = "index.jsonl", "states.f16", "best.i32"
LARGEST = 65504.0  # of fp16
Progress = Callable[[int, int], None]  # (responses done, in all)


class Probe:
    """Collects the hidden states of a model's forward passes: enter it, run the model, call ``take``."""

    def __init__(self, model: Decoder, aux_layers: Sequence[int]) -> None:
        count = model.config.num_layers
        if not aux_layers or not all(0 <= layer <= count for layer in aux_layers):
            raise refuse("Probe", "aux_layers", f"numbers of layers in 0..{count}", f"{tuple(aux_layers)}")
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.width = (len(self.aux_layers) + 1) * model.config.hidden_size
        self._found: dict[int, Tensor] = {}
        self._final = torch.empty(0)
        self._hooks: list[Any] = []

    def __enter__(self) -> Probe:
        blocks = self.model.blocks
        for layer in set(self.aux_layers):
            if layer < len(blocks):
                self._hooks.append(blocks[layer].register_forward_pre_hook(self._before(layer)))
            else:
                self._hooks.append(self.model.norm.register_forward_pre_hook(self._before(layer)))
        self._hooks.append(self.model.norm.register_forward_hook(self._after))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._found[layer] = args[0]

        return keep

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self._final = out

    def take(self) -> Tensor:
        """(rows of the last pass, width) fp16."""
        parts = [self._found[layer] for layer in self.aux_layers]
        return torch.cat([part.clamp(-LARGEST, LARGEST).half() for part in (*parts, self._final)], dim=-1)


class States(NamedTuple):
    """The teacher's view of one response; views of mapped files, not to be written to."""

    aux: Tensor  # (N - 1, n D) fp16
    final: Tensor  # (N - 1, D) fp16
    best: Tensor  # (N - 1,) int32


class StateCache:
    """The folder of a teacher pass.

    Args:
        fingerprint: of the target. aux_layers: as in Probe. hidden_size: D.
    Raises:
        ValueError: the folder holds the states of another model or other layers, or a file is damaged.
    """

    def __init__(self, folder: str | Path, *, fingerprint: str, aux_layers: Sequence[int], hidden_size: int) -> None:
        self.folder = Path(folder)
        self.width, self.hidden_size = (len(aux_layers) + 1) * hidden_size, hidden_size
        header = {"format": FORMAT, "fingerprint": fingerprint, "aux_layers": list(aux_layers), "hidden": hidden_size}
        self._index = LineFile(self.folder / INDEX, header)
        found = header if self._index.found is None else self._index.found
        for name, value in header.items():
            if found.get(name) != value:
                raise refuse("states", f"{self.folder}: {name}", f"{value}", found.get(name))
        self._where: dict[tuple[str, int], tuple[int, int]] = {}
        self._rows = 0
        for fields in self._index.lines:
            self._own(fields["group"], fields["index"], fields["rows"])
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._maps: tuple[Tensor, Tensor] | None = None
        for path, row in self._data():
            size = path.stat().st_size if path.is_file() else 0
            if size < self._rows * row:
                raise refuse("states", str(path), f"{self._rows * row} bytes, as {INDEX} says", size)

    def _data(self) -> list[tuple[Path, int]]:
        """The files of rows, and the bytes of a row in each."""
        return [(self.folder / STATES, 2 * self.width), (self.folder / BEST, 4)]

    def _own(self, group: str, index: int, rows: int) -> None:
        self._where[group, index] = (self._rows, rows)
        self._rows += rows

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._where

    def append(self, group: str, index: int, states: Tensor, best: Tensor) -> None:
        """Add the rows of one response: states (N - 1, width) fp16, best (N - 1,)."""
        if states.dtype != torch.float16 or states.shape != (len(best), self.width):
            raise refuse("states", "states", f"({len(best)}, {self.width}) float16", states)
        if self._files is None:
            self._index.claim()
            (states_path, states_row), (best_path, best_row) = self._data()
            self._files = (states_path.open("ab"), best_path.open("ab"))
            self._files[0].truncate(self._rows * states_row)
            self._files[1].truncate(self._rows * best_row)
        for file, rows in zip(self._files, (states, best.to(torch.int32)), strict=True):
            file.write(rows.contiguous().cpu().numpy().data)
            file.flush()
        self._index.append({"group": group, "index": index, "rows": len(best)})
        self._own(group, index, len(best))
        self._maps = None

    def get(self, group: str, index: int) -> States:
        """The rows of one response."""
        if self._maps is None:
            states = np.memmap(self.folder / STATES, dtype=np.float16, mode="c", shape=(self._rows, self.width))
            best = np.memmap(self.folder / BEST, dtype=np.int32, mode="c", shape=(self._rows,))
            self._maps = torch.from_numpy(states), torch.from_numpy(best)
        start, count = self._where[group, index]
        rows, best_rows = (whole[start : start + count] for whole in self._maps)
        aux, final = rows.split((self.width - self.hidden_size, self.hidden_size), dim=-1)
        return States(aux, final, best_rows)

    def sync(self) -> None:
        for file in self._files or ():
            os.fsync(file.fileno())
        self._index.sync()

    def close(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None
        self._index.close()

    def __enter__(self) -> StateCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@torch.inference_mode()
def teach(
    model: Decoder,
    responses: Sequence[Response],
    cache: StateCache,
    aux_layers: Sequence[int],
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """Run the target over every response that the cache lacks."""
    missing = [one for one in responses if (one.group, one.index) not in cache]
    with Probe(model, aux_layers) as probe:
        for done, one in enumerate(missing, 1):
            tokens = (one.prompt + one.response)[:-1]
            logits = model(torch.tensor([tokens], device=model.embedding.device))[0]
            cache.append(one.group, one.index, probe.take(), logits.argmax(-1))
            progress(done, len(missing))
    cache.sync()
