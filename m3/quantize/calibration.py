"""What a checkpoint is calibrated on: S sequences of L tokens, the model's own words or a file's.

    self     prompts of four domains in two languages (m3/data/calibration.jsonl), each answered by the model itself at
             temperature 1. A sequence is conversations of one domain, one after another from the beginning of the
             first; the last is cut, and the next sequence begins with the next conversation. Sequences go round the
             domains. Of a mixture of experts more are made than asked for, and those are kept that serve rare experts
    a file   text, or JSON lines with "text" or "messages" (and "domain", if you like), in an order of the seed's, cut
             into sequences

Responses go to a file as they come: a run that was stopped goes on, and gives what an uninterrupted one gives. A model
that does not fit on this machine is answered for elsewhere, and its conversations come as a file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from m3.checkpoint import read_json
from m3.draft.generate import EngineGenerator, Generator, Request, prompt_ids
from m3.draft.store import LineFile, fingerprint
from m3.models.decoder import Decoder, DecoderConfig
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.coverage import Coverage, count, pick
from m3kernels.checks import refuse

SELF = "self"
BUILT_IN = Path(__file__).parent.parent / "data" / "calibration.jsonl"
FORMAT = "m3 calibration responses 1"
FILE_DOMAIN = "file"  # of a text that names none
PIECE = 1 << 16  # characters of a text file that are taken at a time, to the end of their line
POOL = 2  # sequences made of a mixture of experts, for each that is kept (ours)
PASSES = 64  # over the prompts, at most: a model that says nothing does not keep us
Progress = Callable[[int, int], None]  # (sequences done, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    domain: str
    language: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """ids: S tensors (L,) int64. domains: of each. source: "self", or name of a file. coverage: of ``ids``, where it
    was counted.
    """

    ids: tuple[Tensor, ...]
    domains: tuple[str, ...]
    source: str
    coverage: Coverage | None = None

    def __post_init__(self) -> None:
        shapes = {tuple(one.shape) for one in self.ids}
        if len(shapes) != 1 or len(shape := shapes.copy().pop()) != 1 or shape[0] < 2:
            raise refuse(
                "calibration", "ids", "one sequence or more, of one length of 2 tokens or more", sorted(shapes)
            )
        if len(self.domains) != len(self.ids):
            raise refuse("calibration", "domains", f"{len(self.ids)}, one a sequence", len(self.domains))

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self.ids) * len(self.ids[0])

    def stacked(self) -> Tensor:
        """(S, L) int64."""
        return torch.stack(self.ids)

    def some(self, which: Sequence[int], coverage: Coverage | None = None) -> Calibration:
        """The sequences of these numbers."""
        return Calibration(
            ids=tuple(self.ids[index] for index in which),
            domains=tuple(self.domains[index] for index in which),
            source=self.source,
            coverage=coverage,
        )

    def digest(self) -> str:
        """SHA-256 of the tokens and their order."""
        return hashlib.sha256(self.stacked().numpy().tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """samples (sequences), tokens (of each) and seed. least_tokens: wanted for every expert of every layer, by which
    the model's own sequences are picked; 0 for as they come. temperature, max_tokens: of a response.
    """

    samples: int = 128  # with 2048 tokens, what GPTQ and AutoRound take
    tokens: int = 512  # ours: a CPU answers
    seed: int = 0
    least_tokens: int = 0
    temperature: float = 1.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tokens", 2), ("max_tokens", 1), ("least_tokens", 0)):
            if getattr(self, name) < least:
                raise refuse("calibration", name, f"at least {least}", getattr(self, name))


def calibration_of(
    source: str | Path,
    model: str | Path,
    config: CalibrationConfig,
    *,
    store: str | Path,
    generator: Callable[[], Generator] | None = None,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """The sequences to calibrate ``model`` on.

    Args:
        source: "self", or a file.
        model: folder of a checkpoint. It is loaded to answer prompts, and to count what its experts get.
        store: file of the responses; is made, or gone on with. Not used with a file.
        generator: makes what answers in place of the engine; called if a response is missing.
    Raises:
        ValueError: a file that cannot be read or is too short, responses of another model or for other settings in
            ``store``, a model that says too little.
    """
    tokenizer, fields = Tokenizer(model), read_json(Path(model) / "config.json")
    most = fields.get("max_position_embeddings")
    if isinstance(most, int) and config.tokens > most:
        raise refuse("calibration", "tokens", f"at most the model's {most}", config.tokens)
    if str(source) != SELF:
        return from_file(source, tokenizer, config)
    sizes = DecoderConfig.from_hf(fields)
    loaded: list[Decoder] = []

    def load() -> Decoder:
        if not loaded:
            loaded.append(load_model(model))
        return loaded[0]

    responses = Responses(store, model, read_prompts(), tokenizer, config)
    try:
        experts = sizes.num_experts > 0 and config.least_tokens > 0
        wanted = config.samples * (POOL if experts else 1)
        found = from_self(responses, generator or (lambda: EngineGenerator(load())), wanted, progress)
    finally:
        responses.close()
    if not experts:
        return found
    coverage = count(load(), found.ids)
    which = pick(coverage, config.samples, config.least_tokens)
    return found.some(which, coverage.some(which))


# -- the model's own words --------------------------------------------------------------------------------------------
def read_prompts(path: str | Path | None = None) -> tuple[Prompt, ...]:
    """The prompts of a file of JSON lines with domain, language and prompt; the built-in ones.

    Raises ValueError naming the line.
    """
    path = BUILT_IN if path is None else Path(path)
    found = []
    for where, fields in _json_lines(path):
        values = [fields.get(key) for key in ("domain", "language", "prompt")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise refuse("calibration", where, '"domain", "language" and "prompt", texts', f"{fields}"[:200])
        domain, language, text = map(str, values)
        found.append(Prompt(domain=domain, language=language, text=text))
    if not found:
        raise refuse("calibration", str(path), "a prompt or more", "none")
    return tuple(found)


def order_of(prompts: Sequence[Prompt], seed: int) -> dict[str, list[str]]:
    """The prompts of each domain in an order of the seed's, the languages taking turns."""
    found: dict[str, list[str]] = {}
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.domain == domain]
        turns = []
        for language in dict.fromkeys(prompt.language for prompt in own):
            texts = [prompt.text for prompt in own if prompt.language == language]
            random.Random(f"calibration {seed} {domain} {language}").shuffle(texts)
            turns += [(turn, text) for turn, text in enumerate(texts)]
        found[domain] = [text for _, text in sorted(turns, key=lambda one: one[0])]
    return found


