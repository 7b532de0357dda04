"""Claims changed on purpose, for the audit of the cache: some must stay apart, rewordings should meet.

A rule gives a changed sentence or None where it does not apply. Rules of the set "tuning" were looked at while the
guard was written; those of "test" were not, and their words were chosen without its tables. Kinds with rules in the
test set alone (modality, route, time, qualifier, conjunction, comparison, exchange, site) are kinds that the guard was
not tuned on.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

Rule = Callable[[str, random.Random], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A claim and what was made of it by which rule of which kind; ``changed`` tells another fact unless reworded."""

    kind: str
    rule: str
    claim: str
    changed: str


def _found(pattern: str, text: str, rng: random.Random) -> re.Match[str] | None:
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    return rng.choice(matches) if matches else None


def _put(text: str, match: re.Match[str], word: str) -> str:
    if match.group()[:1].isupper() and word:
        word = word[0].upper() + word[1:]
    return text[: match.start()] + word + text[match.end() :]


def _swap(pairs: str) -> Rule:
    """One of the words is another: "a/b" both ways, "a>b" one way."""
    table: dict[str, str] = {}
    for pair in pairs.split(","):
        pair = pair.strip()
        one, other = re.split("[/>]", pair)
        table[one] = other
        if "/" in pair:
            table.setdefault(other, one)
    pattern = r"(?<![\w-])(?:" + "|".join(sorted(map(re.escape, table), key=len, reverse=True)) + r")(?![\w-])"

    def rule(text: str, rng: random.Random) -> str | None:
        match = _found(pattern, text, rng)
        return None if match is None else _put(text, match, table[match.group().lower()])

    return rule


def _drug(names: str) -> Rule:
    drugs = names.split()
    pattern = r"(?<![\w-])(?:" + "|".join(drugs) + r")(?![\w-])"

    def rule(text: str, rng: random.Random) -> str | None:
        match = _found(pattern, text, rng)
        if match is None:
            return None
        return _put(text, match, rng.choice([drug for drug in drugs if drug != match.group().lower()]))

    return rule


def _number(change: Callable[[float, random.Random], float]) -> Rule:
    def rule(text: str, rng: random.Random) -> str | None:
        match = _found(r"(?<![\w.,/-])\d+(?:\.\d+)?(?![\w/]|\.\d|,\d)", text, rng)
        if match is None:
            return None
        value = change(float(match.group()), rng)
        return text[: match.start()] + f"{value:g}" + text[match.end() :] if value != float(match.group()) else None

    return rule


def _insert(pattern: str, word: str) -> Rule:
    """A word after what the pattern finds."""

    def rule(text: str, rng: random.Random) -> str | None:
        match = _found(pattern, text, rng)
        return None if match is None else text[: match.end()] + " " + word + text[match.end() :]

    return rule


def _drop(pattern: str) -> Rule:
    def rule(text: str, rng: random.Random) -> str | None:
        match = _found(pattern, text, rng)
        if match is None:
            return None
        changed = re.sub(r"\s+", " ", text[: match.start()] + " " + text[match.end() :]).strip()
        return changed[0].upper() + changed[1:] if changed else None

    return rule


def _opened(opening: str) -> Rule:
    def rule(text: str, rng: random.Random) -> str | None:
        first = text.split()[0]
        return opening + (text if first[1:] != first[1:].lower() or len(first) == 1 else text[0].lower() + text[1:])

    return rule


def _not_true(text: str, rng: random.Random) -> str | None:
    return "It is not true that " + text[0].lower() + text[1:]


_ORGANS = (
    "arm|leg|eye|ear|kidney|lung|breast|hand|foot|knee|hip|shoulder|ovary|testicle|wrist|ankle|elbow|thigh|ureter|"
    "atrium|ventricle|hemisphere"
)


