"""A recipe: all that decides a run of a stage, written by hand as TOML, read into frozen dataclasses.

    stage = "task-rl"
    [model] [source] [objective] [optim] [rollout] [rewards] [checkpoint] [scale]

An unknown key, or a value of another kind, is refused with its line and the nearest name. ``section.key=value`` on the
command line goes over the file. The resolved recipe lies as recipe.json beside the run, and ``read`` takes that too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from m3.algorithms import clip_forward_kl, mopd
from m3.environment.case import Phase
from m3.environment.pipeline import PHASES
from m3.train.group_advantages import ALGORITHMS, loss_spec
from m3.train.group_advantages import algorithm as group_algorithm
from m3.train.loop import TrainConfig
from m3.train.optim import OptimConfig
from m3.train.stage import Objective
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import DistillSpec, check_choice

OP = "recipe"
STAGES = ("task-rl", "offline-distill", "mopd")
RESOLVED = "recipe.json"
SHIPPED = Path(__file__).parents[1] / "recipes"
DISTILL = ("clip_forward_kl", "forward_kl")
DEFAULT_ALGORITHM = {"task-rl": "spar", "offline-distill": "clip_forward_kl", "mopd": "mopd"}
FREE = (  # may differ when a run goes on
    "checkpoint", "scale.tokens_per_second", "rollout.tokens_per_second", "source.usual_turns",
)  # fmt: skip
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder, for plans of a model whose config.json is not here; 0: not known."""

    hidden: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0  # of the MLP, or of one expert
    vocabulary: int = 0
    experts: int = 0  # 0: a dense model
    experts_per_token: int = 0
    tied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained.

    Args:
        name: a checkpoint folder, a built-in name, owner/name of the hub; "" where the source makes its own.
        dtype: "float32" or "bfloat16", of weights, gradients and moments. attention: of transformers.
        lora_rank: of adapters; 0: all weights learn.
        reference: checkpoint of the KL term. teachers: checkpoint by domain, of stages 2 and 3.
    """

    name: str = ""
    dtype: str = "float32"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0  # as LoraConfig
    reference: str = ""
    teachers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shape: Shape = dataclasses.field(default_factory=Shape)

    def __post_init__(self) -> None:
        check_choice(OP, "model.dtype", self.dtype, ("float32", "bfloat16"))
        _least("model", self, lora_rank=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where batches come from.

    Args:
        kind: "clinic" (consultations of m3.environment), "consult" (the small, exactly scored task), or
            "package.module:function" of a stage of one's own (open_stage.Opener).
        cases: file or folder of cases; "": our own. split: "train", "held_out", "": both.
        groups: contexts of a step. rollouts: of a context. epochs: times that a case is taken; they bound the run.
        resample: as TaskRLConfig. stages: of a consultation, the first ones. max_turns: of an inquiry.
        usual_turns: of an inquiry, as measured; for plans. 0: not known.
        fragments: only the next reply is reinforced (M2). interruption: share of interrupted beginnings.
        domain: names the teacher that is trained; of the clinic, the one that is consultations. department: of the
            small task's cases; "": both.
        prompts: of the clinic, a file by domain: HealthBench's form, a prompt a line with its rubric; "own": ours.
        samples: of each teacher, of stage 2 of the clinic. folder: where a source keeps what it makes (trajectories,
            weights for a server); "": in the run's folder.
        options: of a source of one's own.
    """

    kind: str = "clinic"
    cases: str = ""
    split: str = "train"
    groups: int = 4
    rollouts: int = 4  # ours: as the pipeline's
    epochs: int = 1000
    resample: int = 0
    stages: tuple[str, ...] = tuple(str(phase) for phase in PHASES)
    max_turns: int = 20
    usual_turns: float = 0.0
    fragments: bool = False
    interruption: float = 0.25
    domain: str = "inquiry"
    department: str = ""
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    samples: int = 256  # ours
    folder: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _least("source", self, groups=1, rollouts=1, epochs=1, resample=0, max_turns=1, usual_turns=0, samples=1)
        check_choice(OP, "source.split", self.split, ("", "train", "held_out"))
        for name in self.stages:
            check_choice(OP, "source.stages", name, tuple(str(phase) for phase in PHASES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What is minimised.

    Args:
        algorithm: of m3/algorithms: spar, grpo, dapo, dr_grpo, gspo; clip_forward_kl, forward_kl; mopd. "": the
            stage's own (spar, clip_forward_kl, mopd).
        numbers: fields of the algorithm's Config, over its defaults.
        sampler_level, sampler_high: correction between sampler and trainer, of stage 1; "none": no correction.
    """

    algorithm: str = ""
    numbers: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    sampler_level: str = "token"
    sampler_high: float = 2.0  # as TaskRLConfig

    def __post_init__(self) -> None:
        check_choice(OP, "objective.sampler_level", self.sampler_level, ("none", "token", "sequence"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(OptimConfig):
    """The optimiser's numbers, and the run's length: ``steps`` batches, each in ``minibatches``, ``epochs`` times."""

    steps: int = 100
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _least("optim", self, steps=1, minibatches=1, epochs=1)

    @property
    def config(self) -> OptimConfig:
        return OptimConfig(**{one.name: getattr(self, one.name) for one in dataclasses.fields(OptimConfig)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """How the policy draws.

    Args:
        max_tokens: of one message. context: of a whole consultation. timeout: seconds of a message.
        max_running: sequences of one step of the engine. memory_mb: of its cache, in 10^6 bytes.
        server: who draws instead of the engine here, http://host:port/v1#model (m3/train/served_physician.py).
        refresh: what makes it take new weights, a URL or a command.
        read_ahead: the trainer's and the reference's log-probabilities of a rollout are read while others are drawn;
            with them the metrics have sampler_gap.
        tokens_per_second: drawn by the engine, as measured; for plans. 0: not known.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 400  # as EnginePhysician
    context: int = 8192
    timeout: float = 600.0
    max_running: int = 64
    memory_mb: int = 512
    server: str = ""
    refresh: str = ""
    read_ahead: bool = True
    tokens_per_second: float = 0.0

    def __post_init__(self) -> None:
        _least("rollout", self, top_k=0, max_tokens=1, context=2, max_running=1, memory_mb=1, tokens_per_second=0)
        if not self.temperature > 0 or not self.timeout > 0:
            raise refuse(OP, "rollout.temperature, timeout", "numbers > 0", f"{self.temperature}, {self.timeout}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """What a rollout earns.

    Args:
        kind: "rules": those of m3/rewards/stage_rewards; the small task has its own.
        steps: verify steps, so that SPAR has violations. penalties: lambda of a violation, over spar.PENALTIES.
        tau: gate of each stage (Eq 6), by its name; others 0.5.
        judge: of rubrics: as open_chat has it (http://host:port/v1#model, embedded:MODEL), or "rules": a clause is met
            where half of its words stand in the answer, for trials. "": nobody.
        rubrics: store of a run's rubrics, which may change while it runs (m3/rewards/rubric_store.py); "": none.
    """

    kind: str = "rules"
    steps: bool = True
    penalties: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tau: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judge: str = ""
    rubrics: str = ""

    def __post_init__(self) -> None:
        check_choice(OP, "rewards.kind", self.kind, ("rules",))
        for name in self.tau:
            check_choice(OP, "rewards.tau", name, tuple(str(phase) for phase in PHASES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run leaves, and how often: as TrainConfig."""

    every: int = 10
    keep: int = 2
    samples_every: int = 10
    samples: int = 4
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _least("checkpoint", self, every=1, keep=1, samples_every=0, samples=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Where it runs.

    Args:
        engine: "here" (m3's loop), "verl" or "trl": whose configuration is built from the recipe.
        device: "cpu" or "cuda". nodes, gpus_per_node: of the run. tensor_parallel: GPUs of one copy of the sampler.
        offload: trainer and sampler take turns on the devices, the other's state in host memory ("verl").
        memory_gib: of one device, for plans; 0: not said.
        max_tokens: of a microbatch. deterministic: as TrainConfig.
        tokens_per_second: trained by all devices together, as measured; for plans. 0: not known.
    """

    engine: str = "here"
    device: str = "cpu"
    nodes: int = 1
    gpus_per_node: int = 1
    tensor_parallel: int = 1
    offload: bool = False
    memory_gib: float = 0.0
    max_tokens: int = 4096  # as TrainConfig
    deterministic: bool = True
    tokens_per_second: float = 0.0

    def __post_init__(self) -> None:
        check_choice(OP, "scale.engine", self.engine, ("here", "verl", "trl"))
        check_choice(OP, "scale.device", self.device, ("cpu", "cuda"))
        _least("scale", self, nodes=1, gpus_per_node=1, tensor_parallel=1, max_tokens=1, tokens_per_second=0)
        if self.devices % self.tensor_parallel:
            raise refuse(OP, "scale.tensor_parallel", f"a divisor of {self.devices} devices", self.tensor_parallel)

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of a stage. ``seed``: of all that is drawn."""

    stage: str
    seed: int = 0
    model: Model = dataclasses.field(default_factory=Model)
    source: Source = dataclasses.field(default_factory=Source)
    objective: Loss = dataclasses.field(default_factory=Loss)
    optim: Optim = dataclasses.field(default_factory=Optim)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    rewards: Rewards = dataclasses.field(default_factory=Rewards)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    scale: Scale = dataclasses.field(default_factory=Scale)

    def __post_init__(self) -> None:
        check_choice(OP, "stage", self.stage, STAGES)
        allowed = {"task-rl": tuple(ALGORITHMS), "offline-distill": DISTILL, "mopd": ("mopd",)}[self.stage]
        check_choice(OP, "objective.algorithm", self.algorithm, allowed)
        self.algorithm_config()

    @property
    def algorithm(self) -> str:
        return self.objective.algorithm or DEFAULT_ALGORITHM[self.stage]

    def algorithm_config(self) -> Any:
        """The ``Config`` of the algorithm with the recipe's numbers; None for forward_kl, which has none.

        Raises:
            ValueError: a number that the algorithm does not have; names the nearest.
        """
        name, numbers = self.algorithm, dict[str, Any](self.objective.numbers)
        kind: Any = {"clip_forward_kl": clip_forward_kl.Config, "mopd": mopd.Config}.get(name) or ALGORITHMS.get(name)
        known = () if kind is None else tuple(one.name for one in dataclasses.fields(kind) if one.name != "penalties")
        for key in numbers:
            if key not in known:
                raise refuse(OP, "objective.numbers", f"numbers of {name}", f"{key!r}{_nearest(key, known)}")
        if kind is None or name not in ALGORITHMS:
            return None if kind is None else kind(**numbers)
        if name == "spar" and self.rewards.penalties:
            from m3.algorithms.spar import PENALTIES

            numbers["penalties"] = {**PENALTIES, **self.rewards.penalties}
        return group_algorithm(name, **numbers)

    def loss(self) -> Objective:
        """The objective of the stage."""
        config = self.algorithm_config()
        if self.algorithm == "forward_kl":
            return Objective(spec=DistillSpec(divergence="forward"))
        if self.algorithm == "clip_forward_kl":
            return Objective(spec=clip_forward_kl.loss_spec(config), aggregation=config.aggregation)
        if self.algorithm == "mopd":
            return Objective(spec=mopd.loss_spec(config), on_policy=True)
        level = None if self.objective.sampler_level == "none" else self.objective.sampler_level
        changes: dict[str, Any] = {"sampler_level": level, "sampler_high": self.objective.sampler_high}
        return Objective(spec=dataclasses.replace(loss_spec(config), **changes))

    def train_config(self) -> TrainConfig:
        """The loop's part."""
        return TrainConfig(
            steps=self.optim.steps,
            max_tokens=self.scale.max_tokens,
            minibatches=self.optim.minibatches,
            epochs=self.optim.epochs,
            optim=self.optim.config,
            checkpoint_every=self.checkpoint.every,
            keep=self.checkpoint.keep,
            samples_every=self.checkpoint.samples_every,
            samples=self.checkpoint.samples,
            tensorboard=self.checkpoint.tensorboard,
            deterministic=self.scale.deterministic,
            seed=self.seed,
        )

    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase(name) for name in self.source.stages)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


# -- reading ----------------------------------------------------------------------------------------------------------
def read(path: str | Path, overrides: Sequence[str] = (), *, stage: str = "") -> Recipe:
    """The recipe of a TOML file, or of a recipe.json, with ``section.key=value`` over it.

    Args:
        stage: that it must be of; "": any.
    Raises:
        ValueError: no such file; not TOML; an unknown key, a value of the wrong kind: with line and nearest name.
    """
    found = parse(Recipe, path, overrides)
    if stage and found.stage != stage:
        raise refuse(OP, str(path), f"a recipe of {stage}", f"one of {found.stage}")
    return found


def located(path: str | Path) -> Path:
    """A recipe's file: as given, else a shipped one: "tiny_cpu/start.toml", with or without "recipes/" before it.

    Raises:
        ValueError: neither is there; names the shipped ones.
    """
    path = Path(path)
    if path.is_file() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == (SHIPPED.name,) else path.parts
    if SHIPPED.joinpath(*parts).is_file():
        return SHIPPED.joinpath(*parts)
    names = ", ".join(sorted(one.relative_to(SHIPPED).as_posix() for one in SHIPPED.rglob("*.toml")))
    raise refuse(OP, "path", f"a file, or a shipped recipe ({names})", str(path))


def parse(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A frozen dataclass of a TOML (or JSON) file; ``read`` for any kind of it. Raises ValueError as ``read``."""
    path = Path(path)
    if not path.is_file():
        raise refuse(OP, "path", "a file", str(path))
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise refuse(OP, str(path), "TOML" if path.suffix != ".json" else "JSON", str(error)) from error
    where = _places(text)
    origin = {key: f"{path}:{line}" for key, line in where.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise refuse(OP, "override", "section.key=value", repr(override))
        _set(data, key, _value(value.strip()), override)
        origin[key] = f"override {override!r}"
    return _build(kind, data, "", lambda key: _origin(origin, key, str(path)))


def save(recipe: Recipe, folder: str | Path) -> Path:
    """Write recipe.json into the folder of a run; its path.

    Raises:
        ValueError: the run there was begun with another recipe; names what differs.
    """
    path = Path(folder) / RESOLVED
    path.parent.mkdir(parents=True, exist_ok=True)
    now = recipe.to_json()
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        free = FREE + (("optim.steps",) if recipe.optim.schedule == "constant" else ())
        other = [key for key in differences(before, now) if not key.startswith(free)]
        if other:
            was = dict(flat(before)).get(other[0])
            raise refuse(OP, str(path), f"the recipe that the run began with, {other[0]} = {was!r}",
                         f"{dict(flat(now)).get(other[0])!r}")  # fmt: skip
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested tables."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, sorted."""
    first, second = dict(flat(one)), dict(flat(other))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _least(section: str, what: Any, **bounds: float) -> None:
    for name, least in bounds.items():
        if not getattr(what, name) >= least:
            raise refuse(OP, f"{section}.{name}", f"a number >= {least}", getattr(what, name))


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; nearest is {found[0]!r}" if found else ""


def _value(text: str) -> Any:
    """A TOML value; what is none is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *tables, last = key.split(".")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise refuse(OP, "override", f"{name!r} to be a section", repr(override))
    data[last] = value


HEADER, KEY = re.compile(r"\s*\[+\s*([^\[\]]+?)\s*\]+"), re.compile(r"""\s*["']?([\w.\- ]+?)["']?\s*=""")


def _places(text: str) -> dict[str, int]:
    """The line of each key and section."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            section = header[1]
            found.setdefault(section, number)
        elif key := KEY.match(line):
            found.setdefault(f"{section}.{key[1]}" if section else key[1], number)
    return found


def _origin(origin: Mapping[str, str], key: str, path: str) -> str:
    """Where a key was given, or the table that it stands in."""
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in origin:
            return origin[name]
    return path


def _build(kind: type[T], data: Any, at: str, where: Callable[[str], str]) -> T:
    """A dataclass of a table."""
    if not isinstance(data, dict):
        raise refuse(OP, where(at), f"a section [{at}]", repr(data))
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        key = f"{at}.{name}" if at else name
        if name not in known:
            want = f"a key of {f'[{at}]' if at else 'a recipe'}"
            raise refuse(OP, where(key), want, f"{name!r}{_nearest(name, known) or f'; it has {sorted(known)}'}")
        values[name] = _typed(hints[name], value, key, where)
    needed = [one.name for one in dataclasses.fields(kind) if _is_needed(one)]  # type: ignore[arg-type]
    for name in needed:
        if name not in values:
            raise refuse(OP, where(at), f"a value of {f'{at}.{name}' if at else name!r}", "none")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{error} ({where(at)})" if at else str(error)) from error


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, key: str, where: Callable[[str], str]) -> Any:
    """A value as its field wants it."""
    form, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(Any, hint), value, key, where)
    if form is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(value):
            return tuple(
                _typed(one, item, f"{key}[{n}]", where) for n, (one, item) in enumerate(zip(kinds, value, strict=True))
            )
    if form is not None and isinstance(form, type) and issubclass(form, Mapping) and isinstance(value, dict):
        return {name: _typed(inner[1], item, f"{key}.{name}", where) for name, item in value.items()}
    if form is types.UnionType and type(value) in (*inner, int):
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise refuse(OP, where(key), f"{key} = {_told(hint)}", repr(value))


def _told(hint: Any) -> str:
    plain = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return plain.get(hint) or str(hint).replace("collections.abc.", "")
