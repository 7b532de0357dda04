"""INT4 checkpoints in vLLM: which are served by m3kernels, and by which method each layer.

Formats: GPTQ (v1, v2, act-order), AWQ, compressed-tensors, AutoRound. A layer is INT4 where the files have its packed
tensors, and dense where they have ``.weight``. vLLM's layers are imported when a model is built: every process of vLLM
imports this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from m3.plugins.int4_parts import Layers, four_bit_settings, is_four_bit, packed_layers
from m3.plugins.vllm import METHOD
from m3kernels.checks import refuse


class Int4Config(QuantizationConfig):
    """quantization_config of a checkpoint, and which of its layers are packed."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = four_bit_settings(stored)
        self.layers: Layers = {}

    def __repr__(self) -> str:
        return f"Int4Config({self.settings['quant_method']}, {len(self.layers)} linears)"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int4Config:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """METHOD for checkpoints that are served here: those of 4 bits, on a CPU or if asked for by name."""
        asked = user_quant == METHOD
        if not asked and (user_quant is not None or not current_platform.is_cpu()):
            return None
        return METHOD if asked or is_four_bit(hf_quant_cfg) else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Nothing is dropped: act-order is served, so ``g_idx`` is read."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads which layers are packed from the headers of the files. Raises ValueError if none is."""
        self.layers = packed_layers(get_safetensors_params_metadata(model_name, revision=revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from m3.plugins.vllm_linear import Int4LinearMethod
        from m3.plugins.vllm_moe import experts_method

        if isinstance(layer, RoutedExperts):
            return experts_method(self, layer, prefix)
        if isinstance(layer, LinearBase):
            names = self.names(prefix)
            packed = [name for name in names if name in self.layers]
            if packed and len(packed) < len(names):
                dense = sorted(set(names) - set(packed))[0]
                raise refuse("checkpoint", dense, f"a packed linear, as {packed[0]}: vLLM joins them", "a dense one")
            return Int4LinearMethod(self, names) if packed else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead) and prefix in self.layers:
            return Int4LinearMethod(self, [prefix])
        return None

    def names(self, prefix: str) -> list[str]:
        """Linears of the checkpoint that vLLM joins into ``prefix``, in its order."""
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(last, [last])]