def side_pairs(text: str, first: str, second: str, rng: random.Random) -> tuple[str, str] | None:
    """A sentence with a side put in front of a paired organ, and with another side; None without such an organ."""
    match = _found(rf"(?<![\w-])(?:{_ORGANS})(?!\w)", text, rng)
    if match is None:
        return None
    return tuple(text[: match.start()] + side + " " + match.group() + text[match.end() :] for side in (first, second))  # type: ignore[return-value]


def _exchange(text: str, rng: random.Random) -> str | None:
    """What stands before and after "than", "causes" and the like change places."""
    match = re.fullmatch(
        r"([\w' -]{3,60}) ((?:(?:is|are) (?:more|less) [\w-]+ than)|causes?|caused|increases?|prevents?|follows?) "
        r"([\w' -]{3,60})\.?",
        text,
    )
    if match is None:
        return None
    one, verb, other = match.groups()
    return other[0].upper() + other[1:] + " " + verb + " " + one[0].lower() + one[1:]


def _two_numbers(text: str, rng: random.Random) -> str | None:
    matches = list(re.finditer(r"(?<![\w.,/-])\d+(?:\.\d+)?(?![\w/]|\.\d|,\d)", text))
    if len(matches) < 2 or matches[0].group() == matches[1].group():
        return None
    a, b = matches[0], matches[1]
    return text[: a.start()] + b.group() + text[a.end() : b.start()] + a.group() + text[b.end() :]


def _list_order(text: str, rng: random.Random) -> str | None:
    match = re.search(
        r"((?:include|such as|including|cause|causes) )([a-z][a-z ]+), ([a-z ]+),? (and|or) ([a-z ]+)(?=\.?$)", text
    )
    if match is None:
        return None
    lead, a, b, word, c = match.groups()
    return text[: match.start()] + f"{lead}{c}, {a}, {word} {b}" + text[match.end() :]


def _fronted(text: str, rng: random.Random) -> str | None:
    match = re.fullmatch(r"([A-Z][^,]{10,}?) ((?:in|during|after|before) [a-z][^,]{3,40}?)(\.?)", text)
    if (
        match is None
        or re.search(r"\b(?:and|or|that|which|who)\b", text)
        or len(re.findall(r"\b(?:in|during|after|before)\b", text)) > 1
    ):
        return None
    main, phrase, stop = match.groups()
    first = main.split()[0]
    main = main if first != first.capitalize() or len(first) == 1 else main[0].lower() + main[1:]
    return phrase[0].upper() + phrase[1:] + ", " + main + stop


_SPELLED = {
    str(i): word for i, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)
}


def _spelled_number(text: str, rng: random.Random) -> str | None:
    match = _found(r"(?<![\w.,/-])(?:1[0-2]|[1-9])(?![\w/%.,-]|\s*(?:%|and \d))", text, rng)
    return None if match is None else _put(text, match, _SPELLED[match.group()])


def _other_unit(text: str, rng: random.Random) -> str | None:
    match = _found(r"(?<![\w.,/-])(\d+) (days|weeks|mg|years|hours|grams|g)(?![\w/-])", text, rng)
    if match is None:
        return None
    number, unit = int(match.group(1)), match.group(2).lower()
    if unit == "weeks":
        return _put(text, match, f"{number * 7} days")
    if unit == "mg" and number >= 100:
        return _put(text, match, f"{number / 1000:g} g")
    if unit == "years" and number <= 5:
        return _put(text, match, f"{number * 12} months")
    if unit in ("g", "grams"):
        return _put(text, match, f"{number * 1000} mg")
    if unit == "days" and number % 7 == 0:
        return _put(text, match, f"{number // 7} weeks")
    return _put(text, match, f"{number * 60} minutes") if unit == "hours" else None


def _percent(text: str, rng: random.Random) -> str | None:
    match = _found(r"(?<=\d) ?%|(?<=\d) percent", text, rng)
    return (
        None
        if match is None
        else text[: match.start()] + (" percent" if "%" in match.group() else "%") + text[match.end() :]
    )


