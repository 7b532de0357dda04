"""Quantise a checkpoint with the PyPI package auto-round, and keep what its own loader makes of the result: run by
test_third_party.py in the interpreter that has the package. Arguments: source folder, target folder, layers.

Written: target/ (format auto_gptq), target-own/ (the same tensors under auto-round's own quant_method, which its loader
reads) and target.pt: every linear's weight as auto-round's kernel multiplies with it, its product with the identity.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH, ITERATIONS = 4, 32, 1


def main(source: Path, target: Path, layers: int) -> None:
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
    rounder.quantize()
    rounder.save_quantized(str(target), format="auto_gptq", inplace=True)

    own = target.with_name(target.name + "-own")
    shutil.copytree(target, own)
    (own / "quantization_config.json").unlink()
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    (own / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(own, device_map="cpu")
    weights = {}
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if hasattr(module, "qweight"):
                columns = 8 * module.qweight.shape[0]
                weights[name] = module(torch.eye(columns, dtype=module.scales.dtype)).T.contiguous()
    torch.save(weights, target.with_suffix(".pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
