"""The guard of the claim cache: do two claims say the same? Decided word by word; a wrong yes is worse than a no.

Embeddings cannot tell "500 mg" from "50 mg" or "left" from "right". The guard does not look for known dangers; it
aligns the two claims and **wants every difference explained as harmless**, so a change of a kind that nobody thought
of keeps claims apart. Explained are: determiners and fillers, inflection, spelling, the synonyms of claim_wording.py,
quantities that are equal in base units, and four moves of words:

* a fronted phrase ("In adults, X is used" - "X is used in adults"),
* the order of a plain list ("nausea, fever and rash"), where neither numbers nor negations stand in or beside it,
* "A of B" - "B A" ("risk of cancer" - "cancer risk"),
* the passive of a whole sentence ("Y is caused by X" - "X causes Y").

The endings -ed and -ing keep words apart (tense and role), a passive aside; -s does not.

Negations, modal verbs, prepositions, comparatives and quantities are words that keep their place, so scope needs no
grammar. The tables of classes at the end only name the reason for a reader and the statistics; they decide nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from m3.rewards import claim_wording
from m3.text.quantities import Quantity, find_quantities

Token = str | Quantity  # a word in canonical form, or a quantity
PHRASE = 6  # words of the longest synonym
MOVED = 12  # words of the longest fronted phrase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """What of a claim must be equal. ``breaks``: before which tokens a comma or bracket stands."""

    tokens: tuple[Token, ...]
    breaks: frozenset[int]

    @functools.cached_property
    def flight_key(self) -> str:
        """Equal for every two claims that ``same`` takes for the same (and for some others): content without order."""
        content = [token for token in self.tokens if isinstance(token, str) and token not in _LINKS]
        letters = sorted("".join(_ENDING.sub("", one) for one in content).replace("_", "").replace("e", ""))
        numbers = sorted(repr(token) for token in self.tokens if not isinstance(token, str))
        return "".join(letters) + "|" + "|".join(numbers)


_ENDING = re.compile(r"\+(?:ed|ing)$")


def normalise(claim: str) -> str:
    """A claim for the exact key: spaces, quotes, dashes, a final stop and the case of ordinary words do not count.

    Case counts in words all in capitals (ALL, AIDS, US) and within words of less than four letters after the first
    word (genotype Aa, anti-K, MBq); characters are composed, not folded: a superscript or "½" means something.
    """
    text = unicodedata.normalize("NFC", claim).replace("’", "'").replace("‘", "'")
    text = re.sub(r"[“”]", '"', re.sub(r"[‐‑–]", "-", text))
    text = re.sub(r"\s+", " ", text).strip().strip('"').rstrip(" .;,!")

    def folded(word: re.Match[str]) -> str:
        loud = len(word[0]) > 1 and word[0].isupper()
        return word[0] if loud or (word.start() and len(word[0]) < 4) else word[0].lower()

    return re.sub(r"[^\W\d_]+", folded, text)


@functools.lru_cache(maxsize=65536)
def signature(claim: str) -> Signature:
    """The signature of a claim."""
    text = unicodedata.normalize("NFC", claim).strip()
    for pattern, replacement in claim_wording.CONTRACTIONS:
        text = pattern.sub(replacement, text)
    text = claim_wording.strip_frames(text.strip('"“” '))
    found: list[Token] = []
    breaks: set[int] = set()
    for part in _parts(text):
        if part == ",":
            breaks.add(len(found))
        elif part == "of" and found and isinstance(found[-1], Quantity) and found[-1].unit == "fraction":
            continue  # "half of people", "1 in 2 people"
        elif part == "that" and len(found) in breaks:
            found.append("that,")  # "patients, who smoke," are not "patients who smoke"
        elif part == "with" and found and found[-1] == "patient":
            found[-1:] = ["person", part]  # who has a disease is a patient; elsewhere not everybody is one
        elif part in ("most", "least") and found and found[-1] == "the":
            found[-1] = part
        elif part == "the" and found and found[-1] == "be":
            found.append(part)  # "is the cause" is not "is a cause"
        elif isinstance(part, Quantity) or part not in claim_wording.DROPPED:
            found.append(part)
    tokens, breaks = _unfront(found, {at for at in breaks if 0 < at < len(found)})
    return Signature(tokens=tuple(tokens), breaks=frozenset(breaks))


def same(one: str, other: str) -> str:
    """ "" where two claims say the same; else why not: "quantity: ...", "negation: ...", "order", "word: ..."."""
    return difference(signature(one), signature(other))


def difference(a: Signature, b: Signature) -> str:
    """As ``same``, of signatures. Claims without a word are not the same as anything."""
    if not a.tokens or not b.tokens:
        return "word: nothing | nothing"
    if a.tokens == b.tokens or (a.flight_key == b.flight_key and _explained(a, b)):
        return ""
    counts = Counter(a.tokens), Counter(b.tokens)
    if counts[0] == counts[1]:
        return "order"
    return _reason([*(counts[0] - counts[1])], [*(counts[1] - counts[0])])


def _explained(a: Signature, b: Signature) -> bool:
    """Whether spacing or one of the moves makes one claim of the other."""
    a, b = _join(a, b), _join(b, a)
    if a.tokens == b.tokens or (Counter(a.tokens) == Counter(b.tokens) and _lists_alike(a, b)):
        return True
    return b.tokens in _restated(a.tokens) or a.tokens in _restated(b.tokens)


# -- words ------------------------------------------------------------------------------------------------------------
_PIECE = re.compile(  # words; the minus of "ER-"; breaks; any sign that is no ordinary punctuation
    r"""[^\W_]+(?:'[^\W\d_]+)?|(?<=[\w(])[-−](?=[\s,.;)]|$)|[,()\[\]]|[^\w\s.;:!'"’‘“”`‐‑–—−…{}|\\-]"""
)
_SILENT = frozenset("*#~^()[]")
_SIGNS = {"&": "and", "-": "minus", "−": "minus"}
_CAPITALS = frozenset(  # words that mean another thing all in capitals
    "ALL AIDS US IT WHO PAD CAT PET ADD ACE ARM CAP SAD MS AS IS IN NO DO ON ID GO PE AN OR MAD RAD LAP MEN".split()
)


