"""Evidence: BM25 by hand, reading of every kind of file, hashes, saved indices, and retrieval measures by hand."""

from __future__ import annotations

import gzip
import json
import math
import zipfile

import pytest

from m3.rewards.evidence import (
    Evidence,
    Passage,
    corpus_hash,
    cut,
    measure,
    open_evidence,
    read_passages,
    read_qrels,
)
from tests.m3.clinic_cases import shared_data

PASSAGES = (
    Passage(id="a", text="Aspirin thins the blood.", source="https://example.org/a"),
    Passage(id="b", text="Ibuprofen irritates the stomach.", title="Painkillers"),
    Passage(id="c", text="Aspirin and ibuprofen are painkillers; aspirin is the older."),
    Passage(id="d", text="Fractures heal in six weeks."),
)


def found(evidence: Evidence, query: str, k: int = 5) -> list[str]:
    return [passage.id for passage in evidence.search(query, k)]


def test_scores_are_bm25():
    """Lucene's variant: idf ln(1 + (N - n + 0.5) / (n + 0.5)), k1 1.5, b 0.75; stop words are not counted."""
    lengths = {"a": 3, "b": 4, "c": 5, "d": 4}  # Aspirin thins blood; Painkillers ibuprofen irritates stomach; ...
    counts = {"a": 1, "c": 2}
    mean = sum(lengths.values()) / 4
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    wanted = {id: idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * lengths[id] / mean)) for id, tf in counts.items()}
    got = {passage.id: passage.score for passage in Evidence(PASSAGES).search("aspirin")}
    assert got == pytest.approx(wanted, rel=1e-5)


def test_best_first_and_no_more_than_k():
    evidence = Evidence(PASSAGES)
    assert found(evidence, "aspirin painkillers") == ["c", "a", "b"]
    assert found(evidence, "aspirin painkillers", k=1) == ["c"]


def test_titles_are_searched():
    assert found(Evidence(PASSAGES), "painkillers") == ["b", "c"]


def test_equals_stand_in_order_of_the_corpus():
    evidence = Evidence([Passage(id=str(i), text="fever") for i in (3, 1, 2)])
    assert found(evidence, "fever", k=2) == ["3", "1"]


@pytest.mark.parametrize("query", ["", "the of and", "zebra", '"aspirin OR (', "?!"])
def test_any_text_is_a_query(query):
    assert found(Evidence(PASSAGES), query) == (["c", "a"] if "aspirin" in query else [])


def test_a_passage_by_id():
    assert Evidence(PASSAGES)["b"] == PASSAGES[1]
    with pytest.raises(KeyError, match="zebra"):
        Evidence(PASSAGES)["zebra"]


WRONG = {
    "none": ([], "Evidence: passages: want one or more; got none"),
    "twice": ([PASSAGES[0], PASSAGES[0]], "Evidence: passages: want ids used once; got 'a' again"),
    "empty": ([Passage(id="x", text="")], "Evidence: passages: want a content word in one of them; got none"),
}


@pytest.mark.parametrize(("passages", "message"), WRONG.values(), ids=WRONG)
def test_a_corpus_is_checked(passages, message):
    with pytest.raises(ValueError, match=message):
        Evidence(passages)


def test_k_is_checked():
    with pytest.raises(ValueError, match=r"Evidence.search: k: want an integer >= 1; got 0"):
        Evidence(PASSAGES).search("aspirin", 0)


# -- on disk ----------------------------------------------------------------------------------------------------------
def test_a_saved_index_finds_the_same(tmp_path):
    evidence = Evidence([*PASSAGES, Passage(id="long", text="fever\n" * 500)])
    loaded = Evidence.load(evidence.save(tmp_path / "corpus"))
    assert loaded.passages == evidence.passages
    assert loaded.corpus_hash == evidence.corpus_hash
    assert loaded.search("aspirin and fever") == evidence.search("aspirin and fever")
    assert [file.name for file in tmp_path.iterdir()] == ["corpus"]


def test_saving_replaces_what_was_there(tmp_path):
    Evidence(PASSAGES).save(tmp_path / "corpus")
    Evidence(PASSAGES[:2]).save(tmp_path / "corpus")
    assert len(Evidence.load(tmp_path / "corpus")) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["corpus"]


def test_an_index_of_other_passages_is_refused(tmp_path):
    folder = Evidence(PASSAGES).save(tmp_path / "corpus")
    file = folder / "passages.jsonl"
    file.write_text(file.read_text().replace("thins", "thickens"))
    with pytest.raises(
        ValueError, match=r"Evidence.load: folder: want passages of hash [0-9a-f]{64}; got [0-9a-f]{64}"
    ):
        Evidence.load(folder)


def test_an_index_is_made_once(tmp_path):
    corpus = tmp_path / "notes.txt"
    corpus.write_text("Aspirin thins the blood.")
    first = open_evidence(corpus, tmp_path / "cache")
    (made,) = (tmp_path / "cache").iterdir()
    before = (made / "card.json").stat().st_mtime_ns
    again = open_evidence(corpus, tmp_path / "cache")
    assert (made / "card.json").stat().st_mtime_ns == before
    assert again.search("aspirin") == first.search("aspirin")
    assert found(open_evidence(made), "aspirin") == ["notes.txt"]
    corpus.write_text("Ibuprofen does not.")
    assert found(open_evidence(corpus, tmp_path / "cache"), "aspirin") == []


