"""tree_attention of the CUDA room: what the kernels of attention.cu take, and their call."""

from __future__ import annotations

import torch
from torch import Tensor

from m3kernels import _cuda_ext, cuda
from m3kernels.checks import refuse
from m3kernels.cuda import span

TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST_HEAD = 256
ALIGNMENT = 16  # bytes, of rows of the caches
NOTHING = (0, 0, 0, 0)


def refusal(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object) -> str:
    """ "" if the kernels take these queries and caches, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"queries of bfloat16 or float16, not {str(q.dtype).removeprefix('torch.')}"
    if k_cache.dtype not in (q.dtype, torch.int8):
        return f"caches of the type of q, or int8, not {str(k_cache.dtype).removeprefix('torch.')}"
    multiple = ALIGNMENT // k_cache.element_size()
    if q.shape[-1] > LARGEST_HEAD or q.shape[-1] % multiple:
        return f"heads of at most {LARGEST_HEAD} elements, a multiple of {multiple}, not {q.shape[-1]}"
    for cache in (k_cache, v_cache):
        if any(stride % multiple for stride in cache.stride()[:3]) or cache.data_ptr() % ALIGNMENT:
            return f"rows of caches at multiples of {ALIGNMENT} bytes"
    return ""


def _paged(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """(address; pages, slots, heads in elements)."""
    if tensor is None:
        return NOTHING
    page, slot, head = tensor.stride()[:3]
    return tensor.data_ptr(), page, slot, head


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    mask_bits: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
    window: int,
    tree_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    op = "tree_attention"
    tokens, heads, head_size = q.shape
    pages, page_size, kv_heads, _ = k_cache.shape
    int8 = k_cache.dtype == torch.int8
    for name, tensor, shape in (
        ("v_cache", v_cache, k_cache.shape),
        ("k_scale", k_scale, k_cache.shape[:3]),
        ("v_scale", v_scale, k_cache.shape[:3]),
    ):
        dtype = k_cache.dtype if name == "v_cache" else torch.float32
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device):
            raise refuse(op, name, f"{tuple(shape)} {dtype} on {q.device}", tensor)
    if k_cache.shape[3] != head_size or k_cache.device != q.device:
        raise refuse(op, "k_cache", f"head size {head_size} on {q.device}", k_cache)
    if gate is not None and gate.shape not in ((tokens, heads), (tokens, heads, head_size)):
        raise refuse(op, "gate", f"({tokens}, {heads}) or ({tokens}, {heads}, {head_size})", gate)
    if q.data_ptr() % 4 or any(stride % 2 for stride in q.stride()[:2]) or q.stride(2) != 1:
        q = q.clone(memory_format=torch.contiguous_format)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = (tokens, heads, kv_heads, head_size)
    table = (cache_seqlens.numel(), pages, page_size, block_table.shape[1])
    with cuda.on_device(q):
        count = _cuda_ext.spec_decode_attention_memory(sizes, table, int8)
        memory = torch.empty(count, dtype=torch.float32, device=q.device)
        _cuda_ext.spec_decode_tree_attention(
            sizes,
            (q.data_ptr(), TYPE[q.dtype], q.stride(0), q.stride(1)),
            _paged(k_cache),
            _paged(v_cache),
            int8,
            _paged(k_scale),
            _paged(v_scale),
            table,
            span(op, "block_table", block_table, torch.int32, q),
            span(op, "cache_seqlens", cache_seqlens, torch.int32, q),
            span(op, "cu_seqlens_q", cu_seqlens_q, torch.int32, q),
            (
                span(op, "mask_bits", mask_bits, torch.int32, q),
                0 if mask_bits is None else mask_bits.shape[1],
                span(op, "tree_lens", tree_lens, torch.int32, q),
            ),
            (0, 0, False, 0) if gate is None else (gate.data_ptr(), TYPE[gate.dtype], gate.ndim == 2, gate.stride(0)),
            softmax_scale,
            window,
            span(op, "out", out, q.dtype, q),
            span(op, "memory", memory, torch.float32, q),
            cuda.stream(q),
        )
    return out
