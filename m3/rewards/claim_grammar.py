"""English grammar for claims, by lists of words: finite verbs, subjects, imperatives, clauses that can stand alone.

No parser: a sentence is cut only where a listed pattern is sure, so what is not understood stays whole.
"""

from __future__ import annotations

import re

AUXILIARIES = frozenset(
    "is are was were has have had does do did can could may might must should will would isn't aren't wasn't "
    "weren't hasn't haven't doesn't don't didn't can't cannot couldn't shouldn't won't wouldn't".split()
)
_VERBS = frozenset(
    "act affect allow appear arise associate attack become begin belong block boost break bring build carry cause "
    "change clear come consist contain contribute control cover create cure damage decrease depend destroy "
    "determine develop die differ disappear disrupt drop ease enter exist fall feel fight follow form get give go "
    "grow happen harm heal help hurt improve include increase infect inhibit interact interfere involve irritate "
    "keep kill lack last lead lie limit look lose lower make mean measure need occur offer persist play predict "
    "prevent produce promote protect provide raise reach reduce refer regulate relax release relieve remain "
    "remove replace require respond result rise run seem serve show slow soothe spread start stay stimulate stop "
    "store strengthen suffer suggest support swell take target tend thin trigger treat use vary weaken work "
    "worsen".split()
)


