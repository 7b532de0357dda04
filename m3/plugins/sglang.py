"""SGLang's plug-in seam (entry point group ``sglang.srt.plugins``): the gated EAGLE-3 draft, and our tree kernels.

Two plug-ins, so that ``SGLANG_PLUGINS`` can choose: ``m3_draft`` registers the architecture that m3.draft.layouts
writes, ``m3_tree`` puts m3kernels' drop-in set in the place of SGLang's kernels. Written against SGLang 0.5.23; its
source is what the tests read, for it does not run without a GPU.
"""

from __future__ import annotations

ARCHITECTURE = "LlamaForCausalLMEagle3Gated"


def register_draft() -> None:
    """Adds the gated draft to SGLang's models. Calling it again changes nothing."""
    from sglang.srt.models.registry import ModelRegistry

    from m3.plugins.sglang_draft import LlamaForCausalLMEagle3Gated

    ModelRegistry.models[ARCHITECTURE] = LlamaForCausalLMEagle3Gated


def register_tree() -> None:
    """Registers replacements of SGLang's tree kernels; SGLang puts them in place when all plug-ins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from m3.plugins.sglang_tree import REPLACEMENTS

    for target, function in REPLACEMENTS.items():
        HookRegistry.register(target, function, HookType.REPLACE)
