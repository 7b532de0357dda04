"""The package auto-round behind ``m3 quantize --method package``: for architectures that m3.models.decoder has not.

Same tokens, same form of checkpoint. It keeps the whole model in memory, cannot go on after a kill, and loses more than
m3.quantize.autoround does (docs/experiments/quantization.md); what it has is every architecture of transformers.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from m3.quantize.autoround import AutoRoundConfig
from m3.quantize.job import check_out, part_of
from m3.quantize.scheme import Scheme
from m3kernels.checks import refuse

FORM = "auto_gptq"  # the package's name of GPTQ form


def quantize_with_package(
    model: str | Path, out: str | Path, scheme: Scheme, config: AutoRoundConfig, calibration: Tensor
) -> None:
    """Quantise the checkpoint folder ``model`` into the new folder ``out``; the work of a run cut short is lost.

    Args:
        config: iterations, batch and seed of it are used.
        calibration: (S, L) int64 token ids.
    Raises:
        ValueError: the package is not installed, or ``out`` is in use.
        OSError: the disk is full.
    """
    out = Path(out)
    check_out(out, Path(model))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is here; the package would ask for more
    try:
        import auto_round
        import transformers
    except ImportError as error:
        want = "auto-round and transformers (pip install auto-round accelerate)"
        raise refuse("quantize", "--method package", want, f"{error}") from error
    part = part_of(out) / "package"  # responses of the model may lie beside it
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    rounder = auto_round.AutoRound(
        loaded,
        transformers.AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        bits=4,
        group_size=scheme.group_size,
        sym=scheme.symmetric,
        iters=config.iterations,
        batch_size=config.batch,
        seed=config.seed,
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        dataset=[{"input_ids": row[None]} for row in calibration],
        device_map="cpu",
    )
    rounder.quantize_and_save(str(part), format=FORM)
    written = sorted(path.parent for path in part.rglob("config.json"))
    if len(written) != 1:
        raise RuntimeError(f"auto-round {auto_round.__version__} wrote {len(written)} checkpoints in {part}, not one")
    written[0].replace(out)
    shutil.rmtree(part_of(out))