_SYMBOL = re.compile(
    r"[B-HJ-WYZ]|[A-Z][a-z]?[A-Z]|(?!In|It|If|No|Is|On|At|As|An|Of|Or|By|To|Do|We|He|So|Up|My|Be|Dr)[A-Z][A-Za-z]"
)


@functools.cache
def _synonyms() -> tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], tuple[str, str]]]:
    """(surface forms -> canonical word, base forms -> it and the ending of the listed first word)."""
    surface: dict[tuple[str, ...], str] = {}
    bases: dict[tuple[str, ...], tuple[str, str]] = {}
    for line in claim_wording.SYNONYMS.strip().splitlines():
        alternatives = [tuple(one.split()) for one in line.split("|")]
        canonical = "_".join(claim_wording.base(word.lower()) for word in alternatives[0])
        for words in alternatives:
            lower = tuple(word.lower() for word in words)
            if lower[0].startswith("="):
                surface[(lower[0][1:], *lower[1:])] = canonical
            else:
                bases[tuple(claim_wording.base(word) for word in lower)] = canonical, claim_wording.ending(lower[0])
    return surface, bases


def _parts(text: str) -> Iterator[Token]:
    """Canonical words, quantities and "," of breaks, in order; dropped words still among them."""
    loud = text.isupper()
    at = 0
    for found in find_quantities(text):
        yield from _words(text, at, found.start, loud)
        yield found.quantity
        at = found.end
    yield from _words(text, at, len(text), loud)