class Responses:
    """Conversations of a model with itself in a file, numbered from 0 in each domain; see m3.draft.store.

    Raises ValueError: responses of another model, or for other prompts or settings.
    """

    def __init__(
        self,
        path: str | Path,
        model: str | Path,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        config: CalibrationConfig,
    ) -> None:
        self.order = order_of(prompts, config.seed)
        self.tokenizer, self.config = tokenizer, config
        settings = [[prompt.domain, prompt.language, prompt.text] for prompt in prompts]
        header = {
            "format": FORMAT,
            "model": fingerprint(model),
            "prompts": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
            "seed": config.seed,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        self.file = LineFile(path, header)
        for key, value in header.items():
            if self.file.found is not None and self.file.found.get(key) != value:
                raise refuse("calibration", f"{path}: {key}", f"{value!r}", f"{self.file.found.get(key)!r}")
        self.rows: dict[tuple[str, int], list[int]] = {}
        for line in self.file.lines:
            self.rows[line["domain"], line["index"]] = [*line["prompt"], *line["response"]]

    def first(self, domain: str, number: int) -> list[list[int]]:
        """The conversations 0 .. number - 1 of a domain, up to the first that is not there."""
        found = []
        for index in range(number):
            if (domain, index) not in self.rows:
                break
            found.append(self.rows[domain, index])
        return found

    def request(self, domain: str, index: int) -> Request:
        texts = self.order[domain]
        number = index * len(self.order) + list(self.order).index(domain)
        ids = prompt_ids(self.tokenizer, texts[index % len(texts)])
        return Request(ids, self.config.temperature, self.config.seed * 1_000_003 + number, self.config.max_tokens)

    def fill(self, generator: Generator, numbers: Mapping[str, int]) -> None:
        """Have so many of each domain."""
        keys = [(domain, index) for domain, number in numbers.items() for index in range(number)]
        keys = [key for key in keys if key not in self.rows]
        requests = [self.request(*key) for key in keys]
        for which, tokens in generator.generate(requests):
            (domain, index), prompt = keys[which], list(requests[which].prompt)
            self.file.append({"domain": domain, "index": index, "prompt": prompt, "response": tokens})
            self.rows[domain, index] = [*prompt, *tokens]
        self.file.sync()

    def close(self) -> None:
        self.file.close()


def packed(conversations: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Sequences of ``tokens``, each from the beginning of a conversation; what is left of its last one is dropped."""
    found, row = [], list[int]()
    for conversation in conversations:
        row += conversation[: tokens - len(row)]
        if len(row) == tokens:
            found.append(row)
            row = []
    return found


def from_self(
    responses: Responses,
    generator: Callable[[], Generator],
    samples: int,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """``samples`` sequences, as many of each domain as of the others (the first have one more).

    Args:
        generator: makes what answers; called once, if a response is missing.
    """
    generate = functools.cache(generator)
    domains, tokens = list(responses.order), responses.config.tokens
    wanted = {domain: len(range(at, samples, len(domains))) for at, domain in enumerate(domains)}
    numbers = dict.fromkeys(domains, 0)
    while True:
        rows = {domain: packed(responses.first(domain, number), tokens) for domain, number in numbers.items()}
        done = sum(min(len(rows[domain]), wanted[domain]) for domain in domains)
        progress(done, samples)
        if done == samples:
            break
        for domain in domains:
            missing, most = wanted[domain] - len(rows[domain]), PASSES * len(responses.order[domain])
            if missing > 0 and numbers[domain] == most:
                want = f"{wanted[domain]} sequences of {tokens} tokens"
                got = f"{len(rows[domain])} of them after {PASSES} passes over the prompts"
                raise refuse("calibration", f"responses ({domain})", want, got)
            if missing > 0:
                more = max(4, missing * tokens // (responses.config.max_tokens + 1))
                numbers[domain] = min(numbers[domain] + more, most)
        if any(len(responses.first(domain, number)) < number for domain, number in numbers.items()):
            responses.fill(generate(), numbers)
    turns = [(at % len(domains), at // len(domains)) for at in range(samples)]
    return Calibration(
        ids=tuple(torch.tensor(rows[domains[which]][turn]) for which, turn in turns),
        domains=tuple(domains[which] for which, _ in turns),
        source=SELF,
    )


# -- a file -----------------------------------------------------------------------------------------------------------
def from_file(path: str | Path, tokenizer: Tokenizer, config: CalibrationConfig) -> Calibration:
    """Sequences of a text file or, if it is named .jsonl, of JSON lines.

    Raises ValueError: not to be read, not UTF-8, a line of another form, or fewer tokens than asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise refuse("calibration", "FILE", "'self', a text file or a .jsonl file", str(path))
    documents = list(_documents(path, tokenizer))
    random.Random(f"calibration {config.seed}").shuffle(documents)
    ids: list[Tensor] = []
    domains: list[str] = []
    rest: dict[str, list[int]] = {}
    total = 0
    for domain, document in documents:
        row = rest.setdefault(domain, [])
        encoded = (
            tokenizer.encode(document)
            if isinstance(document, str)
            else tokenizer.chat(document, add_generation_prompt=False)
        )
        total += len(encoded)
        row += encoded
        while len(row) >= config.tokens and len(ids) < config.samples:
            ids.append(torch.tensor(row[: config.tokens]))
            domains.append(domain)
            del row[: config.tokens]
        if len(ids) == config.samples:
            return Calibration(ids=tuple(ids), domains=tuple(domains), source=path.name)
    want = f"{config.samples} sequences of {config.tokens} tokens (or ask for fewer or shorter ones)"
    raise refuse("calibration", str(path), want, f"{len(ids)} of them, {total} tokens")


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, str | list[dict[str, str]]]]:
    """(domain, text or messages)."""
    if path.suffix != ".jsonl":
        whole, start = _text(path), 0
        while start < len(whole):
            stop = whole.find("\n", start + PIECE) + 1 or len(whole)
            yield FILE_DOMAIN, whole[start:stop]
            start = stop
        return
    for where, fields in _json_lines(path):
        domain: Any = fields.get("domain", FILE_DOMAIN)
        text, messages = fields.get("text"), fields.get("messages")
        if isinstance(domain, str) and isinstance(text, str) and messages is None:
            yield domain, text
        elif isinstance(domain, str) and text is None and _are_messages(messages):
            if tokenizer.template is None:
                raise refuse("calibration", where, '"text": this model has no chat template', '"messages"')
            yield domain, messages
        else:
            want = '"text", or "messages" of objects with "role" and "content"; and "domain", a text, if at all'
            raise refuse("calibration", where, want, f"{fields}"[:200])


def _are_messages(messages: Any) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("calibration", str(path), "a file of UTF-8 text", f"{error}") from error
    if not text.strip():
        raise refuse("calibration", str(path), "text", "an empty file")
    return text


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not empty."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise refuse("calibration", where, "a JSON object", f"{error}") from error
        if not isinstance(fields, dict):
            raise refuse("calibration", where, "a JSON object", line[:60])
        yield where, fields
