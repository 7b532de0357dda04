"""Modules in place of transformers' linears and experts: INT4, loaded and saved under the names of their checkpoint.

transformers fills the modules of a model by tensor name. So each module begins as empty tensors with the names, shapes
and dtypes of the file (``qweight``, ``scales`` and so on). ``pack`` turns what was loaded into the tiles
of m3kernels.int4 and lets go of the rest; ``state_dict`` writes the file's tensors again, bit for bit.

Experts are one tensor of three dimensions in transformers and a linear each in a quantised checkpoint; here they are
the checkpoint's linears until they are packed, then two stacks for ``int4_moe``. So transformers' ExpertsInterface,
which swaps functions over the dense tensors, has nothing to swap here; its description of an experts module tells
whether ``int4_moe`` computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3.models.int4_linear import PackedWeight, can_concat, concat_out
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, int4_gemm, int4_moe
from m3kernels.int4.convert import (
    AUTOROUND_FORMATS,
    from_autoround,
    from_compressed_tensors,
    to_awq,
    to_compressed_tensors,
    to_gptq,
)

Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name in a layer -> shape and dtype in the file
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Tiles(PackedWeight):
    """A PackedWeight without a state of its own: its owner writes and reads it in the checkpoint's form."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def read_weight(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Int4Weight:
    """The weight of a layer's tensors in the layout that ``settings`` name."""
    if settings["quant_method"] == "compressed-tensors":
        return from_compressed_tensors(**tensors, group_size=settings["group_size"])
    return from_autoround(tensors, settings)


def stored_tensors(weight: Int4Weight, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of read_weight."""
    method = settings["quant_method"]
    if method == "compressed-tensors":
        return to_compressed_tensors(weight)
    layout = AUTOROUND_FORMATS[settings["packing_format"]] if method == "auto-round" else method
    if layout == "awq":
        return to_awq(weight)
    version_2 = layout == "gptq_v2" or settings.get("checkpoint_format") == "gptq_v2"
    return to_gptq(weight, version=2 if version_2 else 1)


def unpacked(name: str, error: ValueError) -> ValueError:
    return ValueError(f"transformers: {name}: {error}")


class PackedLinear(nn.Module):
    """An INT4 linear of a transformers model.

    Args:
        name: in the checkpoint, for messages.
        stored: what the file has for this layer, its bias left out.
        settings: quantization_config with the layer's own entry merged in, as in read_weight.
        bias: (N,) or None, on any device.
        activations: mode of int4_gemm.
    """

    def __init__(
        self, name: str, stored: Stored, settings: Mapping[str, Any], bias: Tensor | None, *, activations: str
    ) -> None:
        super().__init__()
        self.name, self.stored, self.settings, self.activations = name, stored, settings, activations
        self.tiles: Tiles | None = None
        for key, (shape, dtype) in stored.items():
            self.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def read(self, tensors: Mapping[str, Tensor]) -> Int4Weight:
        try:
            return read_weight(tensors, self.settings)
        except ValueError as error:
            raise unpacked(self.name, error) from error

    def take(self) -> Int4Weight:
        """The weight that was loaded; its tensors in the file's form are let go."""
        int4 = self.read({key: self._buffers[key] for key in self.stored})  # type: ignore[misc]
        for key in self.stored:
            del self._buffers[key]
        return int4

    def pack(self) -> None:
        """From the file's tensors to tiles. Raises ValueError naming the layer if they are malformed or not there."""
        self.tiles = Tiles(self.take())

    @property
    def weight(self) -> PackedWeight:
        assert self.tiles is not None, "pack() comes first"
        return self.tiles

    def forward(self, x: Tensor) -> Tensor:
        return int4_gemm(x, self.weight.int4, self.bias, activations=self.activations)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is not None:
            save(self.tiles.int4, self, destination, prefix)

    def extra_repr(self) -> str:
        return f"activations={self.activations}"


def save(int4: Int4Weight, linear: PackedLinear, destination: dict[str, Any], prefix: str) -> None:
    """Put a weight's tensors into a state_dict, those that the layer's file had."""
    try:
        tensors = stored_tensors(int4, linear.settings)
    except ValueError as error:
        raise unpacked(linear.name, error) from error
    for key, (_, dtype) in linear.stored.items():
        destination[prefix + key] = tensors[key].to(dtype)


class PackedExperts(nn.Module):
    """The INT4 experts of a transformers model, called as its own are.

    Args:
        linears: of each expert, its EXPERT_LINEARS by name.
        activations: mode of int4_moe.
    """

    def __init__(self, linears: list[dict[str, PackedLinear]], *, activations: str) -> None:
        super().__init__()
        self.linears, self.activations = linears, activations
        self.w13: Tiles | None = None
        self.w2: Tiles | None = None
        for index, expert in enumerate(linears):
            self.add_module(str(index), nn.ModuleDict(expert))

    def pack(self) -> None:
        """As PackedLinear.pack; also refuses experts that do not share group size, symmetry and order."""
        pairs, downs = [], []
        for index, expert in enumerate(self.linears):
            gate, up, down = (expert[name].take() for name in EXPERT_LINEARS)
            if not can_concat([gate, up]):
                raise refuse("transformers", expert["up_proj"].name, f"the form of gate_proj, {gate!r}", f"{up!r}")
            pairs.append(concat_out([gate, up]))
            downs.append(down)
            del self._modules[str(index)]
        try:
            self.w13, self.w2 = Tiles(Int4Weight.stack(pairs)), Tiles(Int4Weight.stack(downs))
        except ValueError as error:
            raise unpacked(self.linears[0]["gate_proj"].name, error) from error

    def forward(
        self,
        hidden_states: Tensor,  # (T, D)
        top_k_index: Tensor,  # (T, k)
        top_k_weights: Tensor,  # (T, k)
    ) -> Tensor:
        assert self.w13 is not None and self.w2 is not None, "pack() comes first"
        w13, w2 = self.w13.int4, self.w2.int4
        return int4_moe(hidden_states, w13, w2, top_k_index, top_k_weights, activations=self.activations)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.w13 is None or self.w2 is None:
            return
        inner = self.w2.int4.in_features
        for index, expert in enumerate(self.linears):
            pair, down = self.w13.int4.expert(index), self.w2.int4.expert(index)
            parts = (pair.slice_out(0, inner), pair.slice_out(inner, 2 * inner), down)
            for name, int4 in zip(EXPERT_LINEARS, parts, strict=True):
                save(int4, expert[name], destination, f"{prefix}{index}.{name}.")

    def extra_repr(self) -> str:
        return f"activations={self.activations}"


def check_experts(name: str, module: nn.Module) -> None:
    """Raises ValueError unless ``int4_moe`` computes what this experts module of transformers does."""
    facts = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    found = {fact: getattr(module, fact, None) for fact in facts}
    function = type(getattr(module, "act_fn", None)).__name__
    if found != facts or function not in ("SiLU", "SiLUActivation"):
        raise refuse("transformers", name, f"experts with {facts} and SiLU", f"{found} and {function}")