def _words(text: str, start: int, end: int, loud: bool) -> Iterator[str]:
    surface, bases = _synonyms()
    raw = [piece.group() for piece in _PIECE.finditer(text, start, end)]
    lower = [
        word if not loud and (word in _CAPITALS or (i and _SYMBOL.fullmatch(word))) else word.lower()
        for i, word in enumerate(raw)
    ]
    if not loud and "A" in raw[start == 0 :]:
        lower = [
            "A" if word == "A" and (i or start) else low for i, (word, low) in enumerate(zip(raw, lower, strict=True))
        ]
    folded = [_SIGNS.get(word, word if word.isupper() else claim_wording.base(word)) for word in lower]
    sought = [
        claim_wording.base(word.lower()) if _SYMBOL.fullmatch(word) and word not in _CAPITALS else one
        for word, one in zip(lower, folded, strict=True)
    ]
    loose = ["" if word.isupper() else claim_wording.ending(word) for word in lower]
    i = 0
    while i < len(raw):
        for n in range(min(PHRASE, len(raw) - i), 0, -1):
            if canonical := surface.get(tuple(lower[i : i + n])):
                yield canonical
                break
            canonical, listed = bases.get(tuple(sought[i : i + n]), ("", ""))
            if canonical == "may" and not (lower[i] == "may" or _merely_may(folded[i + 1 :])):
                canonical = ""  # "can see", "may eat" are no chances, "cannot" is not "may not"
            if canonical:
                yield canonical + (loose[i] if loose[i] != listed else "")
                break
        else:
            n = 1
            if raw[i] in ",()[]":
                yield ","
            elif raw[i] not in _SILENT:
                yield _letter(raw, i, start) or _THAT.get(folded[i], folded[i]) + loose[i]
        i += n


# After these a modal verb tells a chance; elsewhere "can" may be an ability and "may" a permission.
_EVENTS = frozenset(
    claim_wording.base(word)
    for word in "be have cause occur happen include affect lead result increase decrease reduce lower raise worsen "
    "improve help hurt develop appear become begin damage show feel vary last spread make trigger require need "
    "indicate produce harm prevent relieve recur interact contribute experience lose get also sometimes often "
    "even".split()
)


def _merely_may(after: Sequence[str]) -> bool:
    return bool(after) and after[0] in _EVENTS


_LETTERED = frozenset(
    "vitamin hepatitis influenza type group hemophilia haemophilia protein factor grade class".split()
)


def _letter(raw: Sequence[str], i: int, start: int) -> str:
    """ "A" for an "a" that is a name, in whatever case: "vitamin a"."""
    return "A" if raw[i] in ("a", "A") and i and raw[i - 1].lower() in _LETTERED else ""


def _bases(words: str) -> frozenset[str]:
    return frozenset(claim_wording.base(word) for word in words.split())


_THAT = {"which": "that", "who": "that", "whom": "that"}
# Words that link and are not content: what a move may change the number of, and what ends a list.
_LINKS = _bases("of by be and or")
_PREPOSITIONS = _bases(
    "in for among during after before if when because although becaus_of with at on within throughout until unless "
    "once while by from under despite to"
)
_ENDS_LIST = _bases("in for among during after before if when because with at on by from to that may be have while")
_STARTS_LIST = _bases(
    "such_as include be have cause of for in with like experience prevent treat decrease increase contain affect among "
    "between develop to by from or and"
)
_NEVER_MOVED = _bases(
    "not no never without nor neither respective respectively than but except versus vs then only unless"
)


_CLAUSES = _bases("if because when while although unless once")


def _unfront(tokens: list[Token], breaks: set[int]) -> tuple[list[Token], set[int]]:
    """A phrase that a preposition opens and a comma closes stands at the end."""
    if not tokens or tokens[0] not in _PREPOSITIONS or not breaks:
        return tokens, breaks
    cut = min(breaks)
    if cut > MOVED or cut < 2 or (tokens[0] not in _CLAUSES and not {"that", "that,"}.isdisjoint(tokens[cut:])):
        return tokens, breaks  # behind a relative clause it would belong to that
    length = len(tokens)
    return tokens[cut:] + tokens[:cut], {at - cut for at in breaks if at > cut and at < length}


def _join(a: Signature, b: Signature) -> Signature:
    """``a`` with two words in one where ``b`` writes them in one ("health care", "healthcare")."""
    wanted = {token for token in b.tokens if isinstance(token, str)} - set(a.tokens)
    if not wanted:
        return a
    tokens: list[Token] = []
    moved: dict[int, int] = {}
    i = 0
    while i < len(a.tokens):
        moved[i] = len(tokens)
        one, other = a.tokens[i], a.tokens[i + 1] if i + 1 < len(a.tokens) else None
        if (
            isinstance(one, str)
            and isinstance(other, str)
            and claim_wording.base(one + other) in wanted
            and _joins(one, other)
        ):
            tokens.append(claim_wording.base(one + other))
            i += 2
        else:
            tokens.append(one)
            i += 1
    return Signature(tokens=tuple(tokens), breaks=frozenset(moved[at] for at in a.breaks if at in moved))


