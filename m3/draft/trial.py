"""A draft in minutes, and whether it pays here: what ``m3 quickstart`` shows of speculation."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from m3.draft.generate import EngineGenerator, Plan, fill, prompt_ids
from m3.draft.hidden import StateCache, teach
from m3.draft.prompts import PromptSet, read_prompts
from m3.draft.store import TRAIN, Store
from m3.draft.train import TrainConfig, Trainer
from m3.engine.config import EngineConfig
from m3.engine.core import Draft, EngineCore
from m3.engine.request import SamplingParams, Tokens
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # (what is going on, units done, units in all)

TOKENS_A_MINUTE = 5000  # responses to learn from, for each minute of training
RESPONSE = 96  # tokens
PROMPTS = 6  # held out, to measure on
PAYS = 1.02  # ratio from which a gain is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One target: tokens a second plain and with the draft, tokens a pass, and what the controller came to use."""

    name: str
    plain: float
    drafted: float
    tokens_per_pass: float
    same_text: bool

    @property
    def ratio(self) -> float:
        return self.drafted / self.plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of it."""

    rows: tuple[Row, ...]
    responses: int
    seconds: float

    def table(self) -> Table:
        table = Table(title=f"with a draft trained for {self.seconds / 60:.1f} minutes on {self.responses} tokens")
        for column in ("target", "plain tokens/s", "with the draft", "ratio", "tokens a pass", "text"):
            table.add_column(column, justify="left" if column in ("target", "text") else "right")
        for row in self.rows:
            figures = (f"{row.plain:.1f}", f"{row.drafted:.1f}", f"{row.ratio:.2f}", f"{row.tokens_per_pass:.2f}")
            table.add_row(row.name, *figures, "the same" if row.same_text else "DIFFERS")
        return table

    def verdict(self) -> str:
        """In words, for each target."""
        said = []
        for row in self.rows:
            if row.ratio >= PAYS:
                said.append(f"{row.name}: the draft makes it {100 * (row.ratio - 1):.0f} % faster.")
            else:
                said.append(f"{row.name}: the draft does not pay on this machine (ratio {row.ratio:.2f}).")
        return " ".join(said)


def trial(full: Decoder, int4: Decoder, tokenizer: Tokenizer, *, minutes: float, progress: Progress) -> Trial:
    """Let the INT4 model respond, train a draft on it for ``minutes``, decode held-out prompts with both."""
    prompts = read_prompts()
    aux = GatedEagle3Config.for_target(full.config, draft_vocab_size=1, gate="none").aux_layers
    hidden = full.config.hidden_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(folder / "responses.jsonl", target="trial", fingerprint="trial")
        cache = StateCache(folder / "states", fingerprint="trial", aux_layers=aux, hidden_size=hidden)
        with store, cache:
            wanted = max(int(TOKENS_A_MINUTE * minutes), 512)
            plan = Plan(tokens=wanted, held_out=0, out_of_template=0, max_tokens=RESPONSE, round=64)
            texts = PromptSet(train=prompts.train, held_out=(), out_of_template=())
            generator = EngineGenerator(int4)
            fill(store, generator, texts, tokenizer, plan, progress=lambda a, b: progress("responses", a, b))
            learned = store.group(TRAIN)
            teach(full, learned, cache, aux, progress=lambda a, b: progress("teacher pass", a, b))
            config = TrainConfig(minutes=minutes, evaluations=0, checkpoint_seconds=1e9)
            trainer = Trainer(full, learned, [], cache, folder / "run", config, aux_layers=aux)
            draft = trainer.run(lambda share, line: progress(line, int(1000 * share), 1000))
            seconds = trainer.seconds
    asked = [prompt_ids(tokenizer, text) for text in prompts.held_out[:: max(1, len(prompts.held_out) // PROMPTS)]]
    targets = ((f"{str(full.dtype).removeprefix('torch.')}", full), ("INT4", int4))
    rows = []
    for index, (label, target) in enumerate(targets):
        progress("decoding", index, len(targets))
        rows.append(compare(label, target, draft, asked[:PROMPTS]))
    return Trial(rows=tuple(rows), responses=sum(len(one.response) for one in learned), seconds=seconds)


def compare(label: str, target: Decoder, draft: GatedEagle3, prompts: list[list[int]]) -> Row:
    """Greedy decoding of each prompt alone, plain and with the draft in turn."""
    config = EngineConfig(max_running=4, memory_mb=128)
    plain = EngineCore(target, config)
    drafted = EngineCore(target, config, draft=Draft(config=draft.config, tensors=draft.state_dict()))
    seconds = {id(plain): 0.0, id(drafted): 0.0}
    texts: dict[int, list[list[int]]] = {id(plain): [], id(drafted): []}
    counts = [0, 0]
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first warms up
        for core in (plain, drafted) if number % 2 else (drafted, plain):
            before = core.stats.steps
            text, took = _decode(core, prompt, str(number))
            if number == 0:
                continue
            seconds[id(core)] += took
            texts[id(core)].append(text)
            if core is drafted:
                counts = [counts[0] + len(text), counts[1] + core.stats.steps - before]
    tokens = sum(map(len, texts[id(plain)]))
    return Row(
        name=label,
        plain=tokens / seconds[id(plain)],
        drafted=tokens / seconds[id(drafted)],
        tokens_per_pass=counts[0] / max(counts[1], 1),
        same_text=texts[id(plain)] == texts[id(drafted)],
    )


def _decode(core: EngineCore, prompt: list[int], id: str) -> tuple[list[int], float]:
    params = SamplingParams(max_tokens=RESPONSE, ignore_eos=True)
    core.add(core.new_request(id, prompt, params, 0))
    text: list[int] = []
    start = 0.0
    while core.has_work():
        for event in core.step():
            if isinstance(event, Tokens):
                start = start or time.perf_counter()  # of the first token: the prompt is not counted
                text += event.tokens
    return text, time.perf_counter() - start
