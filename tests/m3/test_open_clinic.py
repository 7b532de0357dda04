"""The three stages on the clinic from recipes, with a tiny model: through run_stage, and going on where a run was."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from letters_model import make_letters_model
from loopback import serving
from safetensors.torch import load_file, save_file

from m3.engine.engine import AsyncEngine
from m3.environment.case import write_cases
from m3.rewards.rubric import HealthBenchRow, Rubric, RubricItem, write_healthbench
from m3.rewards.rubric_store import Provenance, RubricStore
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend
from m3.train.open_clinic import OWN_PROMPTS, Judges, domain_source
from m3.train.open_stage import opened
from m3.train.recipe import Checkpoint as Kept
from m3.train.recipe import Model, Optim, Recipe, Rewards, Rollout, Scale, Source
from m3.train.run_stage import run_stage
from m3.train.trajectory_store import TrajectoryStore
from tests.m3.clinic_cases import small_case
from tests.m3.train_cases import with_one_thread

one_thread = pytest.fixture(scope="module", autouse=True)(with_one_thread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same letters."""
    other = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(folder, other)
    noise = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    moved = {name: one + 0.05 * torch.randn(one.shape, generator=noise) for name, one in weights.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    return str(other)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases, prompts with rubrics that letters decide, a store of rubrics."""
    files = tmp_path_factory.mktemp("files")
    write_cases(files / "cases.jsonl", [small_case(id=f"case-{i}", split="train") for i in range(3)])
    rows = [
        HealthBenchRow(
            prompt_id=f"p{n}", prompt=({"role": "user", "content": "Hi" * n},),
            rubric=Rubric((RubricItem(id="0", criterion="Says a", points=5),), id=f"p{n}"),
        )
        for n in (1, 2, 3)
    ]  # fmt: skip
    write_healthbench(files / "prompts.jsonl", rows)
    bare = [dataclasses.replace(row, rubric=Rubric((), id=row.prompt_id)) for row in rows]
    write_healthbench(files / "bare.jsonl", bare)
    write_healthbench(files / "mixed.jsonl", [*rows[:2], bare[2]])
    with RubricStore(files / "rubrics.jsonl") as store:
        clause = RubricItem(id="a", criterion="Says a", points=5)
        store.add_core("case-1", [clause], Provenance(author="human", by="A. Expert"))
    return files


def recipe(stage: str, folder: Path, files: Path, steps: int, **sections: dict) -> Recipe:
    teachers = {} if stage == "task-rl" else {"inquiry": str(folder), "advisory": str(folder)}
    made = {
        "model": Model(**{"name": str(folder), "teachers": teachers, **sections.get("model", {})}),
        "source": Source(**{
            "kind": "clinic", "cases": str(files / "cases.jsonl"), "groups": 1, "rollouts": 2, "max_turns": 2,
            "stages": ("inquiry",), "samples": 4, "prompts": {"advisory": str(files / "prompts.jsonl")},
            **sections.get("source", {}),
        }),
        "rollout": Rollout(**{"max_tokens": 8, "context": 1024, "memory_mb": 16, **sections.get("rollout", {})}),
        "rewards": Rewards(**{"judge": "rules", **sections.get("rewards", {})}),
    }  # fmt: skip
    return Recipe(
        stage=stage, seed=1, optim=Optim(steps=steps, lr=1e-2), scale=Scale(max_tokens=700),
        checkpoint=Kept(every=1, samples_every=1, tensorboard=False), **made,
    )  # fmt: skip


def run(recipe: Recipe, out: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """(weights, lines of metrics) at the end of a run."""
    ended = asyncio.run(run_stage(recipe, out))
    assert ended.outcome.model is not None
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return load_file(ended.outcome.model / "model.safetensors"), [json.loads(line) for line in lines]


STAGES = {
    "task-rl": ("task-rl", {}),
    "task-rl of prompts": ("task-rl", {"source": {"domain": "advisory"}}),
    "with a store of rubrics": ("task-rl", {"rewards": {"rubrics": "rubrics.jsonl"}}),
    "offline-distill": ("offline-distill", {}),
    "mopd": ("mopd", {}),
}


@pytest.mark.parametrize(("stage", "sections"), STAGES.values(), ids=STAGES)
def test_a_run_that_goes_on_is_one_that_was_not_interrupted(folder, teacher, files, tmp_path, stage, sections):
    if stage == "mopd":
        sections = {"model": {"teachers": dict.fromkeys(("inquiry", "advisory"), teacher)}}
    if "rewards" in sections:
        sections = {"rewards": {"rubrics": str(files / sections["rewards"]["rubrics"])}}
    run(recipe(stage, folder, files, 1, **sections), tmp_path / "parts")
    parts, lines = run(recipe(stage, folder, files, 2, **sections), tmp_path / "parts")
    whole, wanted = run(recipe(stage, folder, files, 2, **sections), tmp_path / "whole")
    start = load_file(folder / "model.safetensors")
    assert lines == wanted and len(lines) == 2
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert stage == "task-rl" or any(not torch.equal(whole[name], start[name]) for name in start)
    if stage == "task-rl" and "source" not in sections:
        assert abs(lines[0]["sampler_gap"]) < 1e-4 and lines[0]["sampler_weight"] == pytest.approx(1, abs=1e-3)
    if stage == "mopd":
        assert {"advisory/reverse_kl", "inquiry/reverse_kl", "advisory/reward/prompts"} <= lines[0].keys()
        assert abs(lines[0]["inquiry/reverse_kl"]) > 1e-4
    if "rewards" in sections:
        assert [line["rubrics_version"] for line in lines] == [1, 1]


def test_teachers_roll_out_into_a_store_that_another_run_goes_on_from(folder, files, tmp_path):
    drawn = recipe("offline-distill", folder, files, 1, source={"folder": str(tmp_path / "drawn")})
    run(drawn, tmp_path / "one")
    with TrajectoryStore(tmp_path / "drawn" / "trajectories") as store:
        assert {domain: store.count(domain) for domain in store.domains} == {"inquiry": 4, "advisory": 4}
        before = {shard.file: shard.sha256 for shard in store.shards}
        assert {shard.teacher for shard in store.shards} == {str(folder)}
    more = dataclasses.replace(drawn, source=dataclasses.replace(drawn.source, samples=6))
    _, lines = run(more, tmp_path / "two")
    with TrajectoryStore(tmp_path / "drawn" / "trajectories") as store:
        after = {shard.file: shard.sha256 for shard in store.shards}
        assert len(after) == 6 and before.items() < after.items()
    assert lines[0]["samples"] == 2


@contextlib.contextmanager
def served(folder: Path, weights: Path) -> Iterator[str]:
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", weights_from=weights)
    with serving(build(backend)) as url:
        yield url


def test_a_student_on_a_server_learns_as_one_on_the_engine(folder, files, tmp_path):
    here, lines = run(recipe("task-rl", folder, files, 2), tmp_path / "here")
    with served(folder, tmp_path) as url:
        hook = f"{url.removesuffix('/v1')}/update_weights_from_disk"
        rollout = {"server": f"{url}#letters", "refresh": hook}
        there, others = run(recipe("task-rl", folder, files, 2, rollout=rollout), tmp_path / "there")
    for line, other in zip(lines, others, strict=True):
        for name in ("reward", "tokens_sampled", "turns", "loss"):
            assert line[name] == pytest.approx(other[name], abs=1e-5), name
        assert abs(other["sampler_gap"]) < 1e-4
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, atol=1e-3, rtol=0)


def test_teachers_on_a_server(folder, files, tmp_path):
    with served(folder, tmp_path) as url:
        teachers = {"inquiry": f"{url}#letters", "advisory": f"{url}#letters"}
        _, lines = run(recipe("mopd", folder, files, 1, model={"teachers": teachers}), tmp_path / "mopd")
        run(recipe("offline-distill", folder, files, 1, model={"teachers": teachers}), tmp_path / "drawn")
    assert abs(lines[0]["inquiry/reverse_kl"]) < 1e-4
    with TrajectoryStore(tmp_path / "drawn" / "trajectories") as store:
        assert {shard.teacher for shard in store.shards} == {"letters"}


REFUSED = {
    "a domain without prompts": (
        "mopd", {"source": {"prompts": {}}}, r"source.prompts: .*but \['inquiry'\].*'advisory'"),
    "no teacher": ("offline-distill", {"model": {"teachers": {}}}, "model.teachers: want a teacher by domain"),
    "answers that nobody judges": (
        "task-rl", {"source": {"domain": "advisory"}, "rewards": {"judge": ""}}, "a rubric of each prompt and rewards"),
    "prompts that no rubric judges": (
        "task-rl", {"source": {"domain": "advisory", "prompts": {"advisory": "bare.jsonl"}}}, "none of 'p1'"),
    "prompts that some rubric judges": (
        "mopd", {"source": {"prompts": {"advisory": "mixed.jsonl"}}}, "or of none; got none of 'p3'"),
    "a store that nobody judges": (
        "task-rl", {"rewards": {"judge": "", "rubrics": "rubrics.jsonl"}}, "rewards.judge: want who judges"),
    "no case": ("task-rl", {"source": {"split": "held_out"}}, "source.split: want the split of some case"),
    "a server without a model": (
        "task-rl", {"rollout": {"server": "http://127.0.0.1:9/v1"}}, "http://host:port/v1#model"),
    "a filter where a server draws": (
        "task-rl", {"rollout": {"server": "http://127.0.0.1:9/v1#m", "top_k": 5}}, "where a server draws"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "sections", "match"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(folder, files, tmp_path, stage, sections, match):
    if "rubrics" in sections.get("rewards", {}):
        sections = {"rewards": {**sections["rewards"], "rubrics": str(files / "rubrics.jsonl")}}
    source = {"folder": str(tmp_path), **sections.get("source", {})}
    if source.get("prompts"):
        source["prompts"] = {domain: str(files / name) for domain, name in source["prompts"].items()}
    made = recipe(stage, folder, files, 1, **{**sections, "source": source})

    async def main() -> None:
        async with opened(made):
            raise AssertionError("it opens")

    with pytest.raises(ValueError, match=match):
        asyncio.run(main())


def test_prompts_without_a_rubric_have_their_teacher_alone(folder, files, tmp_path):
    prompts = {"advisory": str(files / "bare.jsonl")}
    _, lines = run(recipe("mopd", folder, files, 1, source={"prompts": prompts}), tmp_path)
    assert lines[0]["advisory/outcome"] == 0 and "advisory/reward/prompts" not in lines[0]


def test_our_prompts_have_rubrics(folder, files):
    made = recipe("mopd", folder, files, 1, source={"prompts": {"advisory": "own"}})

    class Physician:
        name, temperature, version, sampling, filtered = "p", 1.0, 0, "none", False

    source = domain_source(made, "advisory", Physician(), dict, Judges(judge=None, store=None), {})
    assert source.state()["taken"] == 0
    rows = [json.loads(line) for line in OWN_PROMPTS.read_text().splitlines()]
    assert len(rows) == 8 and all(len(row["rubrics"]) >= 3 for row in rows)