def _joins(one: str, other: str) -> bool:
    return one == "non" or (min(len(one), len(other)) >= 3 and one not in _NEVER_MOVED | _PREPOSITIONS)


# -- moves ------------------------------------------------------------------------------------------------------------
def _content(token: Token) -> bool:
    return isinstance(token, str) and token not in _LINKS | _PREPOSITIONS | _NEVER_MOVED | {"that", "may", "have"}


def _noun(token: Token) -> bool:
    return _content(token) and token not in _STARTS_LIST


def _restated(tokens: tuple[Token, ...]) -> Iterator[tuple[Token, ...]]:
    """The claim with one "A of B" as "B A", or in the active voice."""
    for at, token in enumerate(tokens):
        if token != "of":
            continue
        for left in (1, 2):
            if left == 2 and at > 2 and _noun(tokens[at - 3]):
                continue  # part of a longer phrase, a verb perhaps: "viruses infect cells of animals"
            for right in range(1, 4):
                before, after = tokens[max(0, at - left) : at], tokens[at + 1 : at + 1 + right]
                rest = tokens[at + 1 + right :]
                whole = not rest or not _content(rest[0]) or rest[0] in _STARTS_LIST  # all of B, not a part of it
                if len(before) == left and len(after) == right and whole and all(map(_noun, before + after)):
                    yield tokens[: at - left] + after + before + rest
    for at in range(1, len(tokens) - 2):
        if tokens[at] == "be" and tokens[at + 2] == "by":
            modal = at
            while modal > 1 and tokens[modal - 1] in _MODALS:
                modal -= 1
            yield tokens[at + 3 :] + tokens[modal:at] + (_plain(tokens[at + 1]),) + tokens[:modal]
        if tokens[at] == "be" and tokens[at + 1] == "not" and tokens[at + 3 : at + 4] == ("by",):
            yield (*tokens[at + 4 :], "not", _plain(tokens[at + 2]), *tokens[:at])


def _plain(token: Token) -> Token:
    return token.removesuffix("+ed") if isinstance(token, str) else token


_MODALS = _bases("may should must will not often usually sometimes rarely mainly")


_ORDERED = _bases("respective respectively order sequence succession turn then first last follow precede") | {
    "follow+ed"
}


_LOSSES = _bases("loss lack absence deficiency removal shortage")


def _lists_alike(a: Signature, b: Signature) -> bool:
    """Whether the claims differ by the order of one plain list alone; both have the same tokens."""
    if any(token in _ORDERED for token in a.tokens):
        return False
    first = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y)
    last = next(i for i in range(len(a.tokens), 0, -1) if a.tokens[i - 1] != b.tokens[i - 1])
    for start in range(first, max(-1, first - 4), -1):
        if start and not (a.tokens[start - 1] in _STARTS_LIST or start in a.breaks & b.breaks):
            continue
        if start > 1 and a.tokens[start - 1] == "of" and a.tokens[start - 2] in _LOSSES:
            continue  # "loss of appetite and headache" is no loss of a headache
        for end in range(last, min(len(a.tokens), last + 3) + 1):
            if end < len(a.tokens) and not (a.tokens[end] in _ENDS_LIST or end in a.breaks & b.breaks):
                continue
            one, other = _items(a, start, end), _items(b, start, end)
            if one is not None and other is not None and one == other:
                return True
    return False


_NOT_IN_ITEMS = (_STARTS_LIST | _ENDS_LIST | _PREPOSITIONS | _NEVER_MOVED) - {"of"}  # they nest, or open a clause


