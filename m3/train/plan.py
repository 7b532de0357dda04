"""What a recipe will take: tokens a step, memory of a device, time. Printed by ``--dry-run``; nothing is loaded.

    weights      p parameters; each device holds 1 / devices of them (FSDP), and those of one layer whole
    gradients, moments   as weights, and twice as weights; of adapters alone with LoRA
    activations  of one microbatch: per token and layer 12 D + 4 I + (H + 2 K) E values (norms, q k v, attention, MLP),
                 or D with gradient checkpointing, and one layer in full (inputs kept; after arXiv 2205.05198, 4.1,
                 with attention that keeps no scores)
    logits       of the loss's workspace, which bounds them
    KV cache     2 L K E values a token, of as many tokens as run at one time
    process      on a CPU: the interpreter and its libraries, which a small model is small beside

D hidden, L layers, H heads of E values, K key-value heads, I intermediate (of the experts that a token takes), V
vocabulary. Estimates: allocators and communication add to them. Tokens are the most that a step can have, and about as
many as it has where the recipe says how many turns are usual (``source.usual_turns``); time follows from these.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from m3.train.metrics import METRICS, TIMINGS, read_metrics
from m3.train.recipe import Recipe, Shape, flat
from m3kernels.checks import refuse

MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2}
PROCESS = 430 * MIB  # ours: as measured on Linux, with torch and transformers loaded
FORWARD = 1 / 3  # of an update's time, that a frozen model's pass takes: no backward, which is twice a forward
WORKSPACE = {"cpu": 64 * 2**20, "cuda": 2**30}  # of linear_policy_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one step, and of the run; bytes are of one device.

    Args:
        shape: of the model; None: not known.
        parameters, active: of the model; that a token meets (fewer with experts). 0: shape not known.
        learning: parameters that learn.
        sequences: samples of a step. tokens, drawn: of a step, at most.
        usual_tokens, usual_drawn: as measured in a run, else with as many turns as are usual.
        memory: bytes by what holds them, training. sampler: likewise, of the sampler.
        seconds: of the run; None: no rate is known. rate_from: what told the rate.
    """

    recipe: Recipe
    shape: Shape | None
    parameters: int
    active: int
    learning: int
    sequences: int
    tokens: int
    drawn: int
    usual_tokens: int
    usual_drawn: int
    memory: dict[str, float]
    sampler: dict[str, float]
    seconds: float | None
    rate_from: str

    @property
    def total(self) -> float:
        """Bytes of one device: training and sampler together, or the larger where they take turns (scale.offload)."""
        parts = sum(self.memory.values()), sum(self.sampler.values())
        return max(parts) if self.recipe.scale.offload else sum(parts)

    @property
    def fits(self) -> bool | None:
        """Whether ``total`` fits a device; None: its memory was not said."""
        given = self.recipe.scale.memory_gib
        return None if not given else self.total <= given * GIB

    def text(self) -> str:
        """To be read."""
        recipe = self.recipe
        lines = [f"stage {recipe.stage}, {recipe.algorithm}, engine {recipe.scale.engine}"]
        for key, value in flat(recipe.to_json()):
            if value not in ("", {}, 0, 0.0) and not key.startswith("model.shape"):
                lines.append(f"  {key} = {json.dumps(value)}")
        lines.append(f"model        {_parameters(self)}")
        if self.learning != self.parameters:
            lines.append(f"learning     {self.learning / 1e6:.1f} million (LoRA)")
        lines.append(
            f"a step       {self.sequences} sequences, at most {self.tokens} tokens, {self.drawn} of them drawn"
        )
        if self.usual_tokens < self.tokens:
            lines.append(f"             usually about {self.usual_tokens} tokens, {self.usual_drawn} of them drawn")
        lines.append(f"the run      {recipe.optim.steps} steps, at most {recipe.optim.steps * self.tokens} tokens")
        for title, parts in (("training", self.memory), ("sampler", self.sampler)):
            if parts:
                told = ", ".join(f"{name} {_bytes(value)}" for name, value in parts.items())
                lines.append(f"{title:12} {_bytes(sum(parts.values()))} a device: {told}")
        if self.fits is not None:
            verdict = "fits" if self.fits else "does not fit"
            turns = "taking turns" if recipe.scale.offload else "side by side"
            lines.append(f"device       {recipe.scale.memory_gib:g} GiB: {verdict}, training and sampler {turns}")
        lines.append(f"time         {_time(self)}")
        return "\n".join(lines)


