"""Runs in an interpreter that has the package auto-round: quantises a checkpoint with it, says what that took.

``python quantize_peer.py SETTINGS``: a JSON object with model, out, tokens (a file with lists of ids), group_size,
symmetric, iterations, batch. The last line that it prints is JSON: CPU seconds, seconds, peak bytes, version.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def peak_bytes() -> int:
    """Of this process; getrusage would count the parent's too, up to the fork."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(settings: dict) -> dict:
    import torch
    import transformers
    from auto_round import AutoRound, __version__

    torch.set_num_threads(1)
    tokens = json.loads(Path(settings["tokens"]).read_text("utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
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
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text("utf-8")))), flush=True)
