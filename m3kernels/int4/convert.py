"""Between checkpoint formats and Int4Weight, bitwise reversible: GPTQ, AWQ, compressed-tensors, AutoRound.

    format              qweight                    zero stored   scales   nibble i of a word
    GPTQ v1             (K/8, N), packed along K   z - 1         (G, N)   k = 8 word + i
    GPTQ v2             (K/8, N), packed along K   z             (G, N)   k = 8 word + i
    AWQ                 (K, N/8), packed along N   z             (G, N)   n = 8 word + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    compressed-tensors  (N, K/8), packed along K   z             (N, G)   k = 8 word + i

G = ceil(K / group_size): the last group may be partial. What a format cannot hold is refused on the way out. GPTQ v1
reads a stored 15 as z = 16, as the kernels of vLLM, ExLlama and AutoRound do (unmasked ``+ 1``); z = 0 has no v1 form.
Readers that add 1 to whole words (gptqmodel) agree unless a stored nibble is 15. compressed-tensors calls its nibbles
signed (q - 8, z - 8), but packs them with the 8 added back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import has_data, refuse
from m3kernels.dispatch import offered
from m3kernels.int4.types import (
    SCALE_DTYPES,
    SYMMETRIC_ZERO,
    Int4Weight,
    ceil_div,
    check_group_size,
    check_perm,
    num_groups,
    pack_groups,
    pack_nibbles,
)

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # column, among the 8 of a word, of nibble i
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of column i: the inverse
AUTOROUND_FORMATS = {  # packing_format -> what it is here
    "auto_round:auto_gptq": "gptq_v1",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}
WORDS = (torch.int32,)
INDICES = (torch.int32, torch.int64)


# -- words and nibbles ------------------------------------------------------------------------------------------------
def words_to_nibbles(words: Tensor) -> Tensor:
    """(R, C) int32 -> (R, 8 C) uint8 in 0..15, lowest nibble first."""
    data = words.clone(memory_format=torch.contiguous_format).view(
        torch.uint8
    )  # contiguous() keeps odd strides of (R, 1)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def nibbles_to_words(nibbles: Tensor) -> Tensor:
    """(R, C) uint8 in 0..15 -> (R, ceil(C/8)) int32, lowest nibble first; missing nibbles are 0."""
    rows, columns = nibbles.shape
    pairs = torch.nn.functional.pad(nibbles, (0, -columns % 8)).reshape(rows, -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def nibbles_of_pairs(words: Tensor) -> Tensor:
    """(R, C) int32 of the AWQ order -> (R, 8 C) uint8."""
    return words_to_nibbles(words).unflatten(1, (-1, 8))[..., AWQ_NIBBLES].flatten(1)


def weight_of_words(
    words: Tensor,
    layout: str,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    in_features: int,
    group_size: int,
    perm: Tensor | None = None,
) -> Int4Weight:
    """The Int4Weight of checked tensors: words as they are in a file, scales and zeros (N, G), perm from stored_order.

    ``layout`` says where W[n, k] is: "rows": (N, K/8) words along k; "columns": (K/8, N); "pairs": (K, N/8) in AWQ's
    order. Where the CUDA room takes the words, they become tiles in one pass; the bits are the same.
    """
    n, k = len(scales), in_features
    if native := offered(__package__, "pack_tiles", words):
        tiles = native(words, layout, n, k, perm)
    else:
        q = {
            "rows": lambda: words_to_nibbles(words)[:, :k],
            "columns": lambda: words_to_nibbles(words.T),
            "pairs": lambda: nibbles_of_pairs(words).T,
        }[layout]()
        tiles = pack_nibbles(q if perm is None else q.index_select(1, perm.long()))
    return Int4Weight(
        qweight=tiles,
        scales=pack_groups(scales),
        zeros=None if zeros is None else pack_groups(zeros),
        perm=perm,
        out_features=n,
        in_features=k,
        group_size=group_size,
    )


# -- checks -----------------------------------------------------------------------------------------------------------
def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Tensor:
    """value, or ValueError unless it is a strided tensor of this shape (a string stands for any size above 0)."""
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    good = len(sizes) == len(shape) and all(
        size > 0 if isinstance(want, str) else size == want for size, want in zip(sizes, shape, strict=True)
    )
    if good and has_data(value) and value.dtype in dtypes and value.device == device:
        return value.detach()
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    raise refuse(op, name, f"{wanted} {names}, strided, on {device}", value)


def device_of(op: str, name: str, value: object) -> torch.device:
    if not isinstance(value, Tensor):
        raise refuse(op, name, "a tensor", value)
    return value.device


def first_index(bad: Tensor) -> str:
    """Where the first True is, as [i, j]."""
    return str(bad.nonzero()[0].tolist())


def check_finite(op: str, name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value)
    if bad.any():
        raise refuse(op, name, "finite values", f"{float(value[bad][0])} at {first_index(bad)}")


def check_version(op: str, version: object) -> None:
    if type(version) is not int or version not in (1, 2):
        raise refuse(op, "version", "1 or 2", version)


def check_symmetric(op: str, name: str, symmetric: object, zeros: Tensor) -> Tensor | None:
    """The zeros to store: None if the weight is symmetric, as said, or as seen where nothing was said."""
    if symmetric is not None and not isinstance(symmetric, bool):
        raise refuse(op, "symmetric", "True, False or None", symmetric)
    if symmetric is False:
        return zeros
    other = zeros != SYMMETRIC_ZERO
    if not other.any():
        return None
    if symmetric:
        raise refuse(op, name, "zero points of 8 (symmetric=True)", f"{int(zeros[other][0])} at {first_index(other)}")
    return zeros


def stored_order(op: str, name: str, g_idx: Tensor, group_size: int, groups: int) -> Tensor | None:
    """The act-order permutation that sorts g_idx (stable), None if it is sorted.

    Raises ValueError unless 0 <= g_idx < groups and sorting gives k // group_size: whole groups, the last one partial.
    """
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        raise refuse(op, name, f"values in 0..{groups - 1}", f"{int(g_idx[outside][0])} at {first_index(outside)}")
    columns = torch.arange(len(g_idx), device=g_idx.device)
    want = torch.zeros_like(columns) if group_size == -1 else columns // group_size
    in_order, perm = g_idx.long().sort(stable=True)
    if not torch.equal(in_order, want):
        group = int(in_order[in_order != want][0])
        count = int((g_idx == group).sum())
        whole = f"{group_size} columns in every group (the last of {groups} may have fewer)"
        raise refuse(op, name, whole, f"{count} in group {group}")
    return None if torch.equal(perm, columns) else perm.to(torch.int32)


def check_export(op: str, weight: object, zeros: range, *, n_of: int = 1, k_of: int = 1, act_order: bool) -> Int4Weight:
    """weight, or ValueError if the format cannot hold it."""
    if not isinstance(weight, Int4Weight) or weight.num_experts is not None:
        want = "a plain Int4Weight (export the experts of a stack one by one)"
        raise refuse(op, "weight", want, repr(weight) if isinstance(weight, Int4Weight) else weight)
    if weight.qweight.is_meta:
        raise refuse(op, "weight", "a weight with data", weight.qweight)
    if weight.perm is not None:
        check_perm(op, weight.perm, tuple(weight.perm.shape))
    if weight.out_features % n_of:
        raise refuse(op, "weight", f"out_features a multiple of {n_of}", weight.out_features)
    if weight.in_features % k_of:
        raise refuse(op, "weight", f"in_features a multiple of {k_of}", weight.in_features)
    if weight.group_size != -1 and weight.first_k % weight.group_size:
        want = f"a weight that starts at a group (first_k a multiple of {weight.group_size})"
        raise refuse(op, "weight", want, f"first_k {weight.first_k}")
    if weight.perm is not None and not act_order:
        raise refuse(op, "weight", "no act-order: the format has no g_idx", "an act-order weight")
    points = weight.unpack()[2]
    outside = (points < zeros.start) | (points >= zeros.stop)
    if outside.any():
        want = f"zero points in {zeros.start}..{zeros.stop - 1}, which the format can hold"
        raise refuse(op, "weight", want, f"{int(points[outside][0])} at [n, group] = {first_index(outside)}")
    return weight


def original_order(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """(q (N, K) uint8 in the order of the inputs, g_idx (K,) int32)."""
    q, g_idx = weight.unpack()[0], weight.group_index().to(torch.int32)
    if weight.perm is None:
        return q, g_idx
    perm = weight.perm.long()
    return torch.empty_like(q).index_copy_(1, perm, q), torch.empty_like(g_idx).index_copy_(0, perm, g_idx)


# -- GPTQ -------------------------------------------------------------------------------------------------------------
def from_gptq(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor | None = None,
    *,
    group_size: int,
    version: int = 1,
    symmetric: bool | None = None,
) -> Int4Weight:
    """The Int4Weight of a GPTQ linear layer (AutoGPTQ, gptqmodel, AutoRound); to_gptq gives the same tensors back.

    Args:
        qweight: (K/8, N) int32. scales: (G, N) fp16, bf16 or fp32, finite. qzeros: (G, N/8) int32.
        g_idx: (K,) int32 or int64, the group of each column; None means k // group_size. Out of order (desc_act), its
            stable sort becomes the stored permutation.
        group_size: -1 or a multiple of 16; K need not be a multiple of it.
        version: 1 stores zero - 1 ("gptq"), 2 stores zero ("gptq_v2").
        symmetric: True demands zero points of 8, False keeps them, None drops them if all are 8.
    Raises:
        ValueError: a tensor or number out of contract; names it, what was wanted, what came.
    """
    op = "from_gptq"
    check_group_size(op, group_size)
    check_version(op, version)
    device = device_of(op, "qweight", qweight)
    qweight = check_tensor(op, "qweight", qweight, ("K/8", "N"), WORDS, device)
    k, n = 8 * qweight.shape[0], qweight.shape[1]
    if n % 8:
        raise refuse(op, "qweight", "(K/8, N) with N a multiple of 8", qweight)
    groups = num_groups(k, group_size)
    scales = check_tensor(op, "scales", scales, (groups, n), SCALE_DTYPES, device)
    qzeros = check_tensor(op, "qzeros", qzeros, (groups, n // 8), WORDS, device)
    perm = None
    if g_idx is not None:
        g_idx = check_tensor(op, "g_idx", g_idx, (k,), INDICES, device)
        perm = stored_order(op, "g_idx", g_idx, group_size, groups)
    check_finite(op, "scales", scales)
    zeros = words_to_nibbles(qzeros) + (1 if version == 1 else 0)
    points = check_symmetric(op, "qzeros", symmetric, zeros)
    points = None if points is None else points.T
    return weight_of_words(qweight, "columns", scales.T, points, in_features=k, group_size=group_size, perm=perm)


def to_gptq(weight: Int4Weight, *, version: int = 1) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of a plain weight, named, laid out and offset as in from_gptq.

    Raises:
        ValueError: N or K not a multiple of 8, a K slice that starts inside a group, or a zero point that the version
            cannot store (v1: 1..16, v2: 0..15).
    """
    op = "to_gptq"
    check_version(op, version)
    weight = check_export(op, weight, range(1, 17) if version == 1 else range(16), n_of=8, k_of=8, act_order=True)
    _, scales, zeros = weight.unpack()
    q, g_idx = original_order(weight)
    return {
        "qweight": nibbles_to_words(q).T.contiguous(),
        "qzeros": nibbles_to_words((zeros - (1 if version == 1 else 0)).T),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx,
    }


