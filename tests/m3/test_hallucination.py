"""Hallucination rate: equation 15 against loops, its edges and its interval; runs that stop, fail and go on."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from m3.evaluate.hallucination import (
    Response,
    hallucination_rate,
    read_claims,
    read_responses,
    response_rate,
    run,
)
from m3.rewards.claims import Claim, Extraction, ScriptedExtractor
from m3.rewards.evidence import Evidence, Passage
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.rewards.fact_verifier import FactVerifier, ScriptedVerifier
from m3.rewards.verdict import UnjudgedError

NAMES = {"S": "supported", "R": "refuted", "U": "uncertain", "t": "timeout", "p": "unparsable"}


def row(labels: str) -> list[FactVerdict]:
    return [FactVerdict(claim=f"c{i}", label=Label(NAMES[letter])) for i, letter in enumerate(labels)]


def rows(*labels: str) -> list[list[FactVerdict]]:
    return [row(one) for one in labels]


def reference(responses: list[str]) -> tuple[float, float, float]:
    """(H, refuted rate, uncertain rate), pooled, by counting letters."""
    text = "".join(responses)
    n = sum(text.count(letter) for letter in "SRU")
    return (text.count("R") + 0.5 * text.count("U")) / n, text.count("R") / n, text.count("U") / n


RANDOM = random.Random(0)
MIXES = [["".join(RANDOM.choice("SSSRU") for _ in range(RANDOM.randrange(6))) for _ in range(7)] for _ in range(8)]


@pytest.mark.parametrize("responses", [["S"], ["R"], ["U"], ["SRU"], ["RRRR", "S"], ["", "U"], *MIXES], ids=str)
def test_rate_is_equation_15(responses):
    found = hallucination_rate(rows(*responses), resamples=10)
    assert (found.rate.value, found.refuted.value, found.uncertain.value) == pytest.approx(reference(responses))
    assert found.rate.low <= found.rate.value + 0.2 and found.rate.high >= found.rate.value - 0.2
    means = [reference([one])[0] for one in responses if one]
    assert found.mean_of_responses == pytest.approx(sum(means) / len(means))
    assert found.without_claims == responses.count("")


RATES = {"S": 0.0, "R": 1.0, "U": 0.5, "SR": 0.5, "SSUR": 0.375, "Rt": 1.0, "t": None, "": None}


@pytest.mark.parametrize(("labels", "rate"), RATES.items(), ids=str)
def test_rate_of_a_response(labels, rate):
    assert response_rate(row(labels)) == rate


def test_pooled_is_not_the_mean_of_responses():
    found = hallucination_rate(rows("R", "SSSSSSS"), resamples=10)
    assert found.rate.value == pytest.approx(1 / 8)
    assert found.mean_of_responses == pytest.approx(1 / 2)


def test_interval_is_seeded_and_covers():
    data = rows(*(["SSSR"] * 30 + ["SSSS"] * 70))
    one, again, other = (hallucination_rate(data, resamples=500, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one.rate.value == pytest.approx(0.075)
    # Of 100 responses each has 1/4 with probability 0.3: standard deviation 0.25 sqrt(0.21 / 100) = 0.01146.
    assert one.rate.high - one.rate.low == pytest.approx(2 * 1.96 * 0.01146, rel=0.15)


def test_responses_that_are_alike_have_no_spread():
    found = hallucination_rate(rows("SR", "SR"), resamples=20)
    assert (found.rate.low, found.rate.high) == (0.5, 0.5)


def test_failures_are_counted_and_left_out():
    found = hallucination_rate(rows("SSSSSSSSSRt", "S" * 20), resamples=10)
    assert found.rate.value == pytest.approx(1 / 30)
    assert (found.labels["timeout"], found.claims) == (1, 31)


def test_too_many_failures_are_no_rate():
    with pytest.raises(UnjudgedError, match=r"2 of 4 claims have no verdict \{'unparsable': 1, 'timeout': 1\}"):
        hallucination_rate(rows("SRtp"))
    with pytest.raises(UnjudgedError, match=r"1 responses have no claims \{'timeout': 1\}"):
        hallucination_rate(rows("S"), not_extracted={"timeout": 1})


@pytest.mark.parametrize("data", [[], [[]], [[], []]], ids=str)
def test_nothing_is_no_rate(data):
    with pytest.raises(ValueError, match="hallucination_rate: verdicts: want a judged claim; got none in"):
        hallucination_rate(data)


def test_resamples_are_checked():
    with pytest.raises(ValueError, match="hallucination_rate: resamples: want an integer >= 1; got 0"):
        hallucination_rate(rows("S"), resamples=0)


# -- runs -------------------------------------------------------------------------------------------------------------
LIBRARY = Evidence(
    [
        Passage(id="aspirin", text="Aspirin thins the blood."),
        Passage(id="flu", text="Antibiotics do not cure influenza."),
    ]
)
RESPONSES = [
    Response(id="a", text="Aspirin thins the blood. Antibiotics cure influenza."),
    Response(id="b", text="Zinc prevents warts.", question="Does zinc help?"),
    Response(id="c", text="Hello!"),
]


def go(out, responses=RESPONSES, extractor=None, verifier=None, **options):
    extractor, verifier = extractor or ScriptedExtractor(), verifier or ScriptedVerifier(LIBRARY)
    return asyncio.run(run(responses, extractor, verifier, out, resamples=50, **options))


def test_a_run_end_to_end(tmp_path):
    told: list[tuple[str, int, int]] = []
    found = go(tmp_path / "run", progress=lambda *one: told.append(one))
    assert found.rate.value == pytest.approx((0 + 1 + 0.5) / 3)
    assert (found.responses, found.claims, found.without_claims) == (3, 3, 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["scripted"] is True, "no figure to compare with published ones"
    assert summary["rate"]["value"] == found.rate.value
    assert summary["corpus_hash"] == LIBRARY.corpus_hash
    assert told[-1] == ("verdicts", 3, 3)
    assert read_claims(tmp_path / "run")["b"] == [
        Claim(text="Zinc prevents warts.", sentence="Zinc prevents warts.", index=0)
    ]


class Counting(ScriptedVerifier):
    """Counts what it checks; a claim named in ``broken`` times out."""

    def __init__(self, *broken: str) -> None:
        super().__init__(LIBRARY)
        self.broken = set(broken)
        self.checked: list[str] = []

    async def _check(self, claim):
        self.checked.append(claim)
        if claim in self.broken:
            raise TimeoutError
        return await super()._check(claim)


def test_what_is_done_is_not_done_again(tmp_path):
    first, second = Counting(), Counting()
    one = go(tmp_path, verifier=first)
    assert len(first.checked) == 3
    assert go(tmp_path, verifier=second) == one
    assert second.checked == []


def test_a_run_goes_on_after_a_kill(tmp_path):
    whole = go(tmp_path / "whole")
    go(tmp_path / "cut")
    for name in ("claims.jsonl", "verdicts.jsonl"):
        file = tmp_path / "cut" / name
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    (tmp_path / "cut" / "summary.json").unlink()
    assert go(tmp_path / "cut") == whole
    for name in ("claims.jsonl", "verdicts.jsonl"):
        ids = [json.loads(line)["id"] for line in (tmp_path / "cut" / name).read_text().splitlines()]
        assert sorted(ids) == ["a", "b", "c"]


def test_failed_claims_alone_are_verified_again(tmp_path):
    with pytest.raises(UnjudgedError, match=r"1 of 3 claims have no verdict \{'timeout': 1\}"):
        go(tmp_path, verifier=Counting("Zinc prevents warts."))
    assert not (tmp_path / "summary.json").exists()
    verifier = Counting()
    assert go(tmp_path, verifier=verifier) == go(tmp_path)
    assert verifier.checked == ["Zinc prevents warts."]


class Failing:
    """An extractor that cannot read response b until it is mended."""

    name, scripted = "failing", False

    def __init__(self) -> None:
        self.broken = True

    async def extract(self, response, question=""):
        if self.broken and "Zinc" in response:
            return Extraction(claims=(), failure=Label.unparsable, malformed=3, explanation="why")
        return await ScriptedExtractor().extract(response)


def test_a_response_without_extraction_is_counted_and_tried_again(tmp_path):
    extractor = Failing()
    with pytest.raises(UnjudgedError, match=r"1 responses have no claims \{'unparsable': 1\}"):
        go(tmp_path, extractor=extractor)
    found = go(tmp_path, extractor=extractor, max_unjudged=0.5)
    assert (found.not_extracted, found.claims) == ({"unparsable": 1}, 2)
    extractor.broken = False
    assert go(tmp_path, extractor=extractor).claims == 3


OTHER_RUNS = {
    "responses": {"responses": RESPONSES[:2]},
    "extractor": {"extractor": Failing()},
    "corpus_hash": {"verifier": ScriptedVerifier(Evidence([Passage(id="x", text="Zinc.")]))},
}


@pytest.mark.parametrize(("name", "changed"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_a_folder_holds_one_run(tmp_path, name, changed):
    go(tmp_path)
    with pytest.raises(ValueError, match=f"hallucination.run: out: want a folder of the same {name}, .* there"):
        go(tmp_path, **changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency: want an integer >= 1; got 0"),
        ({"responses": RESPONSES[:1] * 2}, "responses: want ids used once; got 2 responses with fewer ids"),
    ],
)
def test_a_run_that_cannot_end_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"hallucination.run: {message}"):
        go(tmp_path, **options)


def test_a_verifier_of_a_model_is_not_scripted(tmp_path):
    class Model(ScriptedVerifier):
        scripted = False

    extractor = Failing()
    extractor.broken = False
    verifier: FactVerifier = Model(LIBRARY)
    go(tmp_path, extractor=extractor, verifier=verifier)
    assert json.loads((tmp_path / "summary.json").read_text())["scripted"] is False


# -- reading ----------------------------------------------------------------------------------------------------------
def test_responses_are_read(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(
        '{"id": 7, "response": "A.", "question": "q"}\n\n{"prompt_id": "p", "completion": "B."}\n{"answer": "C."}\n'
    )
    assert read_responses(file) == [
        Response(id="7", text="A.", question="q"),
        Response(id="p", text="B."),
        Response(id="4", text="C."),
    ]


BAD = {
    "no_text": ('{"id": 1}', ':1: want "response", "completion" or "answer"; got [\'id\']'),
    "twice": ('{"id": 1, "answer": ""}\n{"id": 1, "answer": ""}', ":2: id: want one used once; got '1' again"),
    "no_json": ("{", ":1: want JSON"),
    "many_digits": ('{"id": ' + "1" * 5000 + "}", ":1: want JSON"),
    "half_a_character": ('{"answer": "\\ud83d"}', ":1: want JSON"),
    "no_object": ("[]", ":1: want a JSON object; got list"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_responses(tmp_path / "r.jsonl")
    assert message in str(caught.value)
