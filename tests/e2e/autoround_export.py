"""Quantise a checkpoint with the PyPI package auto-round and keep its own dequantised weights beside: run by
test_third_party.py in the interpreter that has the package. Arguments: source folder, target folder, format, layers.

What is kept is what auto-round itself put into its torch model (each linear's rounded weight), before it packs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH, ITERATIONS = 4, 32, 1


def main(source: Path, target: Path, export_format: str, layers: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, num_hidden_layers=layers)
    tokenizer = AutoTokenizer.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, model.config.vocab_size, (1, LENGTH), generator=generator) for _ in range(SAMPLES)]
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        group_size=64,
        sym=True,
        iters=ITERATIONS,
        nsamples=SAMPLES,
        seqlen=LENGTH,
        batch_size=2,
        dataset=[{"input_ids": row} for row in ids],
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantised, _ = rounder.quantize()
    weights = {name: value.detach().float().clone() for name, value in quantised.state_dict().items()}
    torch.save(weights, target.with_suffix(".pt"))
    rounder.save_quantized(str(target), format=export_format, inplace=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