_MODAL = r"(?<![\w-])(?:is|are|was|were|can|should|will|must|does|do)(?![\w'])(?! not)"
TUNING: Mapping[str, Mapping[str, Rule]] = MappingProxyType(
    {
        "number": {"times_ten": _number(lambda x, rng: x * 10), "plus_one": _number(lambda x, rng: x + 1)},
        "negation": {"not": _insert(_MODAL, "not"), "no_not": _drop(r"\bnot\b")},
        "antonym": {
            "antonym": _swap(
                "increase/decrease, increases/decreases, increased/decreased, high/low, higher/lower, "
                "before/after, acute/chronic"
            ),
            "population": _swap("children/adults, men/women, pregnant/elderly"),
        },
        "drug": {
            "drug": _drug(
                "metformin ibuprofen aspirin prednisone sertraline escitalopram fluoxetine lisinopril metoprolol "
                "atorvastatin amoxicillin doxycycline omeprazole famotidine levothyroxine gabapentin tramadol "
                "naproxen warfarin insulin"
            )
        },
        "rewording": {
            "important": _opened("It is important to note that "),
            "note": _opened("Note that "),
            "contraction": _swap(
                "is not>isn't, are not>aren't, does not>doesn't, do not>don't, cannot>can't, should not>shouldn't"
            ),
            "synonym": _swap(
                "doctor/physician, medication/medicine, may>might, people>individuals, often>frequently, children>kids"
            ),
            "spelled": _spelled_number,
        },
    }
)
TEST: Mapping[str, Mapping[str, Rule]] = MappingProxyType(
    {
        "number": {
            "half": _number(lambda x, rng: x / 2),
            "tenth": _number(lambda x, rng: x / 10),
            "near": _number(lambda x, rng: x + rng.choice([-3, -2, 2, 3, 5]) if x > 5 else x + 2),
            "digits": _number(lambda x, rng: float(str(int(x))[::-1]) if x >= 12 else 2 * x),
            "unit": _swap(
                "mg>mcg, grams>milligrams, hours>days, days>weeks, weeks>months, months>years, minutes>hours, "
                "years>months, inches>feet"
            ),
            "bound": _swap(
                "at least>at most, more than>less than, less than>more than, up to>at least, over>under, within>after"
            ),
            "word": _swap(
                "two>three, three>four, four>six, five>seven, six>five, twice>once, half>a third, second>third, "
                "first>second"
            ),
        },
        "negation": {
            "never": _insert(_MODAL, "never"),
            "not_true": _not_true,
            "without": _swap("with>without, without>with"),
            "no": _swap(
                "have a>have no, has a>has no, have>do not have, has>does not have, cause>do not cause, "
                "causes>does not cause"
            ),
            "drop": _drop(r"\b(?:no|never|not|rarely)\b"),
            "unable": _swap(
                "able>unable, common>uncommon, likely>unlikely, usual>unusual, known>unknown, possible>impossible"
            ),
            "rarely": _insert(r"(?<![\w-])(?:is|are|can|may)(?! not)(?![\w'])", "hardly ever"),
        },
        "antonym": {
            "clinical": _swap(
                "benign/malignant, mild/severe, inherited/acquired, bacterial/viral, positive/negative, "
                "hypertension/hypotension, dominant/recessive, early/late, primary/secondary, internal/external, "
                "systolic/diastolic, artery/vein, arteries/veins, inflammatory/noninflammatory, "
                "infectious/noninfectious, active/inactive, hyperthyroidism/hypothyroidism"
            ),
            "plain": _swap(
                "better/worse, more/less, larger/smaller, large/small, safe/dangerous, cause/prevent, "
                "causes/prevents, gain/loss, common/rare, slow/fast, most/few, many/few, all/some, upper/lower, "
                "longer/shorter, stronger/weaker, easier/harder, improve/worsen, start/stop, starts/stops, "
                "usually/seldom, always/sometimes, often/seldom, top/bottom, rise/fall, strengthens/weakens, "
                "opens/closes, good/bad, strong/weak, healthy/unhealthy, normal/abnormal, can/cannot"
            ),
            "population": _swap(
                "women/men, children/teenagers, infants/toddlers, adults/children, boys/girls, newborns/adults, "
                "male/female, older/younger, babies/adults, females/males, mothers/fathers, "
                "pregnant/breastfeeding, elderly/young, hispanics/asians, girls>women"
            ),
        },
        "drug": {
            "drug": _drug(
                "acyclovir albuterol alendronate allopurinol amitriptyline amlodipine azathioprine baclofen "
                "bevacizumab bupropion carbamazepine carboplatin cetirizine chlorambucil cisplatin clonazepam "
                "clopidogrel cortisone cyclophosphamide cyclosporine dexamethasone diazepam digoxin "
                "diphenhydramine donepezil duloxetine estrogen etanercept etoposide furosemide glucagon "
                "haloperidol heparin hydrocortisone imatinib infliximab interferon isoniazid ketoconazole "
                "lamivudine lamotrigine levodopa lithium loratadine memantine mesalamine methotrexate "
                "mycophenolate naloxone nicotine penicillin phenobarbital phenytoin prednisolone prednisone "
                "progesterone propranolol quinine raloxifene ribavirin rifampin rituximab selegiline sildenafil "
                "spironolactone tacrolimus tamoxifen testosterone tetracycline thalidomide topiramate valproate "
                "vancomycin verapamil vincristine zidovudine insulin aspirin ibuprofen acetaminophen naproxen "
                "metformin warfarin steroids antibiotics"
            )
        },
        "modality": {
            "modal": _swap(
                "may>must, should>may, can>will, must>may, will>may, might>will, could>will, need to>may, "
                "recommended>required"
            )
        },
        "route": {
            "route": _swap(
                "by mouth>by injection, oral>topical, intravenous>oral, injected>swallowed, injection>tablet, "
                "pills>injections, topical>oral, inhaled>injected, cream>tablet"
            )
        },
        "time": {
            "time": _swap(
                "before>after, after>before, during>after, daily>weekly, morning>evening, until>after, "
                "now>previously, day>week, weeks>days, year>month, at birth>in adulthood, immediately>eventually"
            )
        },
        "qualifier": {
            "adverb": _drop(
                r"(?<=\s)(?:usually|sometimes|mainly|only|most|many|some|rarely|severe|chronic|high|low|possibly|partly)(?=\s)"
            ),
            "severe": _insert(r"(?<![\w-])(?:with|cause|causes|have|has)(?![\w-])", "severe"),
            "only": _insert(r"(?<![\w-])(?:is|are)(?! not)(?![\w'])", "only"),
            "condition": _drop(r"(?<=\w),? (?:if|unless|except|especially in|only if|only in) [^,.]+(?=\.?$)"),
        },
        "conjunction": {"and_or": _swap("and>or, or>and, and>but not")},
        "comparison": {
            "strength": _swap(
                "more>most, common>most common, higher>highest, important>most important, as>more than, "
                "better>best, risk>cause, linked>unrelated"
            )
        },
        "exchange": {"roles": _exchange, "numbers": _two_numbers},
        "site": {
            "site": _swap(
                "kidney/liver, kidneys/lungs, heart/lungs, brain/spinal cord, stomach/bladder, skin/bone, "
                "blood/urine, throat/nose, arms/legs, hands/feet, breast/ovarian, colon/rectum, knee/elbow, "
                "chest/abdomen, muscles/joints, nerves/tendons, thyroid/adrenal, pancreas/spleen"
            )
        },
        "rewording": {
            "opening": _opened("Keep in mind that "),
            "addition": _opened("In addition, "),
            "worth": _opened("It should be noted that "),
            "stop": lambda text, rng: text.rstrip(".") + (" ." if text.endswith(".") else "."),
            "article": _drop(r"(?<=\s)the(?=\s)"),
            "spelling": _swap(
                "tumor>tumour, tumors>tumours, color>colour, anemia>anaemia, diarrhea>diarrhoea, "
                "leukemia>leukaemia, esophagus>oesophagus, fiber>fibre, behavior>behaviour, center>centre, "
                "pediatric>paediatric, estrogen>oestrogen, edema>oedema, recognize>recognise, "
                "hemoglobin>haemoglobin, randomized>randomised, labor>labour, fetus>foetus"
            ),
            "synonym": _swap(
                "doctors>physicians, physician>doctor, help>assist, begin>start, begins>starts, illness>disease, "
                "usually>typically, sometimes>occasionally, caused by>due to, such as>for example, because of>due "
                "to, reduce>decrease, use>utilize, might>may, can>may, medicine>drug, drugs>medications, "
                "treatment>therapy, heart attack>myocardial infarction, high blood pressure>hypertension, "
                "kids>children, show>demonstrate, occurs>happens, important>significant, stop>discontinue, "
                "need>require, large>big, many>numerous, about>approximately, people>persons, whole>entire, "
                "abdomen>belly, tell>inform, often>commonly, called>known as, get>obtain, keep>maintain, "
                "also>additionally"
            ),
            "list": _list_order,
            "fronted": _fronted,
            "spelled": _spelled_number,
            "unit": _other_unit,
            "percent": _percent,
            "contraction": _swap(
                "is not>isn't, are not>aren't, does not>doesn't, do not>don't, cannot>can't, should "
                "not>shouldn't, will not>won't, it is>it's"
            ),
            "capitals": lambda text, rng: text[0].swapcase() + text[1:],
        },
    }
)
SIDES: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType(
    {
        "tuning": (("left", "right"),),
        "test": (
            ("right", "left"),
            ("left", "right"),
            ("left", "right"),
            ("one", "both"),
            ("upper", "lower"),
            ("contralateral", "ipsilateral"),
            ("affected", "unaffected"),
        ),
    }
)


