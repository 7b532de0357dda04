"""The journal: every byte that a crash can leave, one writer, one run, no id twice."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m3.environment.journal import Journal, Sync, read_journal, read_line, to_journal_line

RUN = {"seed": 7, "cases": ["a", "b"]}
ROWS = [{"kind": "segment", "id": f"s{i}", "text": text} for i, text in enumerate(["one", "naïve\n\u2028", "三"])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


@pytest.fixture
def written(path: Path) -> Path:
    with Journal(path, run=RUN) as journal:
        for row in ROWS:
            journal.append(row)
    return path


def test_records_come_back_in_order(written):
    with Journal(written, run=RUN) as journal:
        assert list(journal.records()) == ROWS
        assert journal.get("segment", "s1") == ROWS[1]
        assert journal.get("segment", "none") is None
        assert ("segment", "s2") in journal and ("batch", "s2") not in journal


def test_a_reader_writes_nothing_and_passes_over_a_torn_end(written):
    torn = written.read_bytes()[:-5]
    written.write_bytes(torn)
    assert read_journal(written) == (RUN, ROWS[:2])
    assert written.read_bytes() == torn


def test_a_reader_reads_while_another_writes(written):
    with Journal(written, run=RUN) as journal:
        journal.append({"kind": "batch", "id": "0"})
        assert read_journal(written)[1] == [*ROWS, {"kind": "batch", "id": "0"}]


def crc32(text: bytes) -> int:
    """The checksum bit by bit, from its polynomial."""
    value = 0xFFFFFFFF
    for byte in text:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_a_line_by_hand():
    text = b'{"kind":"k","text":"\xc3\xa9"}'
    line = b'{"crc32":"%08x","record":' % crc32(text) + text + b"}\n"
    assert to_journal_line({"text": "é", "kind": "k"}) == line
    assert json.loads(line)["record"] == {"kind": "k", "text": "é"}


def test_any_changed_byte_of_a_line_is_found():
    line = to_journal_line(ROWS[0])
    damaged = [line[:i] + bytes([line[i] ^ 1]) + line[i + 1 :] for i in range(len(line))]
    assert [read_line(one) for one in damaged] == [None] * len(line)


def test_every_torn_end_is_cut_and_the_rest_kept(written):
    """The file is cut at every byte of its last two lines: records before are there, and the next goes on from them."""
    whole = written.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = []
    for size in range(len(whole) - len(lines[-1]) - len(lines[-2]), len(whole)):
        written.write_bytes(whole[:size])
        with Journal(written, run=RUN) as journal:
            have = [row["id"] for row in journal.records()]
            for row in ROWS[len(have) :]:
                journal.append(row)
        kept.append(len(have))
        assert written.read_bytes() == whole
    assert kept == [1] * len(lines[-2]) + [2] * len(lines[-1])


def test_a_torn_header_begins_again(path):
    path.write_bytes(to_journal_line({"kind": "journal", "id": "m3.journal/v1", "run": RUN})[:20])
    with Journal(path, run=RUN) as journal:
        assert journal.cut_bytes == 20 and list(journal.records()) == []


def test_zeros_at_the_end_are_cut(written):
    whole = written.read_bytes()
    written.write_bytes(whole + b"\0" * 100 + b"\n" + b"\0" * 50)
    with Journal(written, run=RUN) as journal:
        assert journal.cut_bytes == 151 and len(list(journal.records())) == 3
    assert written.read_bytes() == whole


def test_damage_in_the_middle_is_refused_by_line(written):
    lines = written.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"na", b"nb")
    written.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"run\.jsonl:3: want a line as it was written; got a damaged one"):
        Journal(written, run=RUN)
    assert written.read_bytes() == b"".join(lines)


def test_a_file_of_other_text_is_refused_and_left_alone(path):
    path.write_text("my notes\nand more\n")
    with pytest.raises(ValueError, match="path: want a journal"):
        Journal(path, run=RUN)
    assert path.read_text() == "my notes\nand more\n"


def test_another_run_is_refused_by_what_differs(written):
    with pytest.raises(ValueError, match=r"run: want the run .* got seed = 8, where the run that began it had 7"):
        Journal(written, run={**RUN, "seed": 8})


def test_one_writer(written):
    with (
        Journal(written, run=RUN),
        pytest.raises(ValueError, match="path: want a journal that no other run is writing"),
    ):
        Journal(written, run=RUN)
    Journal(written, run=RUN).close()


def test_the_lock_dies_with_its_process(written):
    opened = f"journal = Journal({str(written)!r}, run={RUN!r})"
    program = f"from m3.environment.journal import Journal; {opened}; print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match="no other run"):
        Journal(written, run=RUN)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    Journal(written, run=RUN).close()


def test_an_id_is_written_once_for_each_kind(written):
    with Journal(written, run=RUN) as journal:
        journal.append({"kind": "batch", "id": "s0"})
        with pytest.raises(ValueError, match="id: want an id written once for 'segment'; got 's0'"):
            journal.append(ROWS[0])
        with pytest.raises(ValueError, match="record: want a kind"):
            journal.append({"id": "x"})


def test_a_full_disk_leaves_the_journal_as_it_was(written):
    """The limit on a file's size stands for the disk: the write fails in the middle of a line."""
    size = written.stat().st_size
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(written, run=RUN) as journal:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                journal.append({"kind": "segment", "id": "s3", "text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, signal_before)
        assert written.stat().st_size == size
        journal.append({"kind": "segment", "id": "s3", "text": "x" * 100})
        assert journal.get("segment", "s3") is not None


@pytest.mark.parametrize(("sync", "calls"), [(Sync.each, 6), (Sync.on_call, 2), (Sync.never, 0)])
def test_when_lines_are_forced_to_the_disk(path, monkeypatch, sync, calls):
    """Header and three records, one call of ``sync``, and the end."""
    forced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (forced.append(file), fsync(file)))
    with Journal(path, run=RUN, sync=sync) as journal:
        for row in ROWS:
            journal.append(row)
        journal.sync()
    assert len(forced) == calls
