"""Open an engine by names: a target, as it is or rounded to INT4, and a draft for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from m3.draft.layouts import load_draft
from m3.engine.config import EngineConfig, Speculation
from m3.engine.core import Draft, EngineCore
from m3.models.decoder import Decoder
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.round_to_nearest import RoundConfig, quantize_model
from m3kernels.checks import refuse
from m3kernels.threads import release_threads

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT4 = RoundConfig(group_size=32, head=True)


def open_target(
    name: str | Path, *, weights: str = "fp32", progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Decoder, Tokenizer]:
    """A model by name, folder or hub repository, with its tokenizer.

    Args:
        weights: how unquantised weights are held: "fp32", "bf16", "fp16", or "int4", rounded here, the head too. What
            is INT4 on disk stays as it is.
    """
    if weights not in (*WEIGHTS, "int4"):
        raise refuse("engine", "weights", "'fp32', 'bf16', 'fp16' or 'int4'", repr(weights))
    folder = resolve(str(name))
    model = load_model(folder, dtype=WEIGHTS.get(weights, torch.float32), progress=progress)
    if weights == "int4":
        model = quantize_model(model, INT4, progress)
    return model, Tokenizer(folder)


def open_draft(folder: str | Path, model: Decoder, *, weights: str = "int4") -> Draft:
    """A draft for ``model`` in any layout that m3.draft.layouts reads; weights: "int4", "bf16" or "fp32"."""
    config, tensors = load_draft(Path(folder), model.config)
    return Draft(config=config, tensors=tensors, weights=weights)


def open_core(
    name: str | Path,
    config: EngineConfig | None = None,
    *,
    weights: str = "fp32",
    draft: str | Path | None = None,
    speculation: Speculation | None = None,
) -> tuple[EngineCore, Tokenizer]:
    """A core ready to serve, and the target's tokenizer."""
    model, tokenizer = open_target(name, weights=weights)
    found = None if draft is None else open_draft(draft, model)
    core = EngineCore(model, config, draft=found, speculation=speculation)
    release_threads()  # the core may run on another thread
    return core, tokenizer