def make_pairs(sentences: Sequence[str], which: str, per_kind: int, seed: int) -> Iterator[Pair]:
    """Up to ``per_kind`` pairs of every kind, its rules in turn, of sentences in a seeded order; no pair twice.

    A kind whose rules find too little gives fewer. ``which``: "tuning" or "test".
    """
    rules = {"tuning": TUNING, "test": TEST}[which]
    for kind in (*rules, "laterality"):
        rng = random.Random(f"{seed}|{which}|{kind}")
        order = list(sentences)
        rng.shuffle(order)
        yield from (
            _sides(order, which, per_kind, rng)
            if kind == "laterality"
            else _of_kind(order, kind, rules[kind], per_kind, rng)
        )


def _of_kind(
    order: Sequence[str], kind: str, rules: Mapping[str, Rule], per_kind: int, rng: random.Random
) -> Iterator[Pair]:
    seen: set[tuple[str, str]] = set()
    wanted = {name: -(-per_kind // len(rules)) for name in rules}
    for _ in range(8):  # again over all sentences: a rule chooses among the places it finds
        for text in order:
            name = max(wanted, key=lambda one: wanted[one])
            for rule in (name, *(one for one in rules if one != name)):
                if len(seen) >= per_kind:
                    return
                changed = rules[rule](text, rng) if wanted[rule] > 0 else None
                if changed and changed != text and (text, changed) not in seen:
                    seen.add((text, changed))
                    wanted[rule] -= 1
                    yield Pair(kind=kind, rule=rule, claim=text, changed=changed)
                    break
        if len(seen) < per_kind:
            wanted = {name: max(left, 1 + (per_kind - len(seen)) // len(rules)) for name, left in wanted.items()}


def _sides(order: Sequence[str], which: str, per_kind: int, rng: random.Random) -> Iterator[Pair]:
    count = 0
    for text in order:
        first, second = rng.choice(SIDES[which])
        if count < per_kind and (pair := side_pairs(text, first, second, rng)):
            count += 1
            yield Pair(kind="laterality", rule=f"{first}_{second}", claim=pair[0], changed=pair[1])
