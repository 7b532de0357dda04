"""Numbers with units out of English text, in base units, so that "24 hours" and "one day" are the same quantity.

A quantity is (low, high, unit, comparator). Units are folded to g, L, s, m, mol, IU, Eq, Pa, °C, J, W, Hz and
"fraction" (percent and words such as "half"); a rate keeps its parts ("g/s", "g/g/s" for mg/kg/day, "1/s" for twice
daily), so mmol/L ("mol/L") and mg/dL ("g/L") never meet. A number without a unit is a count (unit ""). What the number
counts is not looked at. Digits inside a name ("B12", "COVID-19", "omega-3") belong to the name and are no quantity.

Calendar: a week is 7 days, a month 30.4375 days, a year 365.25 days, so 12 months are a year and 4 weeks are no month.
Sources of factors: SI brochure, 9th edition; mmHg 133.322 Pa; 1 lb 453.592 g; 1 cal 4.184 J.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number (low == high) or a range in base units.

    ``comparator``: "", "<", "<=", ">", ">=", "~" (about), "within", or "over" of a time, which may mean "during" or
    "more than". ``low`` is what was written first: "from 10 mg to 5 mg" is not "from 5 mg to 10 mg".
    """

    low: float
    high: float
    unit: str = ""
    comparator: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundQuantity:
    """A quantity and the characters [start, end) of the text that say it, comparator and unit included."""

    quantity: Quantity
    start: int
    end: int


