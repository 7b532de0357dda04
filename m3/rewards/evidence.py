"""Evidence: a corpus of passages and BM25 over it, the authoritative sources of a verifier that works offline.

A passage is about 200 words of one document, cut between sentences. The corpus has a hash over ids, texts and
sources: verdicts found in it are keyed by that hash, and an index read from disk belongs to its corpus or is refused.
BM25 is bm25s (Lucene's variant, k1 1.5, b 0.75) over content stems.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3.text.jsonl import read_objects
from m3.text.words import content_stems, sentences
from m3kernels.checks import refuse

WORDS = 200  # of a passage, about: what fact-checking retrievers commonly use (FActScore cuts at 256 tokens)
PASSAGES, INDEX, CARD = "passages.jsonl", "bm25", "card.json"
FORMAT = 1  # of the folder; also of the words that are indexed: raised when either changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """A piece of a document. ``score``: BM25 against a query; 0 where there was none."""

    id: str
    text: str
    source: str = ""  # where it can be read: a URL or a file's name
    title: str = ""  # indexed with the text
    score: float = 0.0


class Evidence:
    """Passages, and the ones nearest to a query by BM25.

    Args:
        passages: at least one, ids used once.
    Raises:
        ValueError: no passage, an id twice, or no word in all of them.
    """

    def __init__(self, passages: Iterable[Passage]) -> None:
        self.passages = tuple(passages)
        _check(self.passages)
        self.corpus_hash = corpus_hash(self.passages)
        self._index = _build(self.passages)

    @functools.cached_property
    def _by_id(self) -> Mapping[str, Passage]:
        return {passage.id: passage for passage in self.passages}

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, id: str) -> Passage:
        """The passage of an id.

        Raises:
            KeyError: no such passage.
        """
        return self._by_id[id]

    @functools.cached_property
    def _frequency(self) -> np.ndarray:
        """Passages that have each term, by its number."""
        return np.diff(np.asarray(self._index.scores["indptr"]))

    def rarity(self, stem: str) -> float:
        """ln(1 + (N - n + 0.5) / (n + 0.5)) of a stem that n of N passages have; > 0."""
        place = self._index.vocab_dict.get(stem)
        n = 0 if place is None else int(self._frequency[place])
        return math.log(1 + (len(self) - n + 0.5) / (n + 0.5))

    def search(self, query: str, k: int = 5) -> list[Passage]:
        """At most k passages that share a content word with the query, best first; equals by place in the corpus."""
        if k < 1:
            raise refuse("Evidence.search", "k", "an integer >= 1", k)
        vocabulary = self._index.vocab_dict
        terms = [vocabulary[stem] for stem in dict.fromkeys(content_stems(query)) if stem in vocabulary]
        if not terms:
            return []
        scores = self._index.get_scores_from_ids(terms)
        k = min(k, int(np.count_nonzero(scores > 0)))
        if k == 0:
            return []
        cut = np.partition(scores, len(scores) - k)[len(scores) - k]
        best = np.flatnonzero(scores >= cut)
        best = best[np.argsort(-scores[best], kind="stable")][:k]
        return [dataclasses.replace(self.passages[i], score=float(scores[i])) for i in best]

    def save(self, folder: str | Path) -> Path:
        """Write passages, index and card to a folder that appears only when complete; an older one is replaced."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
            made = Path(work) / "corpus"
            made.mkdir()
            with (made / PASSAGES).open("w", encoding="utf-8") as file:
                for passage in self.passages:
                    row = {"id": passage.id, "text": passage.text, "source": passage.source, "title": passage.title}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._index.save(str(made / INDEX), show_progress=False)
            card = {"format": FORMAT, "corpus_hash": self.corpus_hash, "passages": len(self.passages)}
            (made / CARD).write_text(json.dumps(card) + "\n", encoding="utf-8")
            if target.exists():
                target.rename(Path(work) / "old")
            made.rename(target)
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Evidence:
        """The evidence of ``save``.

        Raises:
            ValueError: another format, or passages that are not those of the card.
            OSError: no such folder.
        """
        import bm25s

        folder = Path(folder)
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card.get("format") != FORMAT:
            raise refuse("Evidence.load", "folder", f"format {FORMAT}", f"{card.get('format')!r} in {folder}")
        evidence = cls.__new__(cls)
        evidence.passages = tuple(Passage(**row) for _, row in read_objects(folder / PASSAGES))
        evidence.corpus_hash = corpus_hash(evidence.passages)
        if evidence.corpus_hash != card["corpus_hash"]:
            raise refuse("Evidence.load", "folder", f"passages of hash {card['corpus_hash']}", evidence.corpus_hash)
        evidence._index = bm25s.BM25.load(str(folder / INDEX), load_corpus=False)
        return evidence


