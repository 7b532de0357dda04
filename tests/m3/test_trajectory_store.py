"""The store of trajectories: what comes back, what a kill leaves, and damage that is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from m3.train.streams import Sample
from m3.train.trajectory_store import MANIFEST, TrajectoryStore
from tests.m3.train_cases import draw_samples


def drawn(seed: str, domain: str = "inquiry", lengths: tuple[int, ...] = (9, 4, 17)) -> list[Sample]:
    return draw_samples(seed, lengths, streams=("teacher_logprobs",))


def fill(folder: Path, shards: int = 3) -> None:
    with TrajectoryStore(folder) as store:
        for number in range(shards):
            store.append("inquiry", drawn(f"i{number}"), teacher="a", state={"step": number})
            store.append("general", drawn(f"g{number}", lengths=(5,)), teacher="b", state={})


def test_samples_come_back_as_they_were(tmp_path):
    made = drawn("x")[1]
    sample = Sample(
        id="c@0/1", ids=made.ids, mask=made.mask, steps=made.steps, teacher_logprobs=made.teacher_logprobs,
        domain="inquiry", group="c@0", rollout=1, reward=0.25, gammas={0: 1.0, 1: 0.1}, temperature=0.7,
        note={"case": "c", "quality": 0.5},
    )  # fmt: skip
    with TrajectoryStore(tmp_path) as store:
        store.append("inquiry", [drawn("x")[0], sample, drawn("x")[2]], teacher="a", state={"taken": 3})
    store = TrajectoryStore(tmp_path)
    [shard] = store.shards
    found = store.sample(shard, 1)
    for name in ("ids", "mask", "steps", "teacher_logprobs"):
        assert torch.equal(getattr(found, name), getattr(sample, name)), name
        assert getattr(found, name).dtype == getattr(sample, name).dtype
    for name in ("id", "group", "rollout", "reward", "gammas", "temperature", "note", "domain"):
        assert getattr(found, name) == getattr(sample, name)
    assert found.versions is None and found.sampler_logprobs is None
    assert torch.equal(store.sample(shard, 2).ids, drawn("x")[2].ids)
    assert (shard.samples, shard.tokens, shard.state) == (3, 30, {"taken": 3})
    assert shard.drawn == sum(one.drawn for one in drawn("x"))


def test_domains_and_counts(tmp_path):
    fill(tmp_path)
    store = TrajectoryStore(tmp_path)
    assert (store.domains, store.count("inquiry"), store.count("general")) == (("general", "inquiry"), 9, 3)
    assert [(one.file, one.state) for one in store.of("inquiry")][1] == ("inquiry-000001.safetensors", {"step": 1})
    store.verify()


def test_the_same_rollouts_are_the_same_bytes(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "other", 1)
    first = TrajectoryStore(tmp_path / "other").digest()
    fill_on = TrajectoryStore(tmp_path / "other")
    for number in (1, 2):  # in another order of domains
        fill_on.append("general", drawn(f"g{number}", lengths=(5,)), teacher="b", state={})
        fill_on.append("inquiry", drawn(f"i{number}"), teacher="a", state={"step": number})
    fill_on.close()
    assert TrajectoryStore(tmp_path / "one").digest() == TrajectoryStore(tmp_path / "other").digest() != first


# -- damage -----------------------------------------------------------------------------------------------------------
def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [3, 200, -1], ids=["header", "streams", "end"])
def test_a_changed_bit_of_a_shard_is_named(tmp_path, place):
    fill(tmp_path)
    flip(tmp_path / "inquiry-000001.safetensors", place)
    store = TrajectoryStore(tmp_path)
    store.sample(store.of("inquiry")[0], 0)
    with pytest.raises(ValueError, match=r"inquiry-000001.safetensors: want SHA-256"):
        store.sample(store.of("inquiry")[1], 0)
    with pytest.raises(ValueError, match=r"inquiry-000001.safetensors"):
        store.verify()


def test_a_cut_or_missing_shard_is_named_at_once(tmp_path):
    fill(tmp_path)
    path = tmp_path / "general-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"general-000002.safetensors: want \d+ bytes; got \d+"):
        TrajectoryStore(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"general-000002.safetensors: want \d+ bytes; got no file"):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize("line", [1, 2, 4])
def test_a_changed_bit_of_the_manifest_is_named(tmp_path, line):
    fill(tmp_path)
    path = tmp_path / MANIFEST
    before = sum(len(one) for one in path.read_bytes().splitlines(keepends=True)[: line - 1])
    flip(path, before + 15)
    with pytest.raises(ValueError, match=rf"manifest.jsonl: line {line}"):
        TrajectoryStore(tmp_path)


def test_a_line_that_was_taken_out_is_named(tmp_path):
    fill(tmp_path)
    lines = (tmp_path / MANIFEST).read_bytes().splitlines(keepends=True)
    (tmp_path / MANIFEST).write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="line 3: want shard 0 of 'inquiry'; got 1"):
        TrajectoryStore(tmp_path)


def test_a_torn_last_line_is_a_shard_that_is_not_there(tmp_path):
    fill(tmp_path)
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    with TrajectoryStore(tmp_path) as store:
        assert [len(store.of(domain)) for domain in ("inquiry", "general")] == [3, 2]
        store.append("general", drawn("again", lengths=(5,)), teacher="b", state={})
    store = TrajectoryStore(tmp_path)
    store.verify()
    assert store.sample(store.of("general")[2], 0).id == "again-0"


# -- what is refused --------------------------------------------------------------------------------------------------
def test_what_cannot_be_stored_is_refused(tmp_path):
    store = TrajectoryStore(tmp_path)
    with pytest.raises(ValueError, match="domain: want a name like"):
        store.append("../up", drawn("x"), teacher="a", state={})
    with pytest.raises(ValueError, match="teacher_logprobs: want a stream of every sample; got none of sample 'y-0'"):
        store.append("inquiry", draw_samples("y", streams=()), teacher="a", state={})
    with pytest.raises(ValueError, match="at least one"):
        store.append("inquiry", [], teacher="a", state={})
    store.append("inquiry", drawn("x"), teacher="a", state={})
    with pytest.raises(ValueError, match="teacher: want a, as in all of 'inquiry'; got b"):
        store.append("inquiry", drawn("x"), teacher="b", state={})
    with pytest.raises(ValueError, match="no other process"):
        TrajectoryStore(tmp_path).append("inquiry", drawn("x"), teacher="a", state={})
    assert len(store.shards) == 1


def test_another_version_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b"")
    from m3.draft.store import LineFile

    file = LineFile(tmp_path / MANIFEST, {"format": "m3 trajectories 0"})
    file.append(json.loads("{}"))
    file.close()
    with pytest.raises(ValueError, match="m3 trajectories 1"):
        TrajectoryStore(tmp_path)


@pytest.mark.parametrize(("limit", "text"), [(300, 0), (6000, 9000)], ids=["shard", "manifest"])
def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, limit, text):
    with TrajectoryStore(tmp_path) as store:
        store.append("inquiry", drawn("x"), teacher="a", state={})
    store = TrajectoryStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            store.append("general", drawn("y"), teacher="b", state={"text": "x" * text})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.close()
    with TrajectoryStore(tmp_path) as again:
        assert [shard.file for shard in again.shards] == ["inquiry-000000.safetensors"]
        again.append("general", drawn("y"), teacher="b", state={})
    TrajectoryStore(tmp_path).verify()
    assert not list(tmp_path.glob(".writing-*"))


# -- kills ------------------------------------------------------------------------------------------------------------
def append_until_killed(folder: str) -> None:
    store = TrajectoryStore(folder)
    while True:
        number = len(store.shards)
        store.append("inquiry", drawn(f"i{number}"), teacher="a", state={"step": number})


def test_a_kill_at_any_moment_leaves_a_store_that_goes_on(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.m3.test_trajectory_store"])
    held = 0
    for turn in range(4):
        process = context.Process(target=append_until_killed, args=(str(tmp_path),))
        process.start()
        manifest = tmp_path / MANIFEST
        goal = held + 2 + turn
        while not manifest.is_file() or manifest.read_bytes().count(b"\n") < goal + 1:
            assert process.is_alive()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = TrajectoryStore(tmp_path)
        store.verify()
        assert len(store.shards) >= goal
        held = len(store.shards)
    for number, shard in enumerate(store.shards):
        assert shard.state == {"step": number}
        assert torch.equal(store.sample(shard, 2).ids, drawn(f"i{number}")[2].ids)