def _third(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb[-1] == "y" and verb[-2] not in "aeiou" else verb + "s"


_THIRD = frozenset(_third(verb) for verb in _VERBS)
_PAST = frozenset("caused contained developed found gained included increased led made occurred reduced showed".split())
_FINITE = AUXILIARIES | _THIRD | _PAST | _VERBS
# Words that are nouns as often as verbs, where they stand after an article or an adjective.
_ALSO_NOUNS = frozenset(
    "act attack cause change control cover cure damage drop fall feel fight form harm help increase decrease lack "
    "last lead limit look need offer play rise result results run show support target treat use uses work works "
    "causes changes attacks forms increases decreases needs limits drops rises means heals start release stores "
    "tends thin slow stop lower clear spread swell measures lasts lies go get give come stay treats".split()
)
_IMPERATIVES = frozenset(
    "add apply avoid call change choose clean continue drink eat elevate exercise follow gargle get give go "
    "increase keep limit maintain massage monitor practice practise protect reduce remove replace rest rinse seek "
    "see sleep soak stay stop take treat try use visit wash wear consult talk speak contact make ensure check "
    "discuss do start quit eliminate include perform manage place put raise lie sit store skip ask tell inform".split()
)
_DETERMINERS = frozenset(
    "a an the this that these those some any no its their his her our my your such each every".split()
)
_PREPOSITIONS = frozenset(
    "of in on at by for with from to into as than between during after before without within against about under "
    "over through per via among because if when while although though since that which who".split()
)
_ADVERB = re.compile(r"(?:\w+ly|also|often|not|never|always|sometimes|then|still|even|just)$")
_GENERIC = (
    "medication medicine drug condition disease disorder infection treatment test procedure virus illness "
    "supplement vaccine therapy antibiotic"
).split()
_PRONOUN = re.compile(
    rf"^(?:(?P<one>(?:this|such an?)\s+(?:{'|'.join(_GENERIC)})|it|he|she|this|that)"
    rf"|(?P<many>(?:these|such)\s+(?:{'|'.join(_GENERIC)})e?s|they|these|those|both|some|many|most|others|all|none)"
    r"|(?P<whose>its|their|his|her))(?=\s)",
    re.I,
)
_EXPLETIVE = re.compile(
    r"^it['’]?\s*(?:is|was|may be|can be|might be|s)\s+(?:\w+ly\s+|not\s+|also\s+|always\s+)*(?:important|essential|"
    r"best|safe|safer|possible|impossible|necessary|recommended|advisable|advised|common|uncommon|likely|unlikely|normal|"
    r"crucial|vital|helpful|rare|clear|known|unclear|unknown|better|good|dangerous|difficult|easy|hard|true|believed|"
    r"thought|estimated|wise|critical|time|a good idea)\s+(?:to|that|for|if|how|whether)\b",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]")


def _tokens(text: str) -> list[re.Match[str]]:
    return list(_WORD.finditer(text))


def finite_verb(text: str) -> int:
    """Where the first finite verb begins, from 1; 0 without one."""
    found = _tokens(text)
    for i, token in enumerate(found):
        if i and _is_finite(found, i):
            return token.start()
    return 0


def _is_finite(found: list[re.Match[str]], i: int) -> bool:
    word = found[i].group().lower().replace("’", "'")
    if word not in _FINITE:
        return False
    if word in AUXILIARIES:
        return True
    k = i - 1
    while k > 0 and _ADVERB.match(found[k].group().lower()):
        k -= 1
    before = found[k].group().lower()
    if before in _DETERMINERS or before in _PREPOSITIONS or before in ("and", "or", ","):
        return False
    if word in _VERBS and word not in _THIRD:  # a base form: after a modal, or where the subject is plural
        return before in AUXILIARIES or _plural(" ".join(token.group() for token in found[: k + 1]))
    if word in _ALSO_NOUNS:  # "heart attacks", "symptom changes": a verb only where something follows
        return (
            i + 1 < len(found) and found[i + 1].group() not in ",.;:)" and found[i + 1].group().lower() not in _FINITE
        )
    return True


_ORDER = re.compile(
    r"(?:please\s+)?(?P<no>do not|don['’]t|never)?\s*(?P<verb>[a-z]+)\b(?!\s*(?:[,:(]|and\b|or\b|of\b))", re.I
)


def imperative(text: str) -> str:
    """ "positive" or "negative" where a text tells someone what to do; "" where not."""
    match = _ORDER.match(text)
    if match is None:
        return ""
    no = (match["no"] or "").lower()
    if no and no != "never":
        return "negative"
    rest = text[match.end() :].split(maxsplit=1)
    if match["verb"].lower() not in _IMPERATIVES or not rest:
        return ""
    if no:
        return "negative"
    after = rest[0].lower().strip(".,")
    return "" if after in AUXILIARIES or after in _THIRD else "positive"  # "Exercise is ...", "Sleep helps ..."


def noun_phrase(text: str) -> str:
    """The subject of a statement: what stands before its first finite verb; "" where that is no plain noun phrase."""
    head = text[: finite_verb(text)].strip()
    if not head or imperative(text) or pronoun(text) or len(head.split()) > 8 or re.search(r"[,;:]", head):
        return ""
    if _NO_SUBJECT.match(head):
        return ""
    kept = head.split()
    while kept and _ADVERB.match(kept[-1].lower()):
        kept.pop()
    return " ".join(kept)


_NO_SUBJECT = re.compile(
    r"(?:if|when|while|although|because|since|after|before|for|in|here|there|you|i|we|as|with|during|to|it|by|no|patients?|"
    r"people|studies|doctors?)\b",
    re.I,
)
_SINGULAR_S = re.compile(r"(?:itis|osis|asis|etes|ness|us|is|ss|ies)$")


def _plural(head: str) -> bool:
    """Whether a noun phrase is plural, by its last word before a preposition, or by an "and"."""
    noun = re.split(rf"\s+(?:{'|'.join(_PREPOSITIONS)})\b", head.lower(), maxsplit=1)[0].split()
    if not noun:
        return False
    last = noun[-1].strip(")")
    if last in ("people", "you", "they", "children", "women", "men", "bacteria", "we", "who", "which", "that"):
        return True
    return (
        (last.endswith("s") and not _SINGULAR_S.search(last))
        or last.endswith(("ries", "cies", "dies"))
        or "and" in noun
    )


def pronoun(text: str) -> str:
    """The leading pronoun, or "this drug" and its like, that stands for something named before; "" without one."""
    match = _PRONOUN.match(text)
    if match is None or _EXPLETIVE.match(text):
        return ""
    if (
        match.lastgroup != "whose"
        and match.group().lower() not in ("it", "they", "he", "she")
        and " " not in match.group()
    ):
        after = _tokens(text[match.end() :])
        if not after or after[0].group().lower() not in AUXILIARIES | _THIRD | _PAST | _VERBS:
            return ""  # "this class of drugs", "some people"
    return match.group()


_RELATIONAL = re.compile(
    r"((?:[\w-]+\s+){0,3}?(?:symptoms|signs|side[ -]effects|adverse effects|causes|risk factors|complications|"
    r"treatments?|treatment options))(?=\s+(?:may|can|could|might|usually|often|commonly|include|are|is)\b)",
    re.I,
)


class Subjects:
    """The last subjects of a text, singular and plural: what a pronoun can stand for."""

    def __init__(self) -> None:
        self.singular = self.plural = self.last = ""

    def note(self, text: str) -> None:
        """Remember the subject of a statement, if it has a plain one."""
        if head := noun_phrase(text):
            self.name(head)

    def name(self, subject: str) -> None:
        """Remember a subject."""
        self.last = subject
        if _plural(subject):
            self.plural = subject
        else:
            self.singular = subject

    def resolve(self, clause: str) -> str | None:
        """The clause with its leading pronoun replaced; None where nothing is there to put in its place.

        "Symptoms" of nothing named are those of the last singular subject.
        """
        found = pronoun(clause)
        if not found:
            owner = self.singular
            relational = _RELATIONAL.match(clause) if owner and owner.lower() not in clause.lower() else None
            return f"{relational.group()} of {owner}{clause[relational.end() :]}" if relational else clause
        match = _PRONOUN.match(clause)
        assert match is not None
        rest = clause[match.end() :]
        if match.lastgroup == "whose":
            return f"{self.last}'s{rest}" if self.last else None
        if found.lower() in ("some", "many", "most", "others", "all", "none"):
            return None
        subject = self.singular if match.lastgroup == "one" else self.plural
        return f"{subject}{rest}" if subject else None


def split_clauses(text: str) -> list[str]:
    """Clauses that have a subject and a verb each, cut at ";" and at ", and|but|while|whereas|so"; and verbs of one
    subject, cut at "and" before a finite verb. A sentence that begins with a condition stays whole."""
    if re.match(r"(?:if|when|while|although|because|since|unless|after|before)\b", text, re.I):
        return [text]
    parts = re.split(r"\s*;\s+", text)
    out = []
    for part in parts:
        out += _split_coordinated(part)
    return out if all(finite_verb(part) or imperative(part) for part in out) else [text]


_JOINT = re.compile(r",\s+(?:and|but|while|whereas)\s+")
_AND = re.compile(r",?\s+and\s+(?:(?:also|then|usually|often|may also|can also)\s+)?(?=([a-z']+)\s)")


def _split_coordinated(text: str) -> list[str]:
    for match in _JOINT.finditer(text):
        left, right = text[: match.start()], text[match.end() :]
        at = finite_verb(right)
        if finite_verb(left) and at and len(right[:at].split()) <= 6 and "," not in right[:at]:
            return [*_split_coordinated(left), *_split_coordinated(right)]
    at = finite_verb(text)
    subject = text[:at].strip()
    if not at or "," in subject or imperative(text):
        return [text]
    for match in _AND.finditer(text, at):
        verb = match.group(1)
        left, right = text[: match.start()], text[match.start(1) :]
        if (verb in _THIRD or verb in AUXILIARIES) and not re.search(r"\b(?:that|which|who|if|when)\b", left[at:]):
            return [left, *(f"{subject} {one}" for one in [right])]
    return [text]


_LIST_VERB = re.compile(r"\b(?:include|includes|contain|contains|cause|causes)\s+")
_UNLIKE = re.compile(r"[;:()]|\b(?:or|but|which|that|if|when|because|while|as well as|not|both)\b", re.I)


def split_list(text: str) -> list[str]:
    """One fact for each object of "include", "contain" or "cause" in a list with a comma; else the text itself."""
    match = _LIST_VERB.search(text)
    if match is None:
        return [text]
    head, tail = text[: match.end()], text[match.end() :].rstrip(" .")
    modal = re.search(r"\b(?:can|may|could)\s+$", text[: match.start()])
    if (match.start() != finite_verb(text) and not modal) or "," not in tail or _UNLIKE.search(tail):
        return [text]
    items = [item for item in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", tail) if item]
    if len(items) < 3 or any(len(item.split()) > 5 or finite_verb(f"x {item}") for item in items):
        return [text]
    return [f"{head}{item}" for item in items]