def _items(signature: Signature, start: int, end: int) -> tuple[str, list[tuple[str, ...]]] | None:
    """(conjunction, sorted items) of a plain list of two or more; None where it is none."""
    conjunction = ""
    items: list[list[str]] = [[]]
    for at in range(start, end):
        token = signature.tokens[at]
        if at in signature.breaks and items[-1]:
            items.append([])
        if token in ("and", "or"):
            if conjunction not in ("", token):
                return None
            conjunction = str(token)
            if items[-1]:
                items.append([])
        elif not isinstance(token, str) or token in _NOT_IN_ITEMS:
            return None
        else:
            items[-1].append(token)
    if len(items) < 2 or not all(items) or max(map(len, items)) > 4:
        return None
    return conjunction, sorted(map(tuple, items))


# -- names of reasons -------------------------------------------------------------------------------------------------
_CLASSES = (
    (
        "negation",
        "not no never without nor neither none nothing nobody hardly barely non fail lack absent absence except cannot",
    ),
    ("laterality", "left right bilateral unilateral ipsilateral contralateral both"),
    (
        "route",
        "oral intravenous intramuscular subcutaneous topical rectal inhaled inhalation nasal intranasal sublingual "
        "transdermal ophthalmic otic vaginal injection inject epidural intrathecal iv im sc patch cream",
    ),
    (
        "time",
        "before after during until since while previous previously current currently past future early earlier late "
        "later acute chronic daily weekly morning night evening was had did will immediately now long short term "
        "sudden gradual",
    ),
    (
        "population",
        "child adult infant adolescent elderly woman man pregnant pregnancy newborn neonate boy girl person breastfeed "
        "pediatric adolescents premature postmenopausal old young",
    ),
    (
        "modality",
        "may must should will would shall can might could always sometimes usually often rarely possible certain "
        "likely",
    ),
    (
        "comparison",
        "more less most least high low higher lower large small great few many all some any every each only",
    ),
    (
        "site",
        "arm leg hand foot head neck chest abdomen stomach heart liver kidney lung brain eye ear nose throat skin bone "
        "muscle joint back spine knee hip shoulder wrist ankle elbow finger toe bladder bowel colon rectum pancreas "
        "spleen breast ovary uterus prostate thyroid upper lower anterior posterior proximal distal medial lateral",
    ),
)
_CLASS_OF = {claim_wording.base(word): name for name, words in reversed(_CLASSES) for word in words.split()}
_OPPOSED = re.compile(
    r"^(?:hyper|hypo|hypo|anti|un|in|im|ir|il|dis|non|brady|tachy|pre|post|over|under|mal|de|intra|extra|inter|supra|infra)"
)
_DRUG = re.compile(
    r"(?:olol|pril|sartan|statin|azole|azol|mycin|micin|cillin|cyclin|floxacin|tidin|prazol|dipin|thiazid|semid|gliptin|"
    r"gliflozin|glitazon|formin|tripta?n|oxetin|pramin|triptylin|zepam|zolam|barbital|caine|cain|coxib|profen|mab|nib|"
    r"vir|vudin|dronat|olon|ason|sone|terol|tropium|lukast|parin|xaban|gatran|grel|fibrat|setron|dopa|giline|sulfa|"
    r"cef\w+|parib|ciclib|mide|tide|fungin|conazol|quin)e?$"
)


def _reason(only_a: Sequence[Token], only_b: Sequence[Token]) -> str:
    if any(not isinstance(token, str) for token in (*only_a, *only_b)):
        return f"quantity: {_shown(only_a, Quantity)} | {_shown(only_b, Quantity)}"
    shown = f"{_shown(only_a, str)} | {_shown(only_b, str)}"
    strings = [token for token in (*only_a, *only_b) if isinstance(token, str)]
    for name, _ in _CLASSES:
        if any(_CLASS_OF.get(token) == name for token in strings):
            return f"{name}: {shown}"
    if any(_OPPOSED.sub("", token) != token or _DRUG.search(token) for token in strings):
        name = "drug" if any(_DRUG.search(token) for token in strings) else "opposite"
        return f"{name}: {shown}"
    return f"word: {shown}"


def _shown(tokens: Sequence[Token], kind: type) -> str:
    named = [
        token.replace("_", " ")
        if isinstance(token, str)
        else f"{token.comparator}{token.low:g}..{token.high:g} {token.unit}".strip()
        for token in tokens
        if isinstance(token, kind)
    ]
    return ", ".join(named) or "nothing"