# -- AWQ --------------------------------------------------------------------------------------------------------------
def from_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int, symmetric: bool | None = None
) -> Int4Weight:
    """The Int4Weight of an AWQ "gemm" linear layer; to_awq gives the same tensors back.

    Args:
        qweight: (K, N/8) int32. qzeros: (G, N/8) int32. scales: (G, N) fp16, bf16 or fp32, finite.
        group_size, symmetric: as in from_gptq.
    Raises:
        ValueError: a tensor or number out of contract; names it, what was wanted, what came.
    """
    op = "from_awq"
    check_group_size(op, group_size)
    device = device_of(op, "qweight", qweight)
    qweight = check_tensor(op, "qweight", qweight, ("K", "N/8"), WORDS, device)
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    groups = num_groups(k, group_size)
    qzeros = check_tensor(op, "qzeros", qzeros, (groups, n // 8), WORDS, device)
    scales = check_tensor(op, "scales", scales, (groups, n), SCALE_DTYPES, device)
    check_finite(op, "scales", scales)
    points = check_symmetric(op, "qzeros", symmetric, nibbles_of_pairs(qzeros))
    points = None if points is None else points.T
    return weight_of_words(qweight, "pairs", scales.T, points, in_features=k, group_size=group_size)


def to_awq(weight: Int4Weight) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a plain weight, laid out as in from_awq.

    Raises:
        ValueError: N not a multiple of 8, act-order, a K slice that starts inside a group, or a zero point of 16.
    """
    weight = check_export("to_awq", weight, range(16), n_of=8, act_order=False)
    q, scales, zeros = weight.unpack()
    qweight, qzeros = (
        nibbles_to_words(values.T.unflatten(1, (-1, 8))[..., AWQ_COLUMNS].flatten(1)) for values in (q, zeros)
    )
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous()}


# -- compressed-tensors -----------------------------------------------------------------------------------------------
def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    group_size: int,
) -> Int4Weight:
    """The Int4Weight of a "pack-quantized" linear layer of 4 bits; to_compressed_tensors gives the same tensors back.

    Args:
        weight_packed: (N, ceil(K/8)) int32. weight_scale: (N, G) fp16, bf16 or fp32, finite.
        weight_shape: (2,) int64 or int32, N and K.
        weight_zero_point: (ceil(N/8), G) int32, packed along N; None means symmetric.
        weight_g_idx: (K,) int32 or int64, as g_idx in from_gptq.
        group_size: -1 for strategy "channel", else a multiple of 16.
    Raises:
        ValueError: a tensor or number out of contract; names it, what was wanted, what came.
    """
    op = "from_compressed_tensors"
    check_group_size(op, group_size)
    device = device_of(op, "weight_packed", weight_packed)
    weight_packed = check_tensor(op, "weight_packed", weight_packed, ("N", "K/8"), WORDS, device)
    weight_shape = check_tensor(
        op, "weight_shape", weight_shape, (2,), INDICES, device_of(op, "weight_shape", weight_shape)
    )
    n, k = weight_shape.tolist()
    if n < 1 or k < 1 or tuple(weight_packed.shape) != (n, ceil_div(k, 8)):
        raise refuse(
            op, "weight_shape", "N, K with weight_packed (N, ceil(K/8))", f"{[n, k]} for {tuple(weight_packed.shape)}"
        )
    groups = num_groups(k, group_size)
    weight_scale = check_tensor(op, "weight_scale", weight_scale, (n, groups), SCALE_DTYPES, device)
    check_finite(op, "weight_scale", weight_scale)
    zeros, perm = None, None
    if weight_zero_point is not None:
        weight_zero_point = check_tensor(
            op, "weight_zero_point", weight_zero_point, (ceil_div(n, 8), groups), WORDS, device
        )
        zeros = words_to_nibbles(weight_zero_point.T)[:, :n].T
    if weight_g_idx is not None:
        weight_g_idx = check_tensor(op, "weight_g_idx", weight_g_idx, (k,), INDICES, device)
        perm = stored_order(op, "weight_g_idx", weight_g_idx, group_size, groups)
    return weight_of_words(weight_packed, "rows", weight_scale, zeros, in_features=k, group_size=group_size, perm=perm)


def to_compressed_tensors(weight: Int4Weight) -> dict[str, Tensor]:
    """weight_packed, weight_scale, weight_shape; weight_zero_point if asymmetric, weight_g_idx if not k // group_size.

    Raises:
        ValueError: a stack, a K slice that starts inside a group, or a zero point of 16.
    """
    weight = check_export("to_compressed_tensors", weight, range(16), act_order=True)
    _, scales, zeros = weight.unpack()
    q, g_idx = original_order(weight)
    tensors = {
        "weight_packed": nibbles_to_words(q),
        "weight_scale": scales,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = nibbles_to_words(zeros.T).T.contiguous()
    if not torch.equal(g_idx, weight.group_index().to(torch.int32)):
        tensors["weight_g_idx"] = g_idx
    return tensors


# -- AutoRound --------------------------------------------------------------------------------------------------------
def from_autoround(tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Int4Weight:
    """The Int4Weight of one linear layer that AutoRound exported, whichever of its formats it is in.

    Args:
        tensors: qweight, qzeros, scales and, if there is one, g_idx of the layer.
        quantization_config: of the checkpoint, with the layer's own entry of ``extra_config`` merged in. Read are bits,
            data_type, act_bits, group_size, sym (AWQ: or zero_point), quant_method, packing_format, checkpoint_format.
    Raises:
        ValueError: a format other than 4-bit integer weights in GPTQ or AWQ layout, a missing tensor, or what from_gptq
            and from_awq refuse.
    """
    op = "from_autoround"
    for name, mapping in (("tensors", tensors), ("quantization_config", quantization_config)):
        if not isinstance(mapping, Mapping):
            raise refuse(op, name, "a mapping", mapping)
    config = quantization_config

    def want(key: str, allowed: tuple[object, ...]) -> None:
        value = config.get(key)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise refuse(op, f"quantization_config[{key!r}]", " or ".join(map(repr, allowed)), value)

    want("bits", (4,))
    want("data_type", ("int", None))
    want("act_bits", (None, 16, 32))
    want("quant_method", ("auto-round", "gptq", "awq"))
    layout = {"awq": "awq", "gptq": "gptq_v1"}.get(config["quant_method"])
    if config["quant_method"] == "gptq":
        want("checkpoint_format", (None, "gptq", "gptq_v2"))
        layout = "gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq_v1"
    elif layout is None:
        want("packing_format", tuple(AUTOROUND_FORMATS))
        layout = AUTOROUND_FORMATS[config["packing_format"]]
    if layout == "awq" and "sym" not in config:
        want("zero_point", (True, False))
        symmetric = not config["zero_point"]
    else:
        want("sym", (True, False))
        symmetric = config["sym"]
    for name in ("qweight", "qzeros", "scales"):
        if not isinstance(tensors.get(name), Tensor):
            raise refuse(op, name, "a tensor", tensors.get(name))
    group_size = config.get("group_size")
    check_group_size(op, group_size)
    names = {"qweight": tensors["qweight"], "qzeros": tensors["qzeros"], "scales": tensors["scales"]}
    if layout == "awq":
        if tensors.get("g_idx") is not None:
            raise refuse(op, "g_idx", "no g_idx: AWQ has no act-order", tensors["g_idx"])
        return from_awq(**names, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    version = 2 if layout == "gptq_v2" else 1
    return from_gptq(
        **names,
        g_idx=tensors.get("g_idx"),
        group_size=group_size,  # type: ignore[arg-type]
        version=version,
        symmetric=symmetric,
    )
