"""What another project makes of a quantised checkpoint; test_quantised_elsewhere.py runs it where that is installed.

Arguments: loader (auto-round, gptqmodel or vllm), folder, file of token ids (JSON, one list), file to write. Written by
auto-round and gptqmodel, through transformers: "logits" (L, V) and "next" (greedy continuation). By vllm: "next" alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

NEW_TOKENS = 8


def with_transformers(folder: str, ids: list[int]) -> dict[str, object]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    rows = torch.tensor([ids])
    with torch.no_grad():
        logits = model(rows).logits[0].float()
        out = model.generate(rows, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": logits, "next": out[0, len(ids) :].tolist()}


def with_vllm(folder: str, ids: list[int]) -> dict[str, object]:
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, detokenize=False)
    (found,) = model.generate([{"prompt_token_ids": ids}], params)
    return {"next": list(found.outputs[0].token_ids)}


def main(loader: str, folder: str, ids: str, target: str) -> None:
    prompt = json.loads(Path(ids).read_text())
    if loader == "auto-round":
        import auto_round  # noqa: F401  (registers its quantizer with transformers)
    found = with_vllm(folder, prompt) if loader == "vllm" else with_transformers(folder, prompt)
    torch.save(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