def open_evidence(source: str | Path, cache: str | Path | None = None) -> Evidence:
    """Evidence of a source, or of its index where one was made before.

    Args:
        source: a folder of ``Evidence.save``; a MedQuAD .jsonl or .jsonl.gz; a .jsonl of passages; a .txt or .md; or
            a folder of such files.
        cache: folder under which indices are kept, by corpus hash; None keeps none.
    Raises:
        ValueError: nothing to read there, by name.
    """
    source = Path(source)
    if (source / CARD).is_file():
        return Evidence.load(source)
    passages = tuple(read_passages(source))
    if cache is None:
        return Evidence(passages)
    folder = Path(cache) / corpus_hash(passages)[:16]
    if (folder / CARD).is_file():
        return Evidence.load(folder)
    evidence = Evidence(passages)
    evidence.save(folder)
    return evidence


def corpus_hash(passages: Iterable[Passage]) -> str:
    """SHA-256 over id, title, text and source of every passage, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        row = json.dumps([passage.id, passage.title, passage.text, passage.source], ensure_ascii=False)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def _check(passages: Sequence[Passage]) -> None:
    if not passages:
        raise refuse("Evidence", "passages", "one or more", "none")
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise refuse("Evidence", "passages", "ids used once", f"{passage.id!r} again")
        seen.add(passage.id)


def _build(passages: Sequence[Passage]) -> Any:
    import bm25s

    vocabulary: dict[str, int] = {}
    rows = [
        [vocabulary.setdefault(stem, len(vocabulary)) for stem in content_stems(f"{passage.title} {passage.text}")]
        for passage in passages
    ]
    if not vocabulary:
        raise refuse("Evidence", "passages", "a content word in one of them", "none")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index((rows, vocabulary), show_progress=False)
    return index


# -- reading ----------------------------------------------------------------------------------------------------------
def read_passages(path: str | Path) -> Iterator[Passage]:
    """Passages of a file, or of every .jsonl, .jsonl.gz, .txt and .md in a folder, by name.

    A row of a .jsonl has "text" and perhaps "id", "source", "title"; or it is MedQuAD's, with "question" and "answer".
    A text longer than a passage is cut; its pieces are "ID#0", "ID#1", ... A row with the id of an earlier one is
    "ID~2", "ID~3": a few of MedQuAD's documents share one.

    Raises:
        ValueError: a row that is neither, by file and line; a folder or file with nothing to read.
        OSError: no such file.
    """
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if _readable(file)) if path.is_dir() else [path]
    if not files or not all(_readable(file) for file in files):
        raise refuse("read_passages", "path", "a .jsonl, .jsonl.gz, .txt or .md, or a folder of them", str(path))
    used: Counter[str] = Counter()
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        if file.name.endswith((".txt", ".md")):
            yield from cut(name, file.read_text(encoding="utf-8"), source=name)
            continue
        for place, row in read_objects(file):
            if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
                text, title = row["answer"], f"{row.get('focus', '')} {row['question']}".strip()
                source = str(row.get("url", ""))
            elif isinstance(row.get("text"), str):
                text, title, source = row["text"], str(row.get("title", "")), str(row.get("source", name))
            else:
                raise ValueError(f'{place}: want "text", or "question" and "answer"; got {sorted(row)}')
            line = place.rpartition(":")[2]
            id = "/".join(str(row[key]) for key in ("src", "id") if key in row) or f"{name}:{line}"
            used[id] += 1
            yield from cut(id if used[id] == 1 else f"{id}~{used[id]}", text, source=source, title=title)


def cut(id: str, text: str, *, source: str = "", title: str = "", limit: int = WORDS) -> Iterator[Passage]:
    """Passages of whole sentences, at most ``limit`` words each unless one sentence is longer; the id is kept where
    one passage holds all."""
    pieces: list[list[str]] = [[]]
    count = 0
    for sentence in sentences(text):
        length = len(sentence.split())
        if pieces[-1] and count + length > limit:
            pieces.append([])
            count = 0
        pieces[-1].append(sentence)
        count += length
    for i, piece in enumerate(pieces):
        if piece:
            name = id if len(pieces) == 1 else f"{id}#{i}"
            yield Passage(id=name, text=" ".join(piece), source=source, title=title)


def _readable(file: Path) -> bool:
    return file.is_file() and file.name.endswith((".jsonl", ".jsonl.gz", ".txt", ".md"))


# -- how good is the retrieval ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Means over questions that have a relevant document."""

    questions: int
    ndcg: float  # at ``depth``, gain 2^grade - 1
    average_precision: float  # MAP over the whole ranking, at most 1000 documents
    precision_at_1: float
    depth: int = 10


