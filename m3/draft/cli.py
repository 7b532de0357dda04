"""``m3 draft``: train a draft for a model on the model's own responses, and measure how much of it is accepted.

m3.cli adds ``app``; what a command needs is imported when it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3.terminal import Bar, Debug, Threads, console, one_line_errors, open_model, set_threads
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.draft.evaluate import Acceptance, Shape
    from m3.draft.hidden import StateCache
    from m3.draft.store import Response, Store
    from m3.models.decoder import Decoder
    from m3.models.gated_eagle3 import GatedEagle3

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

RESPONSES, STATES, CARD = "responses.jsonl", "states", "card.json"

Target = Annotated[str, typer.Argument(help="The model that the draft is for: a checkpoint folder or a name.")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="Own prompts: TOML of topics and templates, or one prompt a line.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of responses and hidden states; default OUT/data."),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", help="steps,topk,nodes of a tree; topk 1 is a chain. May be given again."),
]
Responses = Annotated[
    int | None, typer.Option("--responses", min=1, help="Held-out responses of each kind to measure on; default all.")
]


def parse_shapes(texts: list[str] | None) -> tuple[Shape, ...]:
    from m3.draft.evaluate import SHAPES, Shape

    if not texts:
        return SHAPES
    found = []
    for text in texts:
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise refuse("draft", "--shape", "steps,topk,nodes, as in 4,4,8", text)
        found.append(Shape(steps=int(parts[0]), topk=int(parts[1]), nodes=int(parts[2])))
    return tuple(found)


@app.command()
@one_line_errors
def train(
    target: Target,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the draft lies in it in the end.")],
    gate: Annotated[str, typer.Option("--gate", help="elementwise, headwise or none.")] = "elementwise",
    minutes: Annotated[float | None, typer.Option("--minutes", help="Of training; the default is 35.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the optimiser, instead of minutes.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Response tokens to train on, at least.")] = 160_000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of one response.")] = 256,
    ttt: Annotated[int, typer.Option("--ttt", min=1, help="Steps of the training-time test.")] = 2,
    lr: Annotated[float, typer.Option("--lr", help="Largest learning rate.")] = 2e-3,
    draft_vocab: Annotated[int, typer.Option("--draft-vocab", min=1, help="Tokens that it can propose.")] = 8192,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, help="Of a step, prompts included.")] = 1024,
    seed: Annotated[int, typer.Option("--seed", help="Of the start and of the order of the data.")] = 0,
    prompts: Prompts = None,
    data: Data = None,
    shape: Shapes = None,
    responses: Responses = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Let a model respond to prompts, train a draft on what it said, and measure it. The same command goes on."""
    from m3.draft.generate import EngineGenerator, Plan, fill
    from m3.draft.hidden import teach
    from m3.draft.prompts import read_prompts
    from m3.draft.store import HELD_OUT, TRAIN
    from m3.draft.train import TrainConfig, Trainer

    set_threads(threads)
    shapes = parse_shapes(shape)
    minutes = 35.0 if minutes is None and steps is None else minutes
    config = TrainConfig(
        gate=gate,
        minutes=minutes,
        steps=steps,
        ttt=ttt,
        lr=lr,
        draft_vocab=draft_vocab,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    texts = read_prompts(prompts)
    folder, model, tokenizer = open_model(target)
    aux_layers = default_aux_layers(model)
    store, cache = open_data(out / "data" if data is None else data, folder, model, aux_layers)
    with store, cache:
        if store.tokens(TRAIN) < tokens:
            with Bar("response tokens") as bar:
                generator = EngineGenerator(model)
                plan = Plan(tokens=tokens, max_tokens=max_tokens)
                fill(store, generator, texts, tokenizer, plan, progress=bar.step)
        chosen, held_out = store.first(TRAIN, tokens), store.group(HELD_OUT)
        with Bar("teacher pass") as bar:
            teach(model, [*chosen, *tested(store)], cache, aux_layers, progress=bar.step)
        trainer = Trainer(model, chosen, held_out, cache, out, config, aux_layers=aux_layers, data=digest(chosen))
        with Bar("training") as bar:
            draft = trainer.run(lambda share, line: bar.fetch(line, int(1000 * share), 1000))
        found = measure(draft, store, cache, shapes, responses)
        card = {
            "target": target,
            "training": dataclasses.asdict(config),
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "responses": len(chosen),
            "response_tokens": sum(len(one.response) for one in chosen),
            "data": digest(chosen),
            "held_out_accuracy": trainer.accuracy(held_out) if held_out else [],
            "acceptance": found,
        }
        save(draft, out, card)
    show(found)
    console.print(f"{out}: {trainer.step} steps in {trainer.seconds / 60:.1f} minutes", highlight=False, soft_wrap=True)


@app.command()
@one_line_errors
def evaluate(
    target: Target,
    draft: Annotated[Path, typer.Argument(help="Folder of the draft.")],
    data: Data = None,
    shape: Shapes = None,
    responses: Responses = None,
    prompts: Prompts = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Acceptance length of a draft, greedy: held-out prompts and prompts of no template."""
    from m3.draft.generate import EngineGenerator, Plan, fill
    from m3.draft.hidden import teach
    from m3.draft.prompts import read_prompts
    from m3.draft.train import write_whole

    set_threads(threads)
    shapes = parse_shapes(shape)
    folder, model, tokenizer = open_model(target)
    net = load(draft, model)
    aux_layers = net.config.aux_layers
    store, cache = open_data(draft / "data" if data is None else data, folder, model, aux_layers)
    with store, cache:
        if not tested(store):
            with Bar("responses") as bar:
                generator = EngineGenerator(model)
                texts = dataclasses.replace(read_prompts(prompts), train=())
                fill(store, generator, texts, tokenizer, Plan(), progress=bar.step)
        with Bar("teacher pass") as bar:
            teach(model, tested(store), cache, aux_layers, progress=bar.step)
        found = measure(net, store, cache, shapes, responses)
    if json_out is not None:
        write_whole(json_out, json.dumps(found, indent=1).encode())
    show(found)


# -- parts ------------------------------------------------------------------------------------------------------------
def default_aux_layers(model: Decoder) -> tuple[int, ...]:
    from m3.models.gated_eagle3 import GatedEagle3Config

    return GatedEagle3Config.for_target(model.config, draft_vocab_size=1, gate="none").aux_layers


def open_data(data: Path, folder: Path, model: Decoder, aux_layers: tuple[int, ...]) -> tuple[Store, StateCache]:
    from m3.draft.hidden import StateCache
    from m3.draft.store import Store, fingerprint

    mark = fingerprint(folder)
    store = Store(data / RESPONSES, target=folder.name, fingerprint=mark)
    hidden_size = model.config.hidden_size
    return store, StateCache(data / STATES, fingerprint=mark, aux_layers=aux_layers, hidden_size=hidden_size)


def digest(responses: list[Response]) -> str:
    """What names a choice of responses."""
    text = json.dumps([(one.prompt, one.response) for one in responses])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tested(store: Store) -> list[Response]:
    """The responses that nothing is trained on."""
    from m3.draft.store import TRAIN

    return [one for one in store.responses if one.group != TRAIN]


def measure(
    draft: GatedEagle3, store: Store, cache: StateCache, shapes: tuple[Shape, ...], most: int | None
) -> dict[str, Any]:
    """Acceptance of every shape on the first ``most`` responses of each group that nothing is trained on."""
    from m3.draft.evaluate import evaluate
    from m3.draft.store import HELD_OUT, OUT_OF_TEMPLATE

    found: dict[str, Any] = {}
    for group in (HELD_OUT, OUT_OF_TEMPLATE):
        responses = store.group(group)[:most]
        if responses:
            with Bar(f"acceptance, {group.replace('_', ' ')}") as bar:
                found[group] = [row_of(one) for one in evaluate(draft, responses, cache, shapes, bar.step)]
    return found


def row_of(one: Acceptance) -> dict[str, Any]:
    shape = dataclasses.asdict(one.shape)
    return {**shape, "name": str(one.shape), "length": one.length, "rounds": one.rounds, "tokens": one.tokens}


def show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="tokens a round, greedy, the target's own included")
    table.add_column("draft")
    for group in found:
        table.add_column(group.replace("_", " "), justify="right")
    for rows in zip(*found.values(), strict=True):
        table.add_row(rows[0]["name"], *(f"{row['length']:.2f}" for row in rows))
    console.print(table)


def save(draft: GatedEagle3, out: Path, card: dict[str, Any]) -> None:
    from m3.draft.layouts import save_draft
    from m3.draft.train import write_whole

    save_draft(out, draft.config, draft.state_dict())
    write_whole(out / CARD, json.dumps(card, indent=1).encode())


def load(folder: Path, model: Decoder) -> GatedEagle3:
    from m3.draft.layouts import build_draft, load_draft

    return build_draft(*load_draft(folder, model.config), model.embedding).eval()
