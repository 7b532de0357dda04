"""transformers' quantizer seam: ``from_pretrained`` loads INT4 checkpoints onto m3kernels, on CPUs and GPUs.

    import m3.plugins.transformers                      # what `m3 quantize` wrote now loads:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    AutoModelForCausalLM.from_pretrained(other, quantization_config=Int4Config())   # anybody's 4 bits
    register()                                          # from here on those too, without the argument

GPTQ, AWQ, compressed-tensors and AutoRound are read, without optimum, gptqmodel and the like. A linear is INT4 where
the files have its packed tensors, and dense where they have ``.weight``, as in m3.models.loader. ``save_pretrained``
writes the form that was read, packed tensors bit for bit. Tested with transformers 5.23.

transformers chooses a quantizer by ``quant_method`` of config.json, which for `m3 quantize` is "gptq", so that others
read its folders too. Which quantizer that means is decided where transformers merges the file's settings with the
caller's: ``AutoHfQuantizer.merge_quantization_configs``, which this module wraps.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from m3.models.loader import METHODS, read_quantization_config
from m3.plugins.int4_parts import DTYPES, PACKED
from m3.plugins.transformers_int4 import EXPERT_LINEARS, PackedExperts, PackedLinear, Stored, check_experts
from m3kernels.checks import refuse
from m3kernels.int4.reference import ACTIVATIONS

METHOD = "m3_int4"
_claimed: set[str] = set()


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """Loads a checkpoint of 4-bit weights onto m3kernels.

    Args:
        activations: mode of the INT4 products, as in m3kernels.int4.int4_gemm. Never saved.
        stored: quantization_config of the checkpoint; the caller gives none.
    """

    def __init__(self, activations: str = "auto", **stored: Any) -> None:
        if activations not in ACTIVATIONS:
            raise refuse("Int4Config", "activations", " or ".join(ACTIVATIONS), f"{activations!r}")
        self.quant_method = METHOD
        self.activations = activations
        self.stored = stored

    def settings(self) -> dict[str, Any]:
        """``stored`` as the loader reads it; "m3_int4" is GPTQ's layout under our name. Raises ValueError."""
        stored = self.stored
        if stored.get("quant_method") == METHOD:
            stored = {**stored, "quant_method": "gptq"}
        if stored.get("quant_method") not in METHODS:
            want = f"quant_method {' or '.join(METHODS)}"
            raise refuse("Int4Config", "quantization_config", want, f"{stored.get('quant_method')!r}")
        return read_quantization_config({"quantization_config": stored})

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: the checkpoint's own quantization_config."""
        return copy.deepcopy(self.stored) or {"quant_method": METHOD}


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """Puts INT4 modules where the checkpoint has packed tensors, and packs them when they are filled."""

    requires_calibration = True  # weights come quantised: `m3 quantize` makes them

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError if the checkpoint's quantization_config is none that is served."""
        self.quantization_config.settings()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        layers = packed_layers(checkpoint_files)
        builder = _Builder(self.quantization_config, layers)
        for name, module in list(model.named_modules()):
            builder.visit(model, name, module)
        if left := sorted(set(layers) - builder.used):
            raise refuse("transformers", "checkpoint", "a linear or experts of the model for every INT4 layer", left[0])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for kind in (PackedExperts, PackedLinear):  # experts first: then their linears are gone
            for module in list(model.modules()):
                if isinstance(module, kind):
                    module.pack()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Builder:
    """Replaces modules of a model on the meta device."""

    def __init__(self, config: Int4Config, layers: dict[str, Stored]) -> None:
        self.settings, self.activations = config.settings(), config.activations
        self.layers = layers
        self.used: set[str] = set()

    def visit(self, model: Any, name: str, module: nn.Module) -> None:
        prefixes = (name, f"{model.base_model_prefix}.{name}")  # of a model without its head, files name the whole
        for prefix in prefixes:
            if isinstance(module, nn.Linear) and prefix in self.layers:
                model.set_submodule(name, self.linear(prefix, module.bias))
                return
            if f"{prefix}.0.{EXPERT_LINEARS[0]}" in self.layers and hasattr(module, "gate_up_proj"):
                check_experts(prefix, module)
                model.set_submodule(name, self.experts(prefix, module.get_parameter("gate_up_proj").shape[0]))
                return

    def linear(self, name: str, bias: torch.Tensor | None) -> PackedLinear:
        self.used.add(name)
        settings = {**self.settings, **self.settings.get("extra_config", {}).get(name, {})}
        return PackedLinear(name, self.layers[name], settings, bias, activations=self.activations)

    def experts(self, prefix: str, count: int) -> PackedExperts:
        linears = []
        for index in range(count):
            names = {part: f"{prefix}.{index}.{part}" for part in EXPERT_LINEARS}
            if missing := [name for name in names.values() if name not in self.layers]:
                raise refuse("transformers", "checkpoint", f"all {count} experts in INT4, as the first", missing[0])
            linears.append({part: self.linear(name, None) for part, name in names.items()})
        return PackedExperts(linears, activations=self.activations)


def packed_layers(checkpoint_files: Sequence[str] | None) -> dict[str, Stored]:
    """Layer name -> its packed tensors in the files, read from their headers.

    Raises ValueError if there are no safetensors files, or no packed tensors in them.
    """
    files = [Path(file) for file in checkpoint_files or ()]
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise refuse("transformers", "checkpoint", "safetensors files", [file.name for file in files] or "none")
    layers: dict[str, Stored] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as source:
            for key in source.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                layer, _, part = key.rpartition(".")
                if part in PACKED:
                    tensor = source.get_slice(key)
                    if tensor.get_dtype() not in DTYPES:
                        raise refuse("transformers", f"{file.name}: {key}", " or ".join(DTYPES), tensor.get_dtype())
                    layers.setdefault(layer, {})[part] = (tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])
    if not layers:
        raise refuse("transformers", "checkpoint", "packed tensors (qweight or weight_packed)", "none in its files")
    return layers


# -- which checkpoints are ours ---------------------------------------------------------------------------------------
def register(methods: Collection[str] = METHODS) -> None:
    """From here on, 4-bit checkpoints of these methods load onto m3kernels without ``quantization_config``.

    What `m3 quantize` wrote does so in any case. The last call counts: ``register(())`` takes it back.
    """
    if unknown := set(methods) - set(METHODS):
        raise refuse("register", "methods", f"of {METHODS}", f"{sorted(unknown)}")
    _claimed.clear()
    _claimed.update(methods)


def is_ours(stored: dict[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config loads here though the caller did not ask for it."""
    meta, method = stored.get("meta"), stored.get("quant_method")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    if method == "gptq" and isinstance(quantizers, list) and any(str(one).startswith("m3:") for one in quantizers):
        return True
    four_bits = stored.get("format") == "pack-quantized" or stored.get("bits", stored.get("w_bit")) == 4
    return method in _claimed and four_bits


_merge = AutoHfQuantizer.merge_quantization_configs


def merge_quantization_configs(stored: Any, given: Any) -> Any:
    """transformers' function; an Int4Config if the caller gave one, or gave none and the checkpoint is ours."""
    if isinstance(given, Int4Config):
        return Int4Config(given.activations, **(stored if isinstance(stored, dict) else stored.to_dict()))
    if given is None and isinstance(stored, dict) and is_ours(stored):
        return Int4Config(**stored)
    return _merge(stored, given)


AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
