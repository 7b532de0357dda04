"""The store of responses: what was appended is there after any kill, and what is damaged or foreign is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m3.draft.store import HELD_OUT, TRAIN, Response, Store, fingerprint

ROOT = Path(__file__).parent.parent.parent


def response(index: int, group: str = TRAIN) -> Response:
    return Response(
        group=group, index=index, prompt=(1, 2, index), response=(7,) * (index + 1), temperature=0.7, seed=index
    )


def opened(path: Path, mark: str = "abc") -> Store:
    return Store(path, target="tiny", fingerprint=mark)


def filled(path: Path, count: int) -> bytes:
    with opened(path) as store:
        for index in range(count):
            store.append(response(index))
        store.sync()
    return path.read_bytes()


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "deep" / "store.jsonl"
    given = [response(2), response(0, HELD_OUT), response(0)]
    with opened(path) as store:
        for one in given:
            store.append(one)
    with opened(path) as store:
        assert store.responses == given
        assert store.group(TRAIN) == [given[2], given[0]]
        assert store.tokens(TRAIN) == 4
        assert (TRAIN, 2) in store
        assert (TRAIN, 1) not in store
        assert store.first(TRAIN, 3) == [given[0]]
        assert store.first(TRAIN, 4) == [given[0], given[2]]


def test_reading_makes_no_file(tmp_path):
    with opened(tmp_path / "store.jsonl") as store:
        assert store.responses == []
    assert not (tmp_path / "store.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_line_that_was_cut_short_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "store.jsonl"
    whole = filled(path, 3)
    path.write_bytes(whole[:-cut])
    with opened(path) as store:
        assert [one.index for one in store.responses] == [0, 1]
        store.append(response(2))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("place", [0, 9, 150, -3], ids=["header", "its text", "a response", "the last"])
def test_damage_is_refused(tmp_path, place):
    path = tmp_path / "store.jsonl"
    data = bytearray(filled(path, 3))
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"line \d: want a (line whose checksum holds|file of 'm3 draft responses 1')"):
        opened(path)


def test_responses_of_another_model_are_refused(tmp_path):
    filled(tmp_path / "store.jsonl", 1)
    with pytest.raises(ValueError, match=r"want responses of tiny \(def\); got those of tiny \(abc\)"):
        opened(tmp_path / "store.jsonl", "def")


def test_an_unknown_group_is_refused(tmp_path):
    with opened(tmp_path / "store.jsonl") as store, pytest.raises(ValueError, match=r"group: want train or held_out"):
        store.append(response(0, "test"))


def test_one_writer_at_a_time_and_readers_beside_it(tmp_path):
    path = tmp_path / "store.jsonl"
    with opened(path) as first:
        first.append(response(0))
        with opened(path) as second:
            assert second.responses == [response(0)]
            with pytest.raises(ValueError, match="want no other process that writes to it"):
                second.append(response(1))
    with opened(path) as store:
        assert store.responses == [response(0)]


def test_a_reader_that_is_behind_may_not_write(tmp_path):
    path = tmp_path / "store.jsonl"
    behind = opened(path)
    filled(path, 1)
    with pytest.raises(ValueError, match="want the file that was read; got more of it"):
        behind.append(response(1))


WRITER = """
import sys
sys.path.insert(0, {root!r})
from m3.draft.store import Response, Store
store = Store({path!r}, target="tiny", fingerprint="abc")
for index in range(10**6):
    store.append(Response(group="train", index=index, prompt=(1,), response=(2,) * 50, temperature=0.0, seed=0))
    if index == 200:
        print("on the way", flush=True)
"""


def test_a_killed_writer_leaves_whole_responses(tmp_path):
    path = tmp_path / "store.jsonl"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(root=str(ROOT), path=str(path))], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"on the way\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    with opened(path) as store:
        count = len(store.responses)
        assert count > 200
        assert [one.index for one in store.responses] == list(range(count))
        store.append(response(count))
    with opened(path) as store:
        assert len(store.responses) == count + 1


def test_a_fingerprint_changes_with_config_and_weights(tmp_path):
    marks = set()
    for config, weights in (("{}", b"abc"), ("{ }", b"abc"), ("{}", b"abd"), ("{}", b"abcd")):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(weights)
        marks.add(fingerprint(tmp_path))
    assert len(marks) == 4
