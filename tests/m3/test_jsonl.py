"""Files with one JSON object a line: what ends a line, what is skipped, how a broken one is named."""

from __future__ import annotations

import gzip
import re

import pytest

from m3.text.jsonl import read_objects


def test_objects_and_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "\u2028\x85"}', encoding="utf-8")
    assert list(read_objects(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"b": "\u2028\x85"})]


def test_gzipped(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress('{"ä": 1}\r\n{"b": 2}\r\n'.encode()))
    assert list(read_objects(path)) == [(f"{path}:1", {"ä": 1}), (f"{path}:2", {"b": 2})]


def test_nothing(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert list(read_objects(tmp_path / "rows.jsonl")) == []


@pytest.mark.parametrize(("line", "message"), [("{", "want JSON; "), ("[1]", "want a JSON object; got list")])
def test_a_broken_line_is_named_after_the_good_ones(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' + line + "\n")
    rows = read_objects(path)
    assert next(rows) == (f"{path}:1", {"a": 1})
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {message}")):
        next(rows)
