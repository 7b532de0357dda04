"""Runs in an interpreter that has the package auto-round: quantises a checkpoint with it, says what that took.

``python quantize_peer.py SETTINGS``: a JSON object with model, out, tokens (a file with lists of ids), group_size,
symmetric, iterations, batch. The last line that it prints is JSON: CPU seconds, seconds, peak bytes, version.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(settings: dict) -> dict:
    import torch
    import transformers
    from auto_round import AutoRound, __version__

    torch.set_num_threads(1)
    tokens = json.loads(Path(settings["tokens"]).read_text("utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, clock = time.process_time(), time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=4,
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        iters=settings["iterations"],
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=settings["batch"],
        dataset=[{"input_ids": torch.tensor([row])} for row in tokens],
        device_map="cpu",
        **settings.get("options", {}),
    )
    rounder.quantize_and_save(settings["out"], format="auto_gptq")
    return {
        "version": __version__,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - clock,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before_bytes": before * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text("utf-8")))), flush=True)
