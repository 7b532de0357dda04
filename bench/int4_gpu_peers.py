"""INT4 on a GPU by other projects, gemlite, Humming and Marlin: the same nibbles, the scales rounded to their type.

They are optional: what cannot be imported or built here is an absent arm with its reason. Humming compiles its kernels
when an arm is first run; its settings are those of its own heuristics for the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness import UnavailableError
from bench.int4_gpu_arms import Gemm, Layers, Moe, MoeLayers
from bench.peers import need
from m3kernels.int4 import Int4Weight


def words(q: Tensor) -> Tensor:
    """(..., K) uint8 in 0..15 -> (..., K / 8) int32, the first in the lowest bits."""
    return (q[..., ::2] | q[..., 1::2] << 4).contiguous().view(torch.int32)


def need_whole_groups(project: str, k: int, group_size: int) -> None:
    if group_size < 1 or k % group_size:
        raise UnavailableError(f"{project}: K = {k} is not a multiple of the group, {group_size}")


class Gemlite(Gemm):
    """gemlite's A16Wn layer."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        need("gemlite")
        from gemlite.helper import A16Wn

        problem, linear = layers.problem, layers.problem.linear
        need_whole_groups("gemlite", linear.k, linear.group_size)
        self.modules = []
        for copy in range(layers.count):
            flat = [
                problem.rows(part, copy).to(layers.dtype).reshape(-1, 1) for part in (problem.scales, problem.zeros)
            ]
            make = A16Wn(device=str(problem.x.device)).from_weights
            self.modules.append(make(problem.rows(problem.q, copy), *flat, 4, linear.group_size, None))
        self.stored_bytes = problem.weight_bytes

    def product(self, x: Tensor, layer: int) -> Tensor:
        return self.modules[layer](x)


