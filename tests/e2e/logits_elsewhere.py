"""What other projects make of quantised checkpoints; test_quantised_elsewhere.py runs it where they are installed.

Arguments: loader (auto-round, gptqmodel, vllm; vllm-m3: with our plug-in; vllm-m3-two-ranks), file of token ids (JSON,
one list), file to write, folders. Written, for each folder: "logits" (L, V) and "next" (greedy continuation), or
"refused", what the loader said.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import torch

NEW_TOKENS = 8
REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
VLLM = {  # fp16: for INT4 it has no fp32; memory: as a small machine has it
    "dtype": "float16",
    "enforce_eager": True,
    "max_model_len": 128,
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 27,
    "max_logprobs": -1,
    "logprobs_mode": "raw_logits",
}


def with_transformers(folder: str, ids: list[int]) -> dict[str, object]:
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

    method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    kernels = {"gptq": GPTQConfig(bits=4, backend="gptq_torch"), "awq": AwqConfig(backend="torch_awq")}
    options = {"quantization_config": kernels[method]} if method in kernels else {}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)
    rows = torch.tensor([ids])
    with torch.no_grad():
        logits = model(rows).logits[0].float()
        out = model.generate(rows, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": logits, "next": out[0, len(ids) :].tolist()}


def with_vllm(folder: str, ids: list[int], **options: object) -> dict[str, object]:
    from vllm import LLM, SamplingParams

    model = LLM(folder, **{**VLLM, **options})
    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=-1, detokenize=False, ignore_eos=True
    )
    (found,) = model.generate([{"prompt_token_ids": ids}], params)
    (completion,) = found.outputs
    rows = [[row[token].logprob for token in range(len(row))] for row in completion.logprobs[:1]]
    return {"logits": torch.tensor(rows), "next": list(completion.token_ids)}


def main(loader: str, ids: str, target: str, *folders: str) -> None:
    prompt = json.loads(Path(ids).read_text())
    if loader == "auto-round":
        import auto_round  # noqa: F401  (registers its quantizer with transformers)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, in which one model follows another
    ours = functools.partial(with_vllm, dtype="float32")
    loaders = {"vllm": with_vllm, "vllm-m3": ours, "vllm-m3-two-ranks": functools.partial(ours, tensor_parallel_size=2)}
    load = loaders.get(loader, with_transformers)
    found: dict[str, dict[str, object]] = {}
    for folder in folders:
        try:
            found[folder] = load(folder, prompt)
        except REFUSALS as error:  # the test has to see it
            found[folder] = {"refused": f"{type(error).__name__}: {error}"}
    torch.save(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