CHANGES = {
    "id": Passage(id="z", text="Aspirin thins the blood.", source="s"),
    "text": Passage(id="a", text="Aspirin thins the  blood.", source="s"),
    "source": Passage(id="a", text="Aspirin thins the blood.", source="t"),
    "title": Passage(id="a", text="Aspirin thins the blood.", source="s", title="t"),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_every_field_is_in_the_hash(changed):
    plain = Passage(id="a", text="Aspirin thins the blood.", source="s")
    assert corpus_hash([plain]) != corpus_hash([changed])
    assert corpus_hash([plain, changed]) != corpus_hash([changed, plain])


# -- reading ----------------------------------------------------------------------------------------------------------
def test_medquad_rows(tmp_path):
    row = {
        "id": "1-2",
        "src": "NIDDK",
        "url": "https://u",
        "focus": "Gout",
        "question": "What is gout ?",
        "answer": "A.",
    }
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n\n" + json.dumps({**row, "answer": "B."}) + "\n")
    assert list(read_passages(tmp_path)) == [
        Passage(id="NIDDK/1-2", text="A.", source="https://u", title="Gout What is gout ?"),
        Passage(id="NIDDK/1-2~2", text="B.", source="https://u", title="Gout What is gout ?"),
    ]


def test_a_folder_of_own_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("Gout hurts much. " * 60 + "\n\n" + "It is well treated. " * 10)
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "Statins lower cholesterol.", "title": "Statins"}\n')
    (tmp_path / "ignored.pdf").write_bytes(b"%PDF")
    got = list(read_passages(tmp_path))
    assert [(one.id, len(one.text.split())) for one in got] == [("b.txt#0", 200), ("b.txt#1", 20), ("sub/a.jsonl:1", 3)]
    assert (got[-1].title, got[-1].source) == ("Statins", "sub/a.jsonl")


BAD_ROWS = {
    "no_json": ("{", ":1: want JSON; "),
    "no_object": ("[1]", ":1: want a JSON object; got list"),
    "no_text": ('{"id": "x"}', ':1: want "text", or "question" and "answer"; got [\'id\']'),
}


@pytest.mark.parametrize(("text", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(read_passages(tmp_path / "x.jsonl"))
    assert message in str(caught.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"read_passages: path: want a .jsonl"):
        list(read_passages(tmp_path))
    with pytest.raises(ValueError, match=r"read_passages: path: want a .jsonl"):
        list(read_passages(tmp_path / "x.pdf"))


def test_passages_are_cut_between_sentences():
    got = list(cut("d", "One two three. Four five. Six seven eight nine ten.", limit=5))
    assert [(one.id, one.text) for one in got] == [
        ("d#0", "One two three. Four five."),
        ("d#1", "Six seven eight nine ten."),
    ]
    assert [one.id for one in cut("d", "One two three four five six.", limit=5)] == ["d"], "a long sentence stays whole"
    assert list(cut("d", " \n")) == []


# -- measures ---------------------------------------------------------------------------------------------------------
def test_measures_by_hand():
    """Ranked c (grade 0), a (grade 2); b (grade 3) is never found; d is not judged."""
    grades = {"q": {"a": 2, "b": 3, "c": 0}, "unasked": {"a": 1}, "no_good": {"a": 0}}
    got = measure(Evidence(PASSAGES), {"q": "aspirin", "no_good": "aspirin"}, grades)
    ideal = 7 + 3 / math.log2(3)
    assert (got.questions, got.precision_at_1) == (1, 0.0)
    assert got.ndcg == pytest.approx(3 / math.log2(3) / ideal)
    assert got.average_precision == pytest.approx((1 / 2) / 2)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="measure: grades: want a question with a relevant document; got none"):
        measure(Evidence(PASSAGES), {}, {})


def test_qrels_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "qrels.zip", "w") as archive:
        archive.writestr("q/qrels.txt", "1 1-Incorrect A_1\n1 4-Excellent B_2\n2 2-Related A_1\n")
        archive.writestr("q/answers.csv", 'AnswerID,Answer\nA_1,"Question: What is gout ?\nURL: u\nAnswer: A, b.\n"\n')
        archive.writestr("__MACOSX/q/._qrels.txt", b"\0")
    grades, answers = read_qrels(tmp_path / "qrels.zip")
    assert grades == {"1": {"A_1": 0, "B_2": 3}, "2": {"A_1": 1}}
    assert answers == (Passage(id="A_1", text="A, b.", title="What is gout ?"),)


def test_the_real_qrels():
    grades, answers = read_qrels(shared_data("medquad") / "qrels.zip")
    assert len(grades) == 103
    assert sum(len(judged) for judged in grades.values()) == 2311, "2479 lines, of which 168 repeat"
    assert {id for judged in grades.values() for id in judged} <= {one.id for one in answers}
