"""Layers of tiny random models as Blocks, for the tests of quantisation."""

from __future__ import annotations

import torch
from tiny_models import make_checkpoint

from m3.checkpoint import Checkpoint
from m3.models.decoder import DecoderConfig
from m3.models.loader import LAYER
from m3.quantize.block import Block


def tensors_of(folder, layer):
    """(config, the tensors of a layer by their names without the prefix) of a checkpoint."""
    source, prefix = Checkpoint(folder), LAYER.format(layer)
    names = [name.removeprefix(prefix) for name in source.names if name.startswith(prefix)]
    return DecoderConfig.from_hf(source.config), {name: source.get(prefix + name) for name in names}


def layer_of(folder, family, layer=0):
    """A layer of a tiny random model that is made in ``folder``."""
    make_checkpoint(folder, family)
    return Block.from_tensors(*tensors_of(folder, layer))


def tokens_of(sequences, length, width=64):
    """(S, L, D) hidden states whose features are correlated, as those of a model are."""
    mix = torch.randn(width, width) / width**0.5 + 0.5 * torch.randn(width)
    return torch.randn(sequences, length, width) @ mix
