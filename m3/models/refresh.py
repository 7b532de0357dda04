"""New weights for a model that is in use: written in place, by checkpoint name, all checked before the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from m3.models.decoder import Concat, Decoder, Experts, Mlp, Moe
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM, attention_parts, mlp_parts
from m3kernels.checks import refuse
from m3kernels.int4.quantize import quantize_weight

Write = Callable[[Tensor], None]
OP = "refresh_weights"


def refresh_weights(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, named as in a Hugging Face checkpoint, into the model, where they lie.

    A dense linear takes its weight; an INT4 linear is rounded anew, with its group size, symmetry, scale dtype. Names
    that are absent stay as they are, but the parts of an INT4 linear that was fused (q, k, v; gate, up) come together.
    Raises:
        ValueError: a name that the model does not have, or a shape; nothing is changed then.
    """
    places = dict(_places(model))
    fused = _fused(model)
    writes: list[tuple[Write, Tensor]] = []
    left = dict(tensors)
    for names, module in fused:
        got = [name for name in names if name in left]
        if not got or not isinstance(module, Int4Linear):
            continue
        if got != names:
            raise refuse(OP, got[0], f"all of {', '.join(names)}: one INT4 linear", f"{', '.join(got)}")
        whole = torch.cat([left.pop(name) for name in names])
        _check(names[0], whole, (module.out_features, module.in_features))
        writes.append((_packed_writer(module), whole))
    for name, value in left.items():
        if name not in places:
            raise refuse(OP, name, "the name of a tensor of this model", "none of that name")
        target = places[name]
        if isinstance(target, Int4Linear):
            _check(name, value, (target.out_features, target.in_features))
            writes.append((_packed_writer(target), value))
        else:
            _check(name, value, tuple(target.shape))
            writes.append((_writer(target), value))
    with torch.no_grad():
        for write, value in writes:
            write(value.detach())


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        raise refuse(OP, name, f"{shape} of floating point", value)


def _writer(target: Tensor) -> Write:
    def write(value: Tensor) -> None:
        target.copy_(value)

    return write


def _packed_writer(module: Int4Linear) -> Write:
    def write(value: Tensor) -> None:
        old = module.weight.int4
        new = quantize_weight(
            value.float(),
            group_size=old.group_size,
            symmetric=old.symmetric,
            method="weighted",
            scale_dtype=old.scales.dtype,
        )
        module.weight._hold(new.to(old.device))

    return write


def _fused(model: Decoder) -> list[tuple[list[str], nn.Module]]:
    """(names, module) of every linear that stands for several of the checkpoint."""
    found: list[tuple[list[str], nn.Module]] = []
    for index, layer in enumerate(model.blocks):
        prefix = LAYER.format(index)
        names = [f"{prefix}{name}.weight" for name, _ in attention_parts(model.config)]
        found.append((names, layer.attention.qkv))
        if isinstance(layer.mlp, Mlp):
            found.append(([f"{prefix}{name}.weight" for name, _ in mlp_parts(model.config)], layer.mlp.gate_up))
    return found


def _places(model: Decoder) -> list[tuple[str, Tensor | Int4Linear]]:
    """Name and tensor, or INT4 linear, of everything that can be written."""
    config = model.config
    found: list[tuple[str, Tensor | Int4Linear]] = [(EMBEDDING, model.embedding), (NORM, model.norm.weight)]

    def linear(name: str, module: nn.Module) -> None:
        if isinstance(module, Int4Linear):
            found.append((f"{name}.weight", module))
        elif isinstance(module, nn.Linear):
            found.append((f"{name}.weight", module.weight))
        if getattr(module, "bias", None) is not None:
            found.append((f"{name}.bias", module.bias))  # type: ignore[arg-type]

    def parts(prefix: str, pieces: list[tuple[str, int]], module: nn.Module) -> None:
        if isinstance(module, Concat):
            for (name, _), part in zip(pieces, module.parts, strict=True):
                linear(prefix + name, part)
            return
        first = 0
        for name, rows in pieces:
            if isinstance(module, nn.Linear):
                found.append((f"{prefix}{name}.weight", module.weight[first : first + rows]))
            if getattr(module, "bias", None) is not None:
                found.append((f"{prefix}{name}.bias", module.bias[first : first + rows]))  # type: ignore[index]
            first += rows

    if not (config.tie_word_embeddings and isinstance(model.head, nn.Linear)):
        linear(HEAD, model.head)
    for index, layer in enumerate(model.blocks):
        prefix, attention, mlp = LAYER.format(index), layer.attention, layer.mlp
        found.append((f"{prefix}input_layernorm.weight", layer.attention_norm.weight))
        found.append((f"{prefix}post_attention_layernorm.weight", layer.mlp_norm.weight))
        for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
            if norm is not None:
                found.append((f"{prefix}self_attn.{name}.weight", norm.weight))
        parts(prefix, attention_parts(config), attention.qkv)
        linear(f"{prefix}self_attn.o_proj", attention.o)
        if isinstance(mlp, Moe):
            linear(f"{prefix}mlp.gate", mlp.router)
            _experts(f"{prefix}mlp.experts.", mlp, found)
        else:
            parts(prefix, mlp_parts(config), mlp.gate_up)
            linear(f"{prefix}mlp.down_proj", mlp.down)
    return found


def _experts(prefix: str, mlp: Moe, found: list[tuple[str, Tensor | Int4Linear]]) -> None:
    experts = mlp.experts
    if isinstance(experts, Int4Experts):
        return  # packed as one stack; refused by name until they can be rounded one by one
    assert isinstance(experts, Experts)
    found.append((f"{prefix}gate_up_proj", experts.w13))
    found.append((f"{prefix}down_proj", experts.w2))
    for expert in range(len(experts.w13)):
        gate, up = experts.w13[expert].chunk(2)
        found += [(f"{prefix}{expert}.gate_proj.weight", gate), (f"{prefix}{expert}.up_proj.weight", up)]
        found.append((f"{prefix}{expert}.down_proj.weight", experts.w2[expert]))