def _parameters(plan: Plan) -> str:
    if not plan.parameters:
        return "size of the model not known"
    size, name = (1e9, "billion") if plan.parameters >= 1e8 else (1e6, "million")
    active = f", {plan.active / size:.3f} active" if plan.active != plan.parameters else ""
    return f"{plan.parameters / size:.3f} {name} parameters{active}"


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 4 else f"{value / MIB:.1f} MiB"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        wanted = "scale.tokens_per_second" + (" and rollout.tokens_per_second" if _samples(plan.recipe) else "")
        return f"not known: give {wanted}"
    told = f"{plan.seconds / 3600:.2f} hours" if plan.seconds >= 3600 else f"{plan.seconds / 60:.1f} minutes"
    return f"{told}{'' if plan.usual_tokens < plan.tokens else ', at most'}, from {plan.rate_from}"


def plan_of(recipe: Recipe, out: str | Path | None = None, shape: Shape | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        out: a run of this recipe; its measured rates go before those of the recipe.
        shape: of a model that is not there yet.
    Raises:
        ValueError: a shape that is not whole.
    """
    shape = shape_of(recipe) or shape
    parameters, active = count(shape) if shape else (0, 0)
    rank = recipe.model.lora_rank
    learning = lora_count(shape, rank) if shape and rank else parameters
    source = recipe.source
    turns = 1 if source.fragments else source.max_turns
    tokens, drawn = _tokens(recipe, turns)
    usual = _measured(out) or _tokens(recipe, min(source.usual_turns or turns, turns))
    memory = _training(recipe, shape, parameters, learning, min(tokens, recipe.scale.max_tokens)) if shape else {}
    sampler = _sampler(recipe, shape, parameters) if shape and recipe.stage != "offline-distill" else {}
    seconds, told = _seconds(recipe, *usual, out)
    return Plan(
        recipe=recipe,
        shape=shape,
        parameters=parameters,
        active=active,
        learning=learning,
        sequences=_sequences(recipe),
        tokens=tokens,
        drawn=drawn,
        usual_tokens=usual[0],
        usual_drawn=usual[1],
        memory=memory,
        sampler=sampler,
        seconds=seconds,
        rate_from=told,
    )


def shape_of(recipe: Recipe) -> Shape | None:
    """Of the recipe, else of the checkpoint's config.json, if that is here; None: not known.

    Raises:
        ValueError: a size of the recipe's shape is missing.
    """
    given = recipe.model.shape
    if given != Shape():
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            if getattr(given, name) < 1:
                raise refuse("plan", f"model.shape.{name}", "at least 1", getattr(given, name))
        if given.experts and not 0 < given.experts_per_token <= given.experts:
            want = f"1 to {given.experts}"
            raise refuse("plan", "model.shape.experts_per_token", want, given.experts_per_token)
        return given
    from m3.models.hub import BUILT_IN, built_in_path

    name = recipe.model.name
    folder = built_in_path(name) if name in BUILT_IN else Path(name)
    path = folder / "config.json"
    if not name and recipe.source.kind == "consult":
        from m3.train.tasks.consult import WORDS
        from m3.train.tasks.consult_policy import DecoderConfig

        made = DecoderConfig()
        return Shape(
            hidden=made.hidden, layers=made.layers, heads=made.heads, kv_heads=made.heads,
            head_dim=made.hidden // made.heads, intermediate=made.intermediate, vocabulary=len(WORDS), tied=True,
        )  # fmt: skip
    return shape_of_config(json.loads(path.read_text(encoding="utf-8"))) if name and path.is_file() else None


def shape_of_config(config: dict[str, Any]) -> Shape:
    """Of a Hugging Face config.json of a llama-like decoder, dense or with experts."""
    heads = config["num_attention_heads"]
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["moe_intermediate_size"] if experts and "moe_intermediate_size" in config
        else config["intermediate_size"],
        vocabulary=config["vocab_size"],
        experts=experts,
        experts_per_token=config.get("num_experts_per_tok") or 0 if experts else 0,
        tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


def count(shape: Shape) -> tuple[int, int]:
    """(parameters, those that a token meets): matrices and norms; biases and norms of heads are left out."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    expert = 3 * shape.hidden * shape.intermediate
    router = shape.hidden * shape.experts
    fixed = attention + router + 2 * shape.hidden
    embedding = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) + shape.hidden
    every = embedding + shape.layers * (fixed + expert * max(shape.experts, 1))
    return every, embedding + shape.layers * (fixed + expert * max(shape.experts_per_token, 1))


def lora_count(shape: Shape, rank: int) -> int:
    """Parameters of adapters on every linear layer but the head; those of experts are one linear layer each."""
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + heads) + 2 * (shape.hidden + kv)
    mlp = 3 * (shape.hidden + shape.intermediate) * max(shape.experts, 1)
    router = shape.hidden + shape.experts if shape.experts else 0
    return shape.layers * rank * (attention + mlp + router)


