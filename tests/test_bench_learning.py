"""The learning bench: intervals over seeds and cases, paired differences, what it reads back."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import learning
from m3.train.tasks.consult import GOOD
from m3.train.tasks.consult_rl import MEASURES


def filled(by_seed: list[float], cases: int = 40) -> np.ndarray:
    return np.array(by_seed)[:, None, None] * np.ones((len(by_seed), cases, len(MEASURES)))


def test_interval_of_what_never_varies_is_a_point() -> None:
    assert set(learning.intervals(filled([0.25, 0.25])).values()) == {(0.25, 0.25, 0.25)}


def test_interval_spans_seeds() -> None:
    mean, low, high = learning.intervals(filled([0.0, 0.3, 0.9]))["reward"]
    assert (mean, low, high) == (pytest.approx(0.4), 0.0, 0.9)  # all three draws may be one seed: 1 in 27


def test_interval_over_cases_is_that_of_a_mean() -> None:
    values = np.zeros((1, 400, len(MEASURES)))
    values[:, ::2] = 1.0
    mean, low, high = learning.intervals(values)["turns"]
    assert mean == 0.5
    assert (mean - low, high - mean) == (pytest.approx(0.049, abs=0.006), pytest.approx(0.049, abs=0.006))  # 1.96 s.e.


def test_differences_are_paired(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    base = chance.random((30, len(MEASURES)))
    for arm, shift in (("grpo", 0.0), ("spar", 0.125)):
        for seed in (1, 2):
            folder = tmp_path / f"{arm}-{seed}"
            folder.mkdir()
            told = {"values": (base + shift).tolist(), "seconds": 1.0}
            (folder / learning.HELD_OUT).write_text(json.dumps(told), encoding="utf-8")
    cells = learning.against(tmp_path, ["grpo", "spar"], [1, 2]).splitlines()[-1].split(" | ")
    assert cells[0] == "| spar - grpo" and set(cells[1:-1]) == {"+0.125 (+0.125, +0.125)"}


def test_good_physician_is_the_ceiling() -> None:
    means = dict(zip(MEASURES, learning.scripted(GOOD).mean((0, 1)), strict=True))
    assert means["reward"] == means["diagnosis"] == means["repeat_score"] == means["logical_score"] == 1.0
    assert 10 < means["turns"] < 12