# -- Humming ----------------------------------------------------------------------------------------------------------
def humming_layer(weight: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Any:
    """A transformed HummingLayer of symmetric 4-bit weights: words (N, K / 8) or (E, N, K / 8), scales (..., N, G)."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=weight.shape[-2],
        shape_k=weight.shape[-1] * 8,
        weight_config={"dtype": "uint4", "group_size": group_size},
        torch_dtype=dtype,
        num_experts=len(weight) if weight.ndim == 3 else None,
    ).to(weight.device)
    layer.load_from_tensors({"weight": weight, "weight_scale": scales.to(dtype)})
    layer.transform()
    return layer


def humming_settings(layer: Any, rows: int, kind: str) -> dict[str, Any]:
    """What Humming's heuristics choose for a number of rows: one kernel to compile, not one for every range."""
    from humming.tune import get_heuristics_config

    return dict(get_heuristics_config(layer.humming_config, shape_m=rows, gemm_type=kind))


class Humming(Gemm):
    """humming-kernels, dense."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        need("humming")
        problem, linear = layers.problem, layers.problem.linear
        need_whole_groups("humming", linear.k, linear.group_size)
        if not problem.symmetric:
            raise UnavailableError("humming: this arm has symmetric weights alone")

        def module(copy: int) -> Any:
            weight, scales = words(problem.rows(problem.q, copy)), problem.rows(problem.scales, copy)
            return humming_layer(weight, scales, linear.group_size, layers.dtype)

        self.modules = layers.each("humming", module)
        settings = [humming_settings(self.modules[0], m, "dense") for m in layers.ms]
        # More than, at most, settings: a list is compiled in parallel, for the numbers of rows that are measured.
        self.tuning = [[*bounds, each] for *bounds, each in zip([0, *layers.ms], layers.ms, settings, strict=False)]
        self.stored_bytes = problem.weight_bytes

    def product(self, x: Tensor, layer: int) -> Tensor:
        return self.modules[layer](x, tuning_config=self.tuning)


def aligned(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of ids (T, k) sorted by expert, each expert's filled up to whole blocks with T * k; an expert a block.

    Returns: (slots int32, expert of each block int32, number of slots () int32).
    """
    flat = ids.reshape(-1)
    slots, blocks = [], []
    for expert in range(experts):
        found = (flat == expert).nonzero()[:, 0]
        filled = -(-len(found) // block) * block
        slots.append(torch.nn.functional.pad(found, (0, filled - len(found)), value=len(flat)))
        blocks += [expert] * (filled // block)
    joined = torch.cat(slots).int()
    count = torch.tensor(len(joined), dtype=torch.int32, device=ids.device)
    return joined, torch.tensor(blocks, dtype=torch.int32, device=ids.device), count


def by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token of each sorted row, sorted row of each slot (T * k,), offsets (E + 1,)), int64; rows sorted by expert."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(flat), device=ids.device)
    bounds = torch.arange(experts + 1, device=ids.device)
    return order // ids.shape[1], place, torch.searchsorted(flat[order], bounds)


class HummingMoe(Moe):
    """humming-kernels on experts: w13, its fused silu(a) * b, w2, weighted sum by torch.

    ``kind``: "indexed" (the kernel gathers the tokens) or "grouped_contiguous" (rows sorted by expert). Tables of the
    routing are made beforehand and are not in the time, an allowance that our arms do not have.
    """

    ACTIVATION = "a / (1.0f + __expf(-a)) * b"

    def __init__(self, layers: MoeLayers, *, kind: str) -> None:
        super().__init__(layers)
        need("humming")
        problem, self.kind = layers.problem, kind
        self.experts, self.topk = problem.shape.experts, problem.shape.topk
        for k in (problem.shape.hidden, problem.shape.intermediate):
            need_whole_groups("humming", k, problem.shape.group_size)
        self.modules = layers.each("humming", lambda layer: tuple(map(self.module, layers.packed[layer])))
        self.stored_bytes = problem.w13.nbytes + problem.w2.nbytes
        self.compute = {"gemm_type": kind}

    def module(self, weight: Int4Weight) -> Any:
        unpacked = [weight.expert(expert).unpack()[:2] for expert in range(self.experts)]
        packed, scales = torch.stack([words(q) for q, _ in unpacked]), torch.stack([each for _, each in unpacked])
        return humming_layer(packed, scales, weight.group_size, self.layers.dtype)

    def route(self, ids: list[Tensor], weights: Tensor) -> None:
        super().route(ids, weights)
        # The kernel is told its settings: it and the tables must have the same blocks.
        self.settings = [humming_settings(module, ids[0].numel(), self.kind) for module in self.modules[0]]
        if self.kind == "indexed":
            blocks = [each["block_shape"][0] for each in self.settings]
            self.tables = [[aligned(each, self.experts, block) for block in blocks] for each in ids]
        else:
            self.tables = [[by_expert(each, self.experts)] for each in ids]

    def product(self, x: Tensor, layer: int) -> Tensor:
        from humming import ops

        options = {"activation_type": "binary_split", "activation_impl": self.ACTIVATION}
        down_input = ops.process_input(self.multiply(x, layer, 0), **options)[0]
        out = self.multiply(down_input, layer, 1)
        if self.kind != "indexed":
            out = out[self.tables[layer][0][1]]
        weighted = out.view(len(x), self.topk, -1).float() * self.topk_weights[..., None]
        return weighted.sum(1).to(x.dtype)

    def multiply(self, x: Tensor, layer: int, which: int) -> Tensor:
        """w13 (``which`` 0) or w2 of one layer."""
        module = self.modules[layer][which]
        configs = {"compute_config": self.compute, "tuning_config": self.settings[which]}
        if self.kind == "indexed":
            slots, experts, count = self.tables[layer][which]
            tables = {"sorted_ids": slots, "expert_ids": experts, "num_tokens_padded": count}
            return module(x, top_k=1 if which else self.topk, **tables, **configs)
        token, _, offsets = self.tables[layer][0]
        return module(x if which else x[token], expert_layout=offsets, **configs)


# -- Marlin -----------------------------------------------------------------------------------------------------------
class Marlin(Gemm):
    """vLLM's GPTQ Marlin, through its own helpers, where vLLM can be imported."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        need("vllm")
        from vllm import _custom_ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types

        problem, linear = layers.problem, layers.problem.linear
        need_whole_groups("marlin", linear.k, linear.group_size)
        self.rules, self.type, device = marlin_utils, scalar_types.uint4b8, problem.x.device
        self.n, self.k = linear.n, linear.k
        self.workspace, self.nothing = (
            marlin_utils.marlin_make_workspace_new(device),
            torch.empty(0, device=device).int(),
        )
        self.weights, self.scales = [], []
        for copy in range(layers.count):
            rows = words(problem.rows(problem.q, copy)).t().contiguous()  # (K / 8, N)
            self.weights.append(_custom_ops.gptq_marlin_repack(rows, self.nothing, self.k, self.n, 4))
            scales = problem.rows(problem.scales, copy).to(layers.dtype).t().contiguous()  # (G, N)
            self.scales.append(marlin_utils.marlin_permute_scales(scales, self.k, self.n, linear.group_size))
        self.stored_bytes = problem.weight_bytes

    def product(self, x: Tensor, layer: int) -> Tensor:
        return self.rules.apply_gptq_marlin_linear(
            input=x,
            weight=self.weights[layer],
            weight_scale=self.scales[layer],
            weight_zp=self.nothing,
            g_idx=self.nothing,
            g_idx_sort_indices=self.nothing,
            workspace=self.workspace,
            wtype=self.type,
            output_size_per_partition=self.n,
            input_size_per_partition=self.k,
            is_k_full=True,
        )