def read_qrels(path: str | Path) -> tuple[dict[str, dict[str, int]], tuple[Passage, ...]]:
    """(grade of each judged answer by question, the judged answers) of MedQuAD's qrels.zip.

    Grades are 0 incorrect, 1 related, 2 incomplete, 3 excellent (the file's 1 to 4, less one). An answer is one
    passage, uncut: it was judged whole. Of an answer judged twice for a question the better grade counts.
    """
    grades: dict[str, dict[str, int]] = {}
    passages: list[Passage] = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith("__MACOSX"):
                continue
            if name.endswith(".txt"):
                for line in archive.read(name).decode("utf-8-sig").splitlines():
                    if line.strip():
                        question, grade, answer = line.split()
                        judged = grades.setdefault(question, {})
                        judged[answer] = max(judged.get(answer, 0), int(grade[0]) - 1)
            elif name.endswith(".csv"):
                text = archive.read(name).decode("utf-8-sig", errors="replace")
                for row in csv.DictReader(io.StringIO(text, newline="")):
                    heading = re.search(r"Question:\s*(.*)", row["Answer"])
                    body = row["Answer"].split("Answer:", 1)[-1]
                    title = heading.group(1).strip() if heading else ""
                    passages.append(Passage(id=row["AnswerID"], text=body.strip(), title=title))
    unique = {passage.id: passage for passage in passages}
    return grades, tuple(unique.values())


def measure(
    evidence: Evidence,
    questions: Mapping[str, str],
    grades: Mapping[str, Mapping[str, int]],
    *,
    depth: int = 10,
    relevant: int = 1,
) -> Retrieval:
    """nDCG, MAP and precision at 1 of ``search``; documents without a judgement are left out of the ranking.

    Args:
        questions: text by id.
        grades: by question and passage id.
        relevant: the least grade that MAP and precision count.
    """
    totals = np.zeros(3)
    counted = 0
    for id, judged in grades.items():
        good = sorted(judged.values(), reverse=True)
        if id not in questions or not good or good[0] < relevant:
            continue
        ranked = [judged[one.id] for one in evidence.search(questions[id], 1000) if one.id in judged]
        hits = [i for i, grade in enumerate(ranked) if grade >= relevant]
        precision = sum((n + 1) / (i + 1) for n, i in enumerate(hits)) / sum(grade >= relevant for grade in good)
        totals += (_gain(ranked[:depth]) / _gain(good[:depth]), precision, float(bool(hits) and hits[0] == 0))
        counted += 1
    if not counted:
        raise refuse("measure", "grades", "a question with a relevant document", "none")
    ndcg, average_precision, first = (totals / counted).tolist()
    return Retrieval(
        questions=counted, ndcg=ndcg, average_precision=average_precision, precision_at_1=first, depth=depth
    )


def _gain(grades: Sequence[int]) -> float:
    return float(sum((2.0**grade - 1) / np.log2(i + 2) for i, grade in enumerate(grades)))
