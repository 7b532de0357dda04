"""Quantise a checkpoint with another project; test_quantised_elsewhere.py runs it in the interpreter that has it.

Arguments: auto-round or gptqmodel, source folder, target folder. Written: a folder in target for each of AUTOROUND or
GPTQMODEL.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

SAMPLES, LENGTH, GROUP_SIZE = 8, 32, 64
AUTOROUND = {  # folder: form, symmetric
    "auto_gptq": ("auto_gptq", True),
    "auto_round": ("auto_round", True),
    "auto_awq": ("auto_awq", True),
}
GPTQMODEL = {  # folder: options of its QuantizeConfig
    "gptq": {},
    "gptq_v2": {"format": "gptq_v2"},
    "desc_act": {"desc_act": True},
    "asymmetric": {"sym": False, "format": "gptq_v2"},
}


def calibration(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def with_auto_round(source: Path, target: Path) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, (form, symmetric) in AUTOROUND.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rounder = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            group_size=GROUP_SIZE,
            sym=symmetric,
            iters=1,
            nsamples=SAMPLES,
            seqlen=LENGTH,
            batch_size=4,
            dataset=[{"input_ids": row[None]} for row in calibration(model.config.vocab_size)],
            device_map="cpu",
            enable_torch_compile=False,
        )
        folder = target / name
        rounder.quantize_and_save(str(folder), format=form)
        for path in [path.parent for path in folder.rglob("config.json")]:  # some versions write into a folder of it
            if path != folder:
                shutil.copytree(path, folder, dirs_exist_ok=True)
                shutil.rmtree(path)


def with_gptqmodel(source: Path, target: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoConfig

    rows = calibration(AutoConfig.from_pretrained(source).vocab_size).tolist()
    samples = [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows]
    for name, options in GPTQMODEL.items():
        config = QuantizeConfig(bits=4, group_size=GROUP_SIZE, pack_impl="original", **options)
        model = GPTQModel.load(str(source), config, device="cpu")
        model.quantize(samples, batch_size=4)
        model.save(str(target / name))


def main(package: str, source: str, target: str) -> None:
    {"auto-round": with_auto_round, "gptqmodel": with_gptqmodel}[package](Path(source), Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
