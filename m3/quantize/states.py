"""Hidden states of sequences between two layers, in a file: written from the first to the last, read by memory map.

fp32 rows, one after another. They are written through the file, not the map: on a full disk that is an OSError, where a
write to mapped memory kills the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3kernels.checks import refuse

ROW_BYTES = 4  # of one value


class States(Sequence[Tensor]):
    """S sequences (L_s, D) of a finished file; each is a view of it.

    Raises ValueError: the file has another size.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self.path, self.lengths, self.width = path, tuple(lengths), width
        self._starts = np.cumsum([0, *lengths]).tolist()
        rows = self._starts[-1]
        size = path.stat().st_size if path.is_file() else 0
        if size != rows * width * ROW_BYTES:
            raise refuse("states", str(path), f"{rows * width * ROW_BYTES} bytes", f"{size}")
        self._rows = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=(rows, width)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._rows[self._starts[index] : self._starts[index + 1]]


def write_states(path: Path, sequences: Iterable[Tensor]) -> None:
    """The file at ``path``, whole and on the disk, or not there at all. Raises OSError, of a full disk for one."""
    part = path.with_suffix(".tmp")
    try:
        with part.open("wb") as file:
            for rows in sequences:
                file.write(rows.detach().float().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    part.replace(path)


def gathered(parts: Iterable[Tensor], width: int, path: Path | None) -> Tensor:
    """Parts (t, D) of T rows as one (T, D) fp32: in memory, or mapped from a file at ``path`` that is written of them.

    What is mapped is read from the file when it is used, and the system may let go of it again.
    """
    if path is None:
        return torch.cat(list(parts))
    write_states(path, parts)
    return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c")).view(-1, width)
