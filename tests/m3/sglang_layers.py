"""Enough of SGLang to run its own draft model on a CPU: its source out of the wheel, over plain torch layers.

The classes of sglang/srt/models/llama.py that the draft is made of, and llama_eagle3.py as it stands, are SGLang's. The
layers beneath them are ours, with SGLang's names, arguments and results: linears over one rank, RMSNorm with a
residual, rotary embedding, attention over one sequence.
"""

from __future__ import annotations

import sys
import types
import zipfile
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from sglang_peer import definitions, wheel
from torch import Tensor, nn

LLAMA = ("LlamaMLP", "LlamaAttention", "LlamaDecoderLayer")


def source(path: str) -> str:
    with zipfile.ZipFile(wheel()) as archive:
        return archive.read(path).decode()


class Linear(nn.Module):
    """Any of SGLang's linears on one rank; shards are rows in order."""

    def __init__(self, columns: int, rows: int, *, bias: bool, shards: dict[Any, tuple[int, int]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), torch.nan), requires_grad=False)
        self.bias = nn.Parameter(torch.full((rows,), torch.nan), requires_grad=False) if bias else None
        self.shards = shards
        self.weight.weight_loader = self.load
        if self.bias is not None:
            self.bias.weight_loader = self.load

    def load(self, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        first, last = self.shards[shard] if shard is not None else (0, len(parameter))
        assert parameter[first:last].shape == tensor.shape
        parameter.data[first:last] = tensor

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class ColumnParallelLinear(Linear):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, quant_config: Any = None, prefix: str = ""
    ):
        super().__init__(input_size, output_size, bias=bias, shards={})


class RowParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, bias: bool = True, **options: Any) -> None:
        super().__init__(input_size, output_size, bias)


class MergedColumnParallelLinear(Linear):
    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, **options: Any) -> None:
        ends = torch.tensor([0, *output_sizes]).cumsum(0).tolist()
        shards = {index: (ends[index], ends[index + 1]) for index in range(len(output_sizes))}
        super().__init__(input_size, ends[-1], bias=bias, shards=shards)


class QKVParallelLinear(Linear):
    def __init__(
        self, hidden: int, head_size: int, heads: int, kv_heads: int, bias: bool = True, **options: Any
    ) -> None:
        q, kv = heads * head_size, kv_heads * head_size
        shards = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        super().__init__(hidden, q + 2 * kv, bias=bias, shards=shards)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), torch.nan), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        x = x if residual is None else x + residual
        y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return y if residual is None else (y, x)


class Rotary(nn.Module):
    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        half = self.head_dim // 2
        angles = positions[:, None].double() * self.base ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]

        def turn(x: Tensor) -> Tensor:
            first, second = x.unflatten(-1, (-1, self.head_dim)).split(half, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(1)

        return turn(q), turn(k)


class RadixAttention(nn.Module):
    """Causal attention of one whole sequence."""

    def __init__(
        self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, layer_id: int, **options: Any
    ) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.layer_id = head_dim, scaling, layer_id

    def forward(self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Any) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in (q, k, v))
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True)
            .transpose(0, 1)
            .flatten(1)
        )


class Embedding(nn.Module):
    def __init__(self, rows: int, columns: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), torch.nan), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class DualGemm:
    def __init__(self, *args: Any) -> None:
        pass

    def can_run(self, *args: Any) -> bool:
        return False


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


def _load(parameter: nn.Parameter, tensor: Tensor) -> None:
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


def modules() -> dict[str, types.ModuleType]:
    """sys.modules for ``import sglang.srt.models.llama_eagle3``."""
    single = types.SimpleNamespace(SINGLE_GROUP="single")
    parallel = types.SimpleNamespace(tp_size=1, pp_group=None)

    def add_prefix(name: str, prefix: str) -> str:
        return f"{prefix}.{name}" if prefix else name

    members: dict[str, dict[str, Any]] = {
        "configs.draft_parallel": {"DraftParallelSpec": lambda **_: None, "DraftTPExecution": single},
        "runtime_context": {
            "get_spec": lambda: types.SimpleNamespace(speculative_draft_window_size=None),
            "get_parallel": lambda: parallel,
        },
        "utils": {"add_prefix": add_prefix},
        "layers.layer_boundary": {"layer_stack": nullcontext},
        "layers.layernorm": {"RMSNorm": RMSNorm},
        "layers.linear": {"QKVParallelLinear": QKVParallelLinear, "ColumnParallelLinear": ColumnParallelLinear},
        "layers.logits_processor": {"LogitsProcessor": lambda config: None},
        "layers.quantization.base_config": {"QuantizationConfig": object},
        "layers.vocab_parallel_embedding": {"ParallelLMHead": Embedding, "VocabParallelEmbedding": Embedding},
        "model_executor.forward_batch_info": {"ForwardBatch": object, "PPProxyTensors": object},
        "model_loader.weight_utils": {"default_weight_loader": _load},
    }
    found = {f"sglang.srt.{name}": _module(f"sglang.srt.{name}", **inside) for name, inside in members.items()}
    llama = _module("sglang.srt.models.llama", torch=torch, nn=nn, LlamaForCausalLM=nn.Module)
    llama.__dict__.update(
        {
            "QKVParallelLinear": QKVParallelLinear,
            "RowParallelLinear": RowParallelLinear,
            "MergedColumnParallelLinear": MergedColumnParallelLinear,
            "RMSNorm": RMSNorm,
            "RadixAttention": RadixAttention,
            "SiluAndMul": SiluAndMul,
            "DualGemm": DualGemm,
            "DenseSiluAndMulQuant": lambda linear: None,
            "get_rope": lambda head_dim, base, **_: Rotary(head_dim, base),
            "get_parallel": lambda: parallel,
            "add_prefix": add_prefix,
            "_is_npu": False,
        }
    )
    header = "from __future__ import annotations\nfrom typing import *\n"
    text = header + "\n\n".join(definitions(source("sglang/srt/models/llama.py"), LLAMA))
    exec(compile(text, "sglang/srt/models/llama.py", "exec"), llama.__dict__)
    eagle = _module("sglang.srt.models.llama_eagle3")
    found |= {module.__name__: module for module in (llama, eagle)}
    for name in list(found):
        while "." in name:
            name = name.rpartition(".")[0]
            found.setdefault(name, _module(name, __path__=[]))
    before = {name: sys.modules.get(name) for name in found}
    sys.modules.update(found)
    try:
        text = source("sglang/srt/models/llama_eagle3.py")
        exec(compile(text, "sglang/srt/models/llama_eagle3.py", "exec"), eagle.__dict__)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return found
