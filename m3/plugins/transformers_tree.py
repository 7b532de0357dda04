"""An attention function for transformers, ``attn_implementation="m3_tree"``: trees of tokens in one forward pass.

    import m3.plugins.transformers_tree

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="m3_tree")
    cache = model(prompt).past_key_values
    out = model(nodes, position_ids=positions, past_key_values=cache, tree_mask=tree.mask_bits)
    keep_path(cache, prefix, verified.accept_index[:, : length + 1])

``generate`` and plain calls work as with any other function: without ``tree_mask`` attention is causal. transformers
hands what it does not know among a model's arguments on to the attention function, so no model is changed. The kernel
is ``m3kernels.spec_decode.tree_attention``, paged: here a request is one page, or a page a key where keys are padding.
For inference: it refuses tensors that need a gradient. Tested with transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer

from m3kernels.checks import refuse
from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.types import BITS

NAME = "m3_tree"
UNSERVED = ("softcap", "s_aux", "head_mask", "cu_seq_lens_q", "position_bias")  # they change what attention computes


def tree_bits(mask: Tensor) -> Tensor:
    """(..., M) bool -> (..., ceil(M / 32)) int32: bit j % 32 of word j // 32 is mask[j], as tree_attention reads it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise refuse("tree_bits", "mask", "(..., M) bool", mask)
    bits = pad(mask, (0, -mask.shape[-1] % BITS)).unflatten(-1, (-1, BITS)).long()
    words = (bits << torch.arange(BITS, device=mask.device)).sum(-1)
    return torch.where(words >= 1 << (BITS - 1), words - (1 << BITS), words).to(torch.int32)


