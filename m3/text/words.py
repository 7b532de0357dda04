"""Words, stems and sentences of English text, by rules: deterministic, no model.

A word is a run of letters, digits and inner apostrophes, hyphens, dots and slashes ("don't", "x-ray", "2.5",
"120/80"); signs that change a meaning (% < > + = °) are words of their own. Stems are Porter's second (Snowball
English), lower case. ``content_stems`` leaves out words that carry no topic; negations are never left out.
"""

from __future__ import annotations

import functools
import re
import threading

import Stemmer

_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’\-][^\W\d_]+|\d+)*|[%<>+=°≥≤±]")
_ABBREVIATIONS = "".join(
    rf"(?<!\b{one}\.)" for one in ("Dr", "Mr", "Mrs", "Ms", "St", "vs", "approx", r"e\.g", r"i\.e")
)
_LIST_NUMBERS = r"(?<!^\d\.)(?<!^\d\d\.)"  # of a list: at the beginning of a line
_SENTENCE_END = re.compile(
    r"(?<=[.!?。！？])" + _ABBREVIATIONS + _LIST_NUMBERS + r"[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9À-ÖØ-Þ*\-])|\n+",
    re.MULTILINE,
)
NEGATIONS = frozenset(
    "no not none never without denies deny denied negative neither nor nothing cannot can't don't doesn't didn't isn't "
    "aren't wasn't weren't haven't hasn't hadn't won't wouldn't couldn't shouldn't absent absence unlikely free".split()
)
STOP_WORDS = frozenset(
    "a an the and or but if of to in on at by for with from as is are was were be been being am do does did have has "
    "had having i me my you your he she him her his it its they them their we us our this that these those there here "
    "what which who whom when where why how can could would should will shall may might must about into over under "
    "again any some such so than then too very just also only own same both each few more most other please tell let "
    "know ever get got go going well okay ok yes hi hello thank thanks doctor sorry sure really like".split()
)
_local = threading.local()


def words(text: str) -> list[str]:
    """Words in order, as written."""
    return [match.group() for match in _WORD.finditer(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) character offsets of each word: the tokens of spans where no tokenizer is given."""
    return [match.span() for match in _WORD.finditer(text)]


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of one word, lower case; a typographic apostrophe is a plain one."""
    stemmer = getattr(_local, "stemmer", None)
    if stemmer is None:
        stemmer = _local.stemmer = Stemmer.Stemmer("english")
    return str(stemmer.stemWord(word.lower().replace("’", "'")))


def stems(text: str) -> list[str]:
    """Stems of all words, in order."""
    return [stem(word) for word in words(text)]


def content_stems(text: str) -> list[str]:
    """Stems of the words that carry a topic, in order; negations stay."""
    return [stem(word) for word in words(text) if word.lower().replace("’", "'") not in STOP_WORDS]


def sentences(text: str) -> list[str]:
    """Sentences in order, stripped, none empty. A line break ends one; the dot of an abbreviation or of a list's number
    does not."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def is_negated(text: str) -> bool:
    """Whether an odd number of negations stands in a sentence."""
    return sum(word.lower().replace("’", "'") in NEGATIONS for word in words(text)) % 2 == 1
