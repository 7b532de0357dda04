"""New weights for a model that is in use: written in place, by checkpoint name, all checked before the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from m3.models.decoder import Concat, Decoder, Experts, Mlp, Moe
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear, PackedWeight
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM, attention_parts, mlp_parts
from m3kernels.checks import refuse
from m3kernels.int4.quantize import quantize_weight

Shape = tuple[int, ...]
OP = "refresh_weights"


def refresh_weights(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, named as in a Hugging Face checkpoint, into the model, where they lie.

    A dense linear takes its weight; an INT4 weight is rounded anew, with its group size, symmetry, scale dtype. Names
    that are absent stay as they are, but the parts of one INT4 weight (q, k, v; gate, up; experts) come together. Where
    head and embedding are tied, either name stands for both.
    Raises:
        ValueError: a name that the model does not have, a shape, what cannot be rounded; nothing is changed then.
    """
    places = dict(_places(model))
    left = dict(tensors)
    head = f"{HEAD}.weight"
    if model.config.tie_word_embeddings:
        if head in left:
            value = left.pop(head)
            _check(head, value, tuple(model.embedding.shape))
            if left.setdefault(EMBEDDING, value) is not value and not torch.equal(left[EMBEDDING], value):
                raise refuse(OP, head, f"the values of {EMBEDDING}, to which it is tied", "others")
        if EMBEDDING in left and isinstance(model.head, Int4Linear):
            left[head] = left[EMBEDDING]
    writes: list[Callable[[], object]] = []
    for parts, packed in _packed(model):
        got = [name for name in parts if name in left]
        if not got:
            continue
        if len(got) < len(parts):
            raise refuse(OP, got[0], f"all of {', '.join(parts)}: one INT4 weight"[:300], f"{', '.join(got)}"[:200])
        for name, shape in parts.items():
            _check(name, left[name], shape)
        writes.append(_round(packed, torch.cat([left.pop(name).detach() for name in parts])))
    for name, value in left.items():
        if name not in places:
            raise refuse(OP, name, "the name of a tensor of this model", "none of that name")
        _check(name, value, tuple(places[name].shape))
        writes.append(partial(places[name].copy_, value.detach()))
    with torch.no_grad():
        for write in writes:
            write()


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        raise refuse(OP, name, f"{shape} of floating point", value)


def _round(packed: PackedWeight, value: Tensor) -> Callable[[], object]:
    """Rounds now, so that what cannot be rounded is refused before anything is written."""
    old = packed.int4
    experts = () if old.num_experts is None else (old.num_experts,)
    new = quantize_weight(
        value.float().view(*experts, old.out_features, old.in_features),
        group_size=old.group_size,
        symmetric=old.symmetric,
        method="weighted",
        scale_dtype=old.scales.dtype,
    )
    return partial(packed._hold, new.to(old.device))


def _packed(model: Decoder) -> list[tuple[dict[str, Shape], PackedWeight]]:
    """Every INT4 weight, with the names and shapes of the checkpoint's tensors that it is made of, in order."""
    config = model.config
    found: list[tuple[dict[str, Shape], PackedWeight]] = []

    def linear(prefix: str, pieces: list[tuple[str, int]], module: nn.Module) -> None:
        if isinstance(module, Concat):
            for piece, part in zip(pieces, module.parts, strict=True):
                linear(prefix, [piece], part)
        elif isinstance(module, Int4Linear):
            found.append(
                ({f"{prefix}{name}.weight": (rows, module.in_features) for name, rows in pieces}, module.weight)
            )

    linear("", [(HEAD, config.vocab_size)], model.head)
    for index, layer in enumerate(model.blocks):
        prefix, mlp = LAYER.format(index), layer.mlp
        linear(prefix, attention_parts(config), layer.attention.qkv)
        linear(prefix, [("self_attn.o_proj", config.hidden_size)], layer.attention.o)
        if isinstance(mlp, Mlp):
            linear(prefix, mlp_parts(config), mlp.gate_up)
            linear(prefix, [("mlp.down_proj", config.hidden_size)], mlp.down)
            continue
        linear(prefix, [("mlp.gate", config.num_experts)], mlp.router)
        if isinstance(mlp.experts, Int4Experts):
            found += _packed_experts(f"{prefix}mlp.experts.", mlp.experts, config.hidden_size)
    return found


def _packed_experts(prefix: str, experts: Int4Experts, hidden: int) -> list[tuple[dict[str, Shape], PackedWeight]]:
    """As one tensor for all experts, and as one for each."""
    count, inner = experts.num_experts, experts.w2.int4.in_features
    pairs = {
        f"{prefix}{expert}.{name}_proj.weight": (inner, hidden) for expert in range(count) for name in ("gate", "up")
    }
    downs = {f"{prefix}{expert}.down_proj.weight": (hidden, inner) for expert in range(count)}
    return [
        ({f"{prefix}gate_up_proj": (count, 2 * inner, hidden)}, experts.w13),
        ({f"{prefix}down_proj": (count, hidden, inner)}, experts.w2),
        (dict(pairs), experts.w13),
        (dict(downs), experts.w2),
    ]


def _places(model: Decoder) -> list[tuple[str, Tensor]]:
    """Name and tensor of everything that is not INT4."""
    config = model.config
    found: list[tuple[str, Tensor]] = [(EMBEDDING, model.embedding), (NORM, model.norm.weight)]

    def linear(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
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


def _experts(prefix: str, mlp: Moe, found: list[tuple[str, Tensor]]) -> None:
    experts = mlp.experts
    if not isinstance(experts, Experts):
        return
    found.append((f"{prefix}gate_up_proj", experts.w13))
    found.append((f"{prefix}down_proj", experts.w2))
    for expert in range(len(experts.w13)):
        gate, up = experts.w13[expert].chunk(2)
        found += [(f"{prefix}{expert}.gate_proj.weight", gate), (f"{prefix}{expert}.up_proj.weight", up)]
        found.append((f"{prefix}{expert}.down_proj.weight", experts.w2[expert]))