def attention(
    module: nn.Module,
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, G, S, D)
    value: Tensor,  # (B, G, S, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """((B, N, H, D), None), as transformers wants it.

    Args:
        attention_mask: (B, S), 0 where a key is padding; None: none is. Queries that are padding give zeros.
        tree_mask: what each query sees of the tree, itself and its ancestors, everything before the tree being seen:
            (B, N, W) int32 bits of the N queries (Tree.mask_bits), or (B, N, M) bool over the last M >= N keys, which
            are the tree so far. A node comes after its parent. Every layer packs bools again: see tree_bits.
    Raises:
        ValueError: an argument that asks for other attention than this; a gradient; what tree_attention refuses.
    """
    check_served(module, dropout, kwargs)
    batch, _, count, _ = query.shape
    check_unpacked(tree_mask, attention_mask, position_ids, same=count == key.shape[2] and count > 1)
    bits, tree_size = read_tree(tree_mask, batch, count)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    options: dict[str, Any] = {"softmax_scale": scaling, "window": sliding_window or 0}
    rows = torch.arange(batch, device=q.device, dtype=torch.int32)
    if attention_mask is None:
        lens = torch.full_like(rows, k.shape[1])
        tree_lens = None if bits is None else torch.full_like(rows, tree_size)
        found = tree_attention(q, k, v, rows[:, None], lens, mask_bits=bits, tree_lens=tree_lens, **options)
        return found, None
    return padded(q, k, v, attention_mask.bool(), bits, tree_size, options), None


def padded(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, bits: Tensor | None, tree_size: int, options: dict[str, Any]
) -> Tensor:
    """Attention where some keys are padding: a page a key, and only the queries that are none."""
    batch, count, keys = *q.shape[:2], k.shape[1]
    if kept.shape != (batch, keys):
        raise refuse(NAME, "attention_mask", f"({batch}, {keys})", kept)
    if bits is not None and not kept[:, keys - tree_size :].all():
        raise refuse(NAME, "attention_mask", f"no padding in the tree, the last {tree_size} keys", "some")
    lens = kept.sum(1, dtype=torch.int32)
    first = torch.arange(batch, device=q.device)[:, None] * keys
    slots = kept.logical_not().sort(dim=1, stable=True).indices  # the kept ones first, in their order
    asked = kept[:, keys - count :]
    bounds = pad(asked.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    tree_lens = None if bits is None else torch.full_like(lens, tree_size)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    out[asked] = tree_attention(
        q[asked],
        k.reshape(batch * keys, 1, *k.shape[2:]),
        v.reshape(batch * keys, 1, *v.shape[2:]),
        (first + slots).to(torch.int32),
        lens,
        cu_seqlens_q=bounds,
        mask_bits=None if bits is None else bits[asked],
        tree_lens=tree_lens,
        **options,
    )
    return out


def read_tree(tree_mask: Tensor | None, batch: int, count: int) -> tuple[Tensor | None, int]:
    """(bits (B, N, W), keys of the tree)."""
    if tree_mask is None:
        return None, 0
    good = isinstance(tree_mask, Tensor) and tree_mask.ndim == 3 and tree_mask.shape[:2] == (batch, count)
    if good and tree_mask.dtype == torch.int32 and tree_mask.shape[2] * BITS >= count:
        return tree_mask, count
    if good and tree_mask.dtype == torch.bool and tree_mask.shape[2] >= count:
        return tree_bits(tree_mask), tree_mask.shape[2]
    want = f"({batch}, {count}, W) int32, 32 W at least {count}, or ({batch}, {count}, M) bool, M at least {count}"
    raise refuse(NAME, "tree_mask", want, tree_mask)


def check_served(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise refuse(NAME, "is_causal", "True", "False")
    if dropout:
        raise refuse(NAME, "dropout", "0: this attention is for inference", f"{dropout}")
    for name in UNSERVED:
        if others.get(name) is not None:
            raise refuse(NAME, name, "None", others[name])


def check_unpacked(
    tree_mask: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, *, same: bool
) -> None:
    """Raises ValueError on several sequences behind one another, which transformers tells by their positions alone."""
    if tree_mask is not None or attention_mask is not None or position_ids is None or not same:
        return
    if not bool((position_ids.diff() == 1).all()):
        raise refuse(NAME, "position_ids", "one sequence a row, or a tree with its tree_mask", position_ids.tolist())


def padding(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers hands to ``attention``: (B, S), or None where no key is padding."""
    if use_vmap:
        raise refuse(NAME, "mask", "causal attention, or a tree_mask", "a mask function of the model's own")
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise refuse(NAME, "past_key_values", "a cache that grows (DynamicCache)", f"one of {kv_length} slots")
    if attention_mask is None or bool(attention_mask[:, -kv_length:].all()):
        return None
    return attention_mask[:, -kv_length:]


def keep_path(cache: Cache, prefix: int, path: Tensor) -> None:
    """Leave in a cache what plain decoding of a path would have: keys before the tree, then those of the path's nodes.

    Args:
        cache: a DynamicCache, changed in place.
        prefix: keys before the tree.
        path: (B, S) integers, nodes of the tree from its root, ascending; as many in each request, because a cache of
            transformers is as long for all. Of tree_verify: accept_index[:, : accept_length + 1].
    """
    op = "keep_path"
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.is_sliding or not layer.is_initialized:
            raise refuse(op, "cache", "layers of a DynamicCache without a window, filled", type(layer).__name__)
    batch, nodes = cache.layers[0].keys.shape[0], cache.layers[0].keys.shape[2] - prefix
    good = isinstance(path, Tensor) and path.ndim == 2 and len(path) == batch and not path.is_floating_point()
    ascending = good and bool((path.diff() > 0).all()) and (path.numel() == 0 or int(path.min()) >= 0)
    if not ascending or (path.numel() and int(path.max()) >= nodes):
        raise refuse(op, "path", f"({batch}, S) nodes, ascending in 0..{nodes - 1}", path)
    index = prefix + path[:, None, :, None].long()
    for layer in cache.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name)
            chosen = held.gather(2, index.to(held.device).expand(-1, held.shape[1], -1, held.shape[3]))
            setattr(layer, name, torch.cat((held[:, :, :prefix], chosen), 2))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding)