def _sequences(recipe: Recipe) -> int:
    """Samples of a step: on the clinic each domain of stage 3 has as many."""
    source = recipe.source
    domains = len(recipe.model.teachers) if recipe.stage == "mopd" and source.kind == "clinic" else 1
    return source.groups * source.rollouts * max(domains, 1)


def _tokens(recipe: Recipe, turns: float) -> tuple[int, int]:
    """(all, drawn) of a step whose consultations have ``turns`` turns."""
    source, rollout, sequences = recipe.source, recipe.rollout, _sequences(recipe)
    if source.kind == "consult":
        from m3.train.tasks.consult import OPENING, STEP

        return round((OPENING + STEP * turns) * sequences), round(2 * turns * sequences)
    share = 1.0 if source.fragments else turns / source.max_turns
    return round(rollout.context * share * sequences), round(
        min(turns * rollout.max_tokens, rollout.context) * sequences
    )


def _measured(out: str | Path | None) -> tuple[int, int] | None:
    """(all, drawn) of a step, on average over a run."""
    rows = read_metrics(Path(out) / METRICS) if out is not None and (Path(out) / METRICS).is_file() else []
    if not rows:
        return None
    told = [sum(row[name] for row in rows) / len(rows) for name in ("tokens_packed", "tokens_drawn")]
    return round(told[0]), round(told[1])


def _training(recipe: Recipe, shape: Shape, parameters: int, learning: int, tokens: int) -> dict[str, float]:
    size, devices = BYTES[recipe.model.dtype], recipe.scale.devices
    if recipe.scale.engine == "verl":
        size = 4  # verl's FSDP holds fp32 and computes in bf16
    frozen = len(set(recipe.model.teachers.values())) + bool(recipe.model.reference)
    computed = 2 if recipe.scale.engine == "verl" else size
    taken = max(shape.experts_per_token, 1)
    layer = 12 * shape.hidden + 4 * shape.intermediate * taken + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    kept = shape.layers * shape.hidden + layer if recipe.model.gradient_checkpointing else shape.layers * layer
    found = {
        "weights": parameters * size / devices,
        "gradients": learning * size / devices,
        "moments": 2 * learning * size / devices,
        "activations": float(kept * tokens * computed),
        "logits": float(min(WORKSPACE[recipe.scale.device], tokens * shape.vocabulary * 4)),
    }
    if devices > 1:
        found["layer whole"] = (parameters - shape.vocabulary * shape.hidden) / shape.layers * computed
    if recipe.scale.device == "cpu":
        found["process"] = float(PROCESS)
    if frozen:
        found["frozen models"] = frozen * parameters * computed / devices
    return found


def _sampler(recipe: Recipe, shape: Shape, parameters: int) -> dict[str, float]:
    here = recipe.scale.engine == "here"
    size = BYTES[recipe.model.dtype] if here else 2
    parallel = recipe.scale.tensor_parallel
    if recipe.source.kind == "consult":
        return {}  # drawn by the trained model itself
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * (4 if here else 2) / parallel
    cache = token * recipe.rollout.max_running * recipe.rollout.context
    if here:
        cache = min(cache, recipe.rollout.memory_mb * 1e6)
    return {"weights": parameters * size / parallel, "KV cache": cache}


def _seconds(recipe: Recipe, tokens: int, drawn: int, out: str | Path | None) -> tuple[float | None, str]:
    """(seconds of the run, where the rate is from)."""
    if out is not None and (path := Path(out) / TIMINGS).is_file() and (rows := read_metrics(path)):
        rows = rows[1:] or rows  # the first step warms up
        step = sum(row["batch_seconds"] + row["logprobs_seconds"] + row["update_seconds"] for row in rows) / len(rows)
        return step * recipe.optim.steps, f"{len(rows)} steps measured in {out}"
    train, sample = recipe.scale.tokens_per_second, recipe.rollout.tokens_per_second
    if not train or (_samples(recipe) and not sample):
        return None, ""
    judged = bool(recipe.model.reference) or recipe.stage == "mopd"
    step = tokens * (recipe.optim.epochs + FORWARD * judged) / train + (drawn / sample if _samples(recipe) else 0.0)
    return step * recipe.optim.steps, "the recipe's tokens_per_second"


def _samples(recipe: Recipe) -> bool:
    """Whether a step draws tokens: of the policy, or of the small task's teachers."""
    return recipe.stage != "offline-distill" or (recipe.source.kind == "consult" and bool(recipe.model.teachers))