# Name in text -> (base unit, factor). Abbreviations are told apart by case (M, m; g, G) where that matters.
_NAMES: tuple[tuple[str, float, str], ...] = (
    ("g", 1.0, "g gram grams gramme grammes gm gms"),
    ("g", 1e-3, "mg mgs milligram milligrams milligramme milligrammes"),
    ("g", 1e-6, "mcg µg μg ug microgram micrograms microgramme microgrammes"),
    ("g", 1e-9, "ng nanogram nanograms"),
    ("g", 1e-12, "pg picogram picograms"),
    ("g", 1e3, "kg kgs kilogram kilograms kilogramme kilogrammes kilo kilos"),
    ("g", 453.592, "lb lbs pound pounds"),
    ("g", 28.3495, "oz ounce ounces"),
    ("L", 1.0, "L l liter liters litre litres"),
    ("L", 1e-3, "mL ml mls cc milliliter milliliters millilitre millilitres"),
    ("L", 1e-1, "dL dl deciliter deciliters decilitre decilitres"),
    ("L", 1e-6, "µL μL uL µl μl ul microliter microliters microlitre microlitres mm3 mm³"),
    ("L", 1e-15, "fL fl femtoliter femtoliters"),
    ("s", 1.0, "s sec secs second seconds"),
    ("s", 1e-3, "ms msec millisecond milliseconds"),
    ("s", 60.0, "min mins minute minutes"),
    ("s", 3600.0, "h hr hrs hour hours"),
    ("s", 86400.0, "d day days"),
    ("s", 7 * 86400.0, "wk wks week weeks"),
    ("s", 14 * 86400.0, "fortnight fortnights"),
    ("s", 30.4375 * 86400.0, "month months mo mos"),
    ("s", 365.25 * 86400.0, "y yr yrs year years yo y/o"),
    ("s", 3652.5 * 86400.0, "decade decades"),
    ("m", 1.0, "m meter meters metre metres"),
    ("m", 1e-2, "cm cms centimeter centimeters centimetre centimetres"),
    ("m", 1e-3, "mm millimeter millimeters millimetre millimetres"),
    ("m", 1e-6, "µm μm um micron microns micrometer micrometers micrometre micrometres"),
    ("m", 1e-9, "nm nanometer nanometers nanometre nanometres"),
    ("m", 1e3, "km kilometer kilometers kilometre kilometres"),
    ("m", 0.0254, "inch inches"),
    ("m", 0.3048, "ft foot feet"),
    ("m", 1609.344, "mile miles"),
    ("m2", 1.0, "m2 m²"),
    ("m2", 1e-4, "cm2 cm²"),
    ("mol", 1.0, "mol mole moles M"),
    ("mol", 1e-3, "mmol mmols millimole millimoles mM"),
    ("mol", 1e-6, "µmol μmol umol micromole micromoles"),
    ("mol", 1e-9, "nmol nanomole nanomoles"),
    ("mol", 1e-12, "pmol picomole picomoles"),
    ("IU", 1.0, "IU U iu unit units"),
    ("IU", 1e-3, "mIU mU"),
    ("Eq", 1e-3, "mEq meq milliequivalent milliequivalents"),
    ("Osm", 1e-3, "mOsm mosm"),
    ("Pa", 133.322, "mmHg mmhg mm-Hg torr"),
    ("Pa", 98.0665, "cmH2O"),
    ("Pa", 1e3, "kPa kilopascal kilopascals"),
    ("J", 4184.0, "kcal kcals kilocalorie kilocalories Calories"),
    ("J", 4.184, "cal calorie calories"),
    ("J", 1e3, "kJ kilojoule kilojoules"),
    ("Gy", 1.0, "Gy gray grays"),
    ("Bq", 1.0, "Bq"),
    ("Bq", 1e-3, "mBq"),
    ("Bq", 1e3, "kBq"),
    ("Bq", 1e9, "GBq"),
    ("Bq", 1e6, "MBq"),
    ("Sv", 1e-3, "mSv millisievert millisieverts"),
    ("Hz", 1.0, "Hz hertz"),
    ("W", 1.0, "W watt watts"),
    ("1/s", 1 / 60, "bpm"),
    ("fraction", 1e-2, "% percent pct"),
)
UNITS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {name: (base, factor) for base, factor, names in _NAMES for name in names.split()}
)
_LOWER = {name.lower(): unit for name, unit in UNITS.items() if len(name) > 2 and name != "Calories"}

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: float(i) for i, word in enumerate(_ONES.split())}
_WORDS |= {word: 10.0 * i for i, word in enumerate(_TENS.split(), 2)} | {"dozen": 12.0}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
_FRACTIONS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5, "sixth": 1 / 6, "eighth": 1 / 8}
_FRACTIONS |= {"tenth": 1 / 10, "hundredth": 1 / 100}
_GLYPHS = {"½": 1 / 2, "⅓": 1 / 3, "⅔": 2 / 3, "¼": 1 / 4, "¾": 3 / 4, "⅕": 1 / 5, "⅛": 1 / 8}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_DECADES = {f"{word[:-1]}ies": 10.0 * i for i, word in enumerate(_TENS.split(), 2)}
_TIMES = {"once": 1.0, "twice": 2.0, "thrice": 3.0}
_PERIODS = {"hourly": 3600.0, "daily": 86400.0, "weekly": 7 * 86400.0}
_PERIODS |= {"monthly": 30.4375 * 86400.0, "yearly": 365.25 * 86400.0, "annually": 365.25 * 86400.0}
_LATIN = {"qd": 1.0, "od": 1.0, "bid": 2.0, "b.i.d.": 2.0, "tid": 3.0, "t.i.d.": 3.0, "qid": 4.0, "q.i.d.": 4.0}
_ROMAN = {"I": 1.0, "II": 2.0, "III": 3.0, "IV": 4.0, "V": 5.0, "VI": 6.0, "VII": 7.0, "VIII": 8.0}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def _any(names: Mapping[str, object] | list[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


_INNER = r"(?<![\w.])(?<![A-Za-z][-/])(?<![A-Za-z]\d[-/])"  # not inside a name: B12, COVID-19, omega-3
_POWER = r"(?:\^-?\d{1,2}(?!\d)|⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,2}(?![⁰¹²³⁴⁵⁶⁷⁸⁹]))"
_ONE_WORD = rf"(?:{_any(_WORDS)})"
_NUMBER = (
    rf"(?:{_INNER}(?:(?<![\w%)\]])[-−](?=[.\d]))?"
    rf"(?:\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    rf"(?:\s?[x×]\s?10{_POWER}|{_POWER})?"
    rf"(?:\s?[{''.join(_GLYPHS)}]|\s[1-9]/[1-9](?![\d/]))?"
    rf"|[{''.join(_GLYPHS)}]"
    rf"|(?<![\w-]){_ONE_WORD}(?:(?:[- ]|\shundred\s(?:and\s)?){_ONE_WORD})*(?![\w'’])"
    rf"|(?<![\w-])a(?=\s(?:hundred|thousand|million|billion|dozen)\b))"
    rf"(?:[\s-](?:{_any(_SCALES)}|dozen)\b)*"
)
_UNIT = rf"(?:{_any(dict.fromkeys([*UNITS, *_LOWER]))})(?![\w³²])"
_number = re.compile(_NUMBER, re.IGNORECASE)
_unit = re.compile(rf"(?:\s?-\s?|\s*)(?:({_UNIT}))", re.IGNORECASE)
_degrees = re.compile(r"\s*(?:°\s*|degrees?\s*)([CF]|celsius|fahrenheit|centigrade)?\b|\s?([CF])\b(?!-)", re.IGNORECASE)
_points = re.compile(r"(?:\s*%|[\s-]*percentage)[\s-]points?\b", re.IGNORECASE)
_aged = re.compile(r"(?<![\w-])(?:age\s+of|ages\s+of|aged|ages|age)\s+(?:between\s+|from\s+)?$", re.IGNORECASE)
_per = re.compile(rf"\s*(?:/|\bper\s+|\b(?:an?|each|every)\s+)\s*({_UNIT})", re.IGNORECASE)
_daily = re.compile(rf"\s*(?:/|\b)({_any(_PERIODS)})\b", re.IGNORECASE)
_times = re.compile(r"\s*(?:times|time|x)(?!\w)(?:\s+(?:per|an?|each|every)\s+|\s*/\s*)?(?=\s?\w)", re.IGNORECASE)
_to = re.compile(r"\s*(?:-|–|—|−|\bto\b|\bthrough\b)\s*", re.IGNORECASE)
_over = re.compile(r"/(\d+(?:\.\d+)?)(?![\w/]|\.\d)")
_in = re.compile(rf"\s+(?:in|out\s+of)\s+(?:every\s+)?({_NUMBER})(?!\s*(?:{_UNIT}))", re.IGNORECASE)
_decade = re.compile(r"['’]?s\b")
_ordinal_end = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)
_BEFORE = (
    (
        ">=",
        r"at\s+least|(?:no|not)\s+(?:less|fewer|younger|lower|earlier)\s+than|a\s+minimum\s+of|minimum|≥|>=",
    ),
    (
        "<=",
        r"at\s+most|(?:no|not)\s+(?:more|greater|older|higher|longer|later|over)\s+(?:than)?|not\s+exceed(?:ing)?|"
        r"(?:a|the)\s+maximum\s+of|maximum|up\s+to|≤|<=",
    ),
    ("<", r"(?:less|fewer|younger|lower|smaller|shorter|lighter|earlier|sooner)\s+than|under|below|<"),
    (
        ">",
        r"(?:more|greater|older|higher|larger|longer|bigger|later|heavier|taller)\s+than|over|above|exceeding|exceeds?|>",
    ),
    ("within", r"within"),
    ("~", r"about|approximately|approx\.?|around|roughly|nearly|almost|some|circa|~|≈"),
)
_before = [(sign, re.compile(rf"(?<![\w<>-])(?:{words})\s*$", re.IGNORECASE)) for sign, words in _BEFORE]
_AFTER = (
    (
        ">=",
        r"\+|(?:or|and)\s+(?:more|greater|older|higher|over|above|up|longer|later|upwards?)|minimum|at\s+(?:the\s+)?least",
    ),
    ("<=", r"(?:or|and)\s+(?:less|fewer|younger|lower|under|below|shorter|earlier)|at\s+(?:the\s+)?most"),
)
_after = [
    (sign, re.compile(rf"\s*,?\s*(?:of\s+age\s*|old\s*)?(?:{words})(?![\w+])", re.IGNORECASE)) for sign, words in _AFTER
]
_between = re.compile(r"(?<!\w)(?:between|from)\s+(?:the\s+ages\s+of\s+)?$", re.IGNORECASE)
_and = re.compile(r"\s*(?:\band\b|\bto\b|-|–|—|−)\s*", re.IGNORECASE)
_period = re.compile(r"(?<![\w-])(an?|per)\s+(hour|day|week|month|year|minute|kg|kilogram)(?![\w-])", re.IGNORECASE)
_lasting = re.compile(
    r"(?:\b(?:for|in|within|after|about|around|over|under|than|least|most|to|of|takes?|lasts?|is|was|be))\s+$", re.I
)
_rate = re.compile(
    rf"(?<![\w-])(?:(once|twice|thrice)(?:\s+(?:per|an?|each|every)\s+({_UNIT})|[\s-]+({_any(_PERIODS)})\b)?"
    rf"|({_any(_LATIN)})(?![\w.])|({_any(_PERIODS)})\b|q\.?\s?(\d+)\s?h(?:rs?|ours?)?\b"
    rf"|(?:every|each)\s+(hour|day|week|month|year)\b(?!\s+(?:one|of)\b))",
    re.IGNORECASE,
)
_fraction = re.compile(
    rf"(?<![\w-])(?:(?:(an?|one|two|three|four|five)[\s-]+)?({_any(_FRACTIONS)})s?)(?![\w'’])(?:\s+of)?(\s+an?\b)?",
    re.IGNORECASE,
)
_ordinal_word = re.compile(rf"(?<![\w-])({_any(_ORDINALS)})(?![\w'’])(?!-hand)", re.IGNORECASE)
_decade_word = re.compile(rf"(?<![\w-])({_any(_DECADES)})(?!\w)", re.IGNORECASE)
_roman = re.compile(
    rf"\b((?i:type|stage|grade|class|phase|factor|group|category)s?\s+)({_any(_ROMAN)})([abAB])?(?![\w.'’])"
)


def find_quantities(text: str) -> tuple[FoundQuantity, ...]:
    """Quantities of a text in order, without overlap."""
    return _find(text)


def quantities(text: str) -> list[Quantity]:
    """Quantities of a text in order."""
    return [found.quantity for found in _find(text)]


def same_quantities(one: str, other: str) -> bool:
    """Whether two texts say the same quantities, each as often, in any order and any wording."""
    return Counter(quantities(one)) == Counter(quantities(other))


@functools.lru_cache(maxsize=8192)
def _find(text: str) -> tuple[FoundQuantity, ...]:
    found: list[FoundQuantity] = []
    at = 0
    ahead = [pattern.search(text) for pattern, _ in _READERS]  # the next place of each reader, sought again once passed
    while True:
        for i, match in enumerate(ahead):
            if match is not None and match.start() < at:
                ahead[i] = _READERS[i][0].search(text, at)
        places = [(match.start(), i) for i, match in enumerate(ahead) if match is not None]
        if not places:
            return tuple(found)
        i = min(places)[1]
        match = ahead[i]
        assert match is not None
        results = _READERS[i][1](text, match, at)
        found += results
        at = results[-1].end if results else max(match.end(), at + 1)


def _value(text: str) -> float:
    """The value of what _NUMBER matches."""
    text = text.strip().lower().replace("−", "-")
    scale = 1.0
    while (cut := re.search(rf"[\s-]({_any(_SCALES)}|dozen)$", text)) or text in _SCALES:
        name = cut.group(1) if cut else text
        scale *= _SCALES.get(name, 12.0)
        text = text[: cut.start()] if cut else "1"
    if text in ("a", ""):
        return scale
    extra = 0.0
    if text[-1] in _GLYPHS:
        extra, text = _GLYPHS[text[-1]], text[:-1].strip()
        if not text:
            return extra * scale
    elif mixed := re.search(r"\s([1-9])/([1-9])$", text):
        extra, text = int(mixed[1]) / int(mixed[2]), text[: mixed.start()]
    if text[0].isalpha():
        hundreds, _, rest = text.rpartition("hundred")
        value = 100.0 * _sum(hundreds) + _sum(rest) if hundreds else _sum(rest)
        return (value + extra) * scale
    mantissa, _, power = text.partition("×") if "×" in text else text.partition("x")
    if power:
        exponent = power.strip()[2:].lstrip("^").translate(_SUPERSCRIPTS)
        return _plain(mantissa) * _power(10.0, exponent)
    if "^" in text:
        base, _, exponent = text.partition("^")
        return _power(_plain(base), exponent)
    if raised := re.search(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+$", text):
        return _power(_plain(text[: raised.start()]), raised.group().translate(_SUPERSCRIPTS))
    return (_plain(text) + extra) * scale


def _power(base: float, exponent: str) -> float:
    try:
        return math.copysign(abs(base) ** int(exponent), base)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def _sum(text: str) -> float:
    return sum(_WORDS[part] for part in re.split(r"[\s-]+", text) if part and part != "and")


def _plain(text: str) -> float:
    text = text.strip()
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return float(text.replace(",", ""))
    return float(text.replace(",", "."))


def _named(name: str) -> tuple[str, float]:
    return UNITS.get(name) or _LOWER.get(name.lower()) or UNITS.get(name.lower()) or UNITS[name.upper()]


def _read_unit(text: str, at: int) -> tuple[str, float, float, int] | None:
    """(unit, factor, offset, end) of the unit that stands at a place; None without one."""
    if match := _degrees.match(text, at):
        name = (match.group(1) or match.group(2) or "").lower()
        if name.startswith("f"):
            return "°C", 5 / 9, -32 * 5 / 9, match.end()
        if name:
            return "°C", 1.0, 0.0, match.end()
        if "°" in match.group() or "degree" in match.group().lower():
            return "degree", 1.0, 0.0, match.end()
    if match := _points.match(text, at):
        return "point", 1e-2, 0.0, match.end()
    match = _unit.match(text, at)
    if match is None:
        return None
    name = match.group(1)
    if len(name) == 1 and name.isalpha() and name not in UNITS:
        return None
    unit, factor = _named(name)
    if name.lower() in ("mm", "cm") and (
        column := re.match(r"\s*(?:of\s+)?(Hg|mercury|H2O)\b", text[match.end() :], re.I)
    ):
        column_of = 98.0665 if column[1].lower() == "h2o" else 1333.22 if name.lower() == "cm" else 133.322
        return "Pa", column_of, 0.0, match.end() + column.end()
    return unit, factor, 0.0, match.end()


def _read_rate(text: str, unit: str, factor: float, end: int) -> tuple[str, float, int]:
    """A unit with what it is per."""
    parts = []
    while True:
        if match := _daily.match(text, end):
            parts.append("s")
            factor /= _PERIODS[match.group(1).lower()]
        elif match := _per.match(text, end):
            base, of = _named(match.group(1))
            parts.append(base)
            factor /= of
        else:
            break
        end = match.end()
    return "/".join([unit or "1", *sorted(parts)]) if parts else unit, factor, end


def _ages(text: str, end: int) -> int:
    """Past "-old", "old" and "of age" after a time."""
    match = re.compile(r"[\s-]old\b|\s+of\s+age\b", re.IGNORECASE).match(text, end)
    return match.end() if match else end


def _aged_years(text: str, start: int, floor: int, unit: str) -> tuple[int, str, float]:
    """(start, unit, factor): "aged 65" and "the age of 65" are 65 years, and "aged" is part of them."""
    if re.match(r"(?:between|from)\s+the\s+ages", text[start:], re.IGNORECASE):
        return start, "s", 1.0 if unit == "s" else _named("year")[1]
    match = _aged.search(text[floor:start])
    if match is None or unit not in ("", "s"):
        return start, unit, 1.0
    begin = floor + match.start()
    if match.group().lower().startswith("age") and (article := re.search(r"\bthe\s+$", text[floor:begin], re.I)):
        begin = floor + article.start()
    return begin, "s", 1.0 if unit == "s" else _named("year")[1]


def _round(value: float) -> float:
    return float(f"{value:.9g}")


def _compared(text: str, start: int, end: int, floor: int) -> tuple[str, int, int]:
    """(comparator, start, end) with the words around that compare."""
    comparator = ""
    before = text[floor:start]
    for sign, pattern in _before:
        if match := pattern.search(before):
            comparator, start = sign, floor + match.start()
            break
    for sign, pattern in _after:
        if not comparator and (match := pattern.match(text, end)):
            return sign, start, match.end()
    return comparator, start, end


def _make(text: str, start: int, end: int, floor: int, low: float, high: float, unit: str) -> FoundQuantity:
    comparator, start, end = _compared(text, start, end, floor)
    said = text[start:end].lower()
    if unit == "s" and comparator == ">" and said.startswith("over") and "old" not in said and "age" not in said:
        comparator = "over"  # "improved over 2 weeks" is no "more than"
    quantity = Quantity(low=_round(low), high=_round(high), unit=unit, comparator=comparator)
    return FoundQuantity(quantity=quantity, start=start, end=end)


def _read_number(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    start, end = match.span()
    if re.match(r"no\s$", text[max(floor, start - 3) : start], re.I) and match.group().lower() == "one":
        return []
    low = high = _value(match.group())
    digits = match.group()[-1].isdigit()
    if digits and (decade := _decade.match(text, end)):
        return [_make(text, start, decade.end(), floor, low, low, "decade")]
    if digits and (ending := _ordinal_end.match(text, end)):
        return [_make(text, start, ending.end(), floor, low, low, "ordinal")]
    if digits and (over := _over.match(text, end)):
        return _read_over(text, start, over, floor, low)
    if (of := _in.match(text, end)) and _value(of.group(1)):
        return [_make(text, start, of.end(), floor, low / _value(of.group(1)), low / _value(of.group(1)), "fraction")]
    first = _read_unit(text, end)
    joint = _and if _between.search(text[floor:start]) else _to
    after = first[3] if first else end
    if (link := joint.match(text, after)) and (other := _number.match(text, link.end())):
        high, end = _value(other.group()), other.end()
        second = _read_unit(text, end)
        if between := _between.search(text[floor:start]):
            start = floor + between.start()
        if first and second and first[0] != second[0]:  # 5 mg to 3 days: two quantities
            high, end, second = low, after, first
        unit, factor, offset, end = second or ((*first[:3], end) if first else ("", 1.0, 0.0, end))
        by = first[1] if first else factor
        low, high = low * by + (first[2] if first else offset), high * factor + offset
    else:
        unit, factor, offset, end = first or ("", 1.0, 0.0, end)
        low = high = low * factor + offset
    if unit == "s":
        end = _ages(text, end)
    start, unit, scaled = _aged_years(text, start, floor, unit)
    if not unit and (times := _times.match(text, end)):
        end, unit, scaled = _read_times(text, times, end)
    else:
        unit, scaled, end = _read_rate(text, unit, scaled, end)
    return [_make(text, start, end, floor, low * scaled, high * scaled, unit)]


def _read_times(text: str, times: re.Match[str], end: int) -> tuple[int, str, float]:
    """(end, unit, factor) of "times a day", "x/week", "times daily"; a bare "times" is a count."""
    plain = end + len(times.group().rstrip()) if times.group().strip().lower() in ("times", "time", "x") else end
    if daily := _daily.match(text, plain):
        return daily.end(), "1/s", 1 / _PERIODS[daily.group(1).lower()]
    if per := _per.match(text, plain):
        base, of = _named(per.group(1))
        return per.end(), f"1/{base}", 1 / of
    word = re.match(r"\s*(?:times|time|x)", text[end:], re.IGNORECASE)
    assert word is not None
    rest = _per.match(text, end + word.end())
    if rest:
        base, of = _named(rest.group(1))
        return rest.end(), f"1/{base}", 1 / of
    return end + word.end(), "times", 1.0


def _read_over(text: str, start: int, over: re.Match[str], floor: int, low: float) -> list[FoundQuantity]:
    """ "120/80", with or without mmHg, is two quantities that know their place; "3/4" is a fraction."""
    high, end = float(over.group(1)), over.end()
    unit = _read_unit(text, end)
    if low < high <= 12 and not (unit and unit[0] == "Pa"):
        return [_make(text, start, end, floor, low / high, low / high, "fraction")]
    name, factor, end = (unit[0], unit[1], unit[3]) if unit else ("", 1.0, end)
    if not unit and low >= 40:
        name, factor = "Pa", 133.322
    upper = _make(text, start, over.start(), floor, low * factor, low * factor, f"{name} over")
    lower = Quantity(low=_round(high * factor), high=_round(high * factor), unit=f"{name} under")
    return [upper, FoundQuantity(quantity=lower, start=over.start(), end=end)]


def _read_fraction(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    count, name = (match.group(1) or "").lower(), match.group(2).lower()
    if name != "half" and not count:
        return _read_ordinal(text, match, floor) if name in _ORDINALS else []
    if name not in ("half", "quarter") and count in ("a", "an") and not match.group().lower().endswith(" of"):
        return _read_ordinal(text, match, floor)
    value = _FRACTIONS[name] * (1.0 if count in ("", "a", "an") else _WORDS[count])
    if match.group(3) and (unit := _read_unit(text, match.end())):
        return [_make(text, match.start(), unit[3], floor, value * unit[1], value * unit[1], unit[0])]
    end = match.end(3) if match.group(3) else match.end()
    return [_make(text, match.start(), end, floor, value, value, "fraction")]


def _read_ordinal(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    word = re.search(_any(_ORDINALS), match.group(), re.IGNORECASE)
    assert word is not None
    start, end = match.start() + word.start(), match.start() + word.end()
    value = _ORDINALS.index(word.group().lower()) + 1.0
    return [FoundQuantity(quantity=Quantity(low=value, high=value, unit="ordinal"), start=start, end=end)]


def _read_decade(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    value = _DECADES[match.group(1).lower()]
    return [_make(text, match.start(), match.end(), floor, value, value, "decade")]


def _read_roman(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    value = _ROMAN[match.group(2)]
    quantity = Quantity(low=value, high=value, unit="")
    return [FoundQuantity(quantity=quantity, start=match.start(2), end=match.end(2))]


def _read_period(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    """ "for a week" is one week; "drinks a week" and "drinks per week" are a rate."""
    unit, factor = _named(match.group(2))
    if match.group(1).lower() != "per" and _lasting.search(text[: match.start()]):
        return [_make(text, match.start(), match.end(), floor, factor, factor, unit)]
    quantity = Quantity(low=_round(1 / factor), high=_round(1 / factor), unit=f"1/{unit}")
    return [FoundQuantity(quantity=quantity, start=match.start(), end=match.end())]


def _read_often(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    times, per, adverb, latin, alone, hours, every = match.groups()
    if times:
        value = _TIMES[times.lower()]
        if per:
            base, of = _named(per)
            return [_make(text, match.start(), match.end(), floor, value / of, value / of, f"1/{base}")]
        if not adverb:
            return [_make(text, match.start(), match.end(), floor, value, value, "times")]
        value /= _PERIODS[adverb.lower()]
    elif latin:
        value = _LATIN[latin.lower()] / 86400.0
    elif alone:
        value = 1 / _PERIODS[alone.lower()]
    elif hours:
        value = int(hours) * 3600.0
        return [_make(text, match.start(), match.end(), floor, value, value, "every s")]
    else:
        value = 1 / _named(every)[1]
    return [_make(text, match.start(), match.end(), floor, value, value, "1/s")]


def _read_every(text: str, match: re.Match[str], floor: int) -> list[FoundQuantity]:
    number = _number.match(text, match.end())
    if number is None:
        return []
    (inner,) = _read_number(text, number, match.end())[:1] or (None,)
    if inner is None or inner.quantity.unit != "s":
        return []
    quantity = dataclasses.replace(inner.quantity, unit="every s")
    return [FoundQuantity(quantity=quantity, start=match.start(), end=inner.end)]


_READERS = (
    (
        re.compile(r"(?<![\w-])every\s+(?=\d|(?:two|three|four|five|six|eight|ten|twelve)\b)", re.IGNORECASE),
        _read_every,
    ),
    (_rate, _read_often),
    (_fraction, _read_fraction),
    (_number, _read_number),
    (_period, _read_period),
    (_ordinal_word, _read_ordinal),
    (_decade_word, _read_decade),
    (_roman, _read_roman),
)
