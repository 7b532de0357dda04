"""The tensors of a checkpoint to be quantised, a layer at a time, every one of them checked.

A missing or truncated file, a tensor that is missing or of another shape or dtype, and weights with NaN or inf are a
ValueError that names file and tensor; so is a model that is quantised already, or of an architecture that
m3.models.decoder does not know. All but NaN and inf shows before the first layer is read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from m3.checkpoint import FLOATS, Checkpoint
from m3.models.decoder import DecoderConfig
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM
from m3.quantize.block import Block
from m3kernels.checks import refuse

CHUNK = 1 << 24  # values looked at together for NaN and inf


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or inf, without a second tensor of this size."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(CHUNK))


class Shards:
    """An opened checkpoint folder.

    model: what its config.json says. outside: sorted names of the tensors of no layer (embedding, norm, head; layers
        beyond num_layers, which are those of a draft model). head: name of the output head's tensor, the embedding's
        where they are tied.
    Raises:
        ValueError: as the module says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.source = Checkpoint(folder)
        self.folder, self.config = self.source.folder, self.source.config
        if self.config.get("quantization_config") or self.config.get("compression_config"):
            raise refuse("quantize", str(self.folder), "a model that is not quantised yet", "a quantization_config")
        self.model = DecoderConfig.from_hf(self.config)
        self._layers: list[list[str]] = [[] for _ in range(self.model.num_layers)]
        prefixes = {LAYER.format(index): index for index in range(self.model.num_layers)}
        outside: list[str] = []
        for name in sorted(self.source.names):
            index = prefixes.get(".".join(name.split(".")[:3]) + ".")
            (outside if index is None else self._layers[index]).append(name)
        self.outside = tuple(outside)
        self.head = EMBEDDING if self.model.tie_word_embeddings else f"{HEAD}.weight"
        self._check()
        self.source.close()

    def _check(self) -> None:
        """Every tensor that the model needs is there and has its shape."""
        model = self.model
        for name in (EMBEDDING, self.head):
            self.source.get(name, (model.vocab_size, model.hidden_size), FLOATS)
        self.source.get(NORM, (model.hidden_size,), FLOATS)
        for index, names in enumerate(self._layers):
            prefix = LAYER.format(index)
            self.block(index, {name.removeprefix(prefix): self.source.outline(name) for name in names})

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def files(self) -> set[str]:
        """Names of the files that the tensors are in."""
        return {self.source.file_of(name) for name in self.source.names}

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        tensor = self.source.get(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            label = f"{self.source.file_of(name)}: {name}"
            raise refuse("checkpoint", label, "finite weights", f"{tensor.numel()} with NaN or inf among them")
        return tensor

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer as they are stored, named without its prefix."""
        prefix = LAYER.format(index)
        return {name.removeprefix(prefix): self.get(name) for name in self._layers[index]}

    def block(self, index: int, tensors: dict[str, Tensor]) -> Block:
        """The layer that ``layer`` gave the tensors of."""
        prefix = LAYER.format(index)
        try:
            return Block.from_tensors(self.model, tensors)
        except ValueError as error:
            name = prefix + str(error).split(": ")[1]
            raise ValueError(f"checkpoint: {self.source.file_of(name)}: {prefix}: {error}") from error

    def close(self) -> None:
        """Let go of the files; the next ``get`` opens its own again."""
        self.source.close()
