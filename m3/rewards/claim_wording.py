"""Harmless differences of wording between medical claims: what the guard of the claim cache takes for the same.

Everything here widens what counts as the same claim, so every line must be safe in any medical sentence: words that
change a dose, a strength, a side, a time, a chance or who is meant are not here ("rare" is not "uncommon", "severe"
is not "serious"). A line of ``SYNONYMS`` is one meaning, alternatives split by "|", each of one or more words in any
inflection; after "=" in this form alone ("=including" is "such as", "includes" is not).
"""

from __future__ import annotations

import functools
import re

# Openings that add nothing to what is claimed. Hedges ("it is believed that") and attributions are not here.
_FRAMES = re.compile(
    r"^(?:(?:please\s+note\s+that|please\s+note|note\s+that|remember\s+that|keep\s+in\s+mind\s+that|be\s+aware\s+that|"
    r"(?:please\s+)?be\s+advised\s+that|as\s+you\s+(?:may|might)\s+know|as\s+(?:noted|mentioned)|in\s+fact|"
    r"(?:it|this)\s+(?:is|'s)\s+(?:(?:also|very)\s+)?(?:important|worth|essential|helpful|useful|well|good)\s+"
    r"(?:to\s+(?:note|know|remember|understand|mention|emphasi[sz]e|be\s+aware|keep\s+in\s+mind)|noting|mentioning|"
    r"remembering|known|established|understood)\s+that|it\s+(?:is|'s)\s+(?:also\s+)?(?:true|known|the\s+case|a\s+fact|"
    r"clear)\s+that|it\s+(?:should|must|can|may)\s+be\s+(?:noted|said|mentioned|stated|remembered)\s+that|"
    r"the\s+fact\s+is\s+that|we\s+know\s+that|in\s+(?:summary|conclusion|other\s+words)|to\s+summari[sz]e|to\s+sum\s+up|"
    r"additionally|furthermore|moreover|also|(?:medically|clinically)\s+speaking|of\s+note)\s*[,:]?"
    r"|(?:yes|no|note|indeed|overall|basically|essentially|simply\s+put|importantly|notably|however|therefore|thus|so|and|but|"
    r"well|in\s+addition|in\s+short|in\s+brief|from\s+a\s+medical\s+(?:standpoint|perspective|point\s+of\s+view))\s*[,:])\s+",
    re.IGNORECASE,
)
CONTRACTIONS = (
    (re.compile(r"\b(?:can['’]t|cannot)\b", re.IGNORECASE), "can not"),
    (re.compile(r"\bwon['’]t\b", re.IGNORECASE), "will not"),
    (re.compile(r"\bshan['’]t\b", re.IGNORECASE), "shall not"),
    (re.compile(r"(?<=[a-z])n['’]t\b", re.IGNORECASE), " not"),
    (re.compile(r"(?<=[a-z])['’]re\b", re.IGNORECASE), " are"),
    (re.compile(r"(?<=[a-z])['’]ve\b", re.IGNORECASE), " have"),
    (re.compile(r"(?<=[a-z])['’]ll\b", re.IGNORECASE), " will"),
    (re.compile(r"\b(it|that|there|what|he|she|who)['’]s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"(?<=[a-z])['’]s\b|(?<=s)['’](?=\s)", re.IGNORECASE), ""),
)
# Words without a say: determiners and fillers. "few", "no", "some", "all" and the like have one.
DROPPED = frozenset("a an the this these those such your their its do does also really actually please".split())
SYNONYMS = """
person|people|persons|individuals|somebody|someone
child|children|kid|youngster
infant|baby|babies
adolescent|teenager|teen
elderly|older adult|older person|older people|senior|senior citizen
woman|women|female
man|men|male
doctor|physician
healthcare provider|health care provider|healthcare professional|health care professional|health professional
healthcare provider|medical professional|health provider|medical provider
drug|medicine|medication|medicinal product|pharmaceutical
disease|illness|sickness
therapy|treatment
surgery|operation|surgical procedure|surgical operation
examination|exam
laboratory|lab
influenza|flu
fever|pyrexia
itch|itchiness|pruritus
dyspnea|shortness of breath|breathlessness|short of breath
fatigue|tiredness
vomit|throw up
hemorrhage|=bleeding
edema|=swelling
abdomen|belly|tummy
abdominal pain|belly pain|tummy ache|pain in the abdomen
heart attack|myocardial infarction
hypertension|high blood pressure|elevated blood pressure
hypotension|low blood pressure
blood glucose|blood sugar
urinary tract infection|UTI
sexually transmitted infection|STI
sexually transmitted disease|STD
chronic obstructive pulmonary disease|COPD
nonsteroidal antiinflammatory drug|NSAID|nonsteroidal anti inflammatory drug|non steroidal anti inflammatory drug
selective serotonin reuptake inhibitor|SSRI
gastroesophageal reflux disease|GERD|acid reflux disease
magnetic resonance imaging|MRI
computed tomography|CT
electrocardiogram|ECG|EKG
body mass index|BMI
Food and Drug Administration|FDA
Centers for Disease Control and Prevention|CDC
kidney|renal
liver|hepatic
heart|cardiac
lung|pulmonary
stool|feces|faeces
side effect|adverse effect|unwanted effect
chance|likelihood|probability
amount|quantity
dose|dosage
give|administer
problem|issue
type|kind|sort
over the counter|OTC|nonprescription|without prescription|without a prescription
oral|by mouth|orally|per os
intravenous|intravenously|into a vein
subcutaneous|subcutaneously|under the skin
contraception|birth control
acetaminophen|paracetamol
epinephrine|adrenaline
norepinephrine|noradrenaline
albuterol|salbutamol
furosemide|frusemide
lidocaine|lignocaine
acetylsalicylic acid|aspirin|ASA
amphetamine|amfetamine
meperidine|pethidine
glyburide|glibenclamide
rifampin|rifampicin
cyclosporine|ciclosporin
start|begin|commence
stop|discontinue|cease
show|demonstrate
use|utilize|utilise
require|need
cause|lead to|result in|bring about|give rise to|bring on
decrease|reduce|lessen|diminish|=lowers|=lowered|=lowering|cut down
increase|=raises|=raised|=raising|elevate
avoid|refrain from|stay away from|steer clear of|keep away from
recommend|advise
talk to|speak to|speak with|talk with|consult|consult with
occur|happen|take place
ensure|make sure
affect|influence
worsen|aggravate|exacerbate|make worse
relieve|alleviate|ease
improve|make better
buy|purchase
choose|select
assess|evaluate
perform|carry out|conduct
allow|permit|enable
try|attempt
help|assist|aid
remain|stay
have|suffer from
disappear|go away|vanish
return|come back|recur
manage|handle
associate with|link to|link with|connect to|connect with|relate to
because of|due to|owing to|as a result of|on account of
because|due to the fact that
and|as well as
such as|=including|for example|for instance|e g
to|in order to|so as to
if|in the event that|in the event of
while|whilst
among|amongst
toward|towards
until|till
before|prior to
after|subsequent to
despite|in spite of
instead of|rather than|in place of
provided that|as long as
without|with no
regarding|concerning|with regard to|in regard to|with respect to
may|might|could|can
should|ought to
often|frequently|commonly|oftentimes
usually|typically|generally|normally|in general|as a rule|most of the time|ordinarily
sometimes|occasionally|at times|from time to time
rarely|seldom
mainly|mostly|primarily|chiefly|largely|predominantly
completely|entirely|fully|totally
especially|particularly|in particular
immediately|right away|at once|straight away
quickly|rapidly|fast|swiftly
simultaneously|at the same time|concurrently
essential|crucial|vital
quick|rapid|speedy
dangerous|hazardous
helpful|beneficial
whole|entire
large|big
enough|sufficient|adequate
main|principal|chief
additional|extra|further
many|numerous|a lot of|lots of|a large number of
several|a number of
a few
appropriate|suitable|proper
possible|potential
likely|probable
fatal|deadly|lethal
effective|efficacious
not able|unable
slightly|a little|a bit
have no|not have any
be no|be not any
think|believe|consider
way|method|approach
known as|also known as|=called|also called|referred to as|=termed
different from|different than
due date|expected delivery date
breastfeed|breast feed|nurse a baby
"""
# British and other spellings fold into American ones by letters; collisions of two real words are not known.
_SPELLINGS = (
    (re.compile(r"ae(?=.)"), "e"),
    (re.compile(r"oe(?=[a-z]{2})"), "e"),
    (re.compile(r"(?<=[a-z]{2})our(?=$|s$|ed$|ing$|al$|able$|ful$|less$|ite$|ite[sd]$|y$)"), "or"),
    (re.compile(r"(?<=[a-z]{3})is(?=(?:e[sdr]?|ing|ation|ations)$)"), "iz"),
    (re.compile(r"(?<=[a-z]{2})ys(?=(?:e[sdr]?|ing)$)"), "yz"),
    (re.compile(r"(?<=[a-z]{2}[tb])re(?=s?$)"), "er"),
    (re.compile(r"sulph"), "sulf"),
    (re.compile(r"(?<=[a-z]{3}l)l(?=(?:ed|ing|er|ers)$)"), ""),
    (re.compile(r"(?<=[a-z]{3})ogue(?=s?$)"), "og"),
    (re.compile(r"(?<=[a-z]{2})ence(?=s?$)"), "ense"),
)
_SPELLED = {
    "programme": "program",
    "programmes": "programs",
    "practise": "practice",
    "licence": "license",
    "grey": "gray",
    "ageing": "aging",
    "tyre": "tire",
    "aluminium": "aluminum",
    "cheque": "check",
    "diarrhoea": "diarrhea",
    "orthopaedic": "orthopedic",
    "foetus": "fetus",
    "judgement": "judgment",
    "enrolment": "enrollment",
    "fulfil": "fulfill",
    "sceptical": "skeptical",
    "mould": "mold",
    "gynaecologist": "gynecologist",
    "titre": "titer",
    "ok": "okay",
}
_IRREGULAR = {
    form: base
    for base, forms in {
        "be": "is are am been being",
        "was": "were",
        "have": "has having",
        "woman": "women",
        "man": "men",
        "child": "children",
        "person": "people persons",
        "foot": "feet",
        "tooth": "teeth",
        "take": "takes taking taken took",
        "give": "gives giving given gave",
        "get": "gets getting gotten got",
        "begin": "begins beginning began begun",
        "become": "becomes becoming became",
        "lead": "leads leading led",
        "make": "makes making made",
        "feel": "feels feeling felt",
        "eat": "eats eating ate eaten",
        "drink": "drinks drinking drank",
        "bring": "brings bringing brought",
        "come": "comes coming came",
        "go": "goes going gone went",
        "show": "shows showing showed shown",
        "speak": "speaks speaking spoke spoken",
        "think": "thinks thinking thought",
        "grow": "grows growing grew grown",
        "know": "knows knowing knew known",
        "bacterium": "bacteria",
        "diagnosis": "diagnoses",
        "metastasis": "metastases",
        "prognosis": "prognoses",
        "crisis": "crises",
        "analysis": "analyses",
        "vertebra": "vertebrae vertebre",
        "criterion": "criteria",
        "phenomenon": "phenomena",
        "virus": "viruses",
        "fetus": "fetuses",
        "life": "lives",
        "knife": "knives",
    }.items()
    for form in forms.split()
}
_VOWEL = re.compile(r"[aeiouy]")
_SHORT = re.compile(r"[^aeiou][aeiouy][^aeiouwxy]$")
_MEASURE = re.compile(r"[aeiouy]+[^aeiouy]+")


def strip_frames(text: str) -> str:
    """A claim without openings that add nothing."""
    while match := _FRAMES.match(text):
        text = text[match.end() :]
    return text


@functools.lru_cache(maxsize=65536)
def base(word: str) -> str:
    """A lower-case word without its inflection (plural, -ed, -ing) and in American spelling; derivations stay apart.

    Steps 1a, 1b and 5a of Porter's stemmer (Porter, 1980, "An algorithm for suffix stripping").
    """
    word = _SPELLED.get(word, word)
    if len(word) >= 5:
        for pattern, replacement in _SPELLINGS:
            word = pattern.sub(replacement, word)
    word = _IRREGULAR.get(word, word)
    if len(word) < 4 or not word.isalpha():
        return word
    return _final_e(_past(_plural(word)))


@functools.lru_cache(maxsize=65536)
def ending(word: str) -> str:
    """ "+ed" or "+ing" where ``base`` takes that off a lower-case word; "" for the others, "-s" among them.

    Tense and role stand in it: "smoked" is not "smokes", an infected patient no infecting one, a fasting test no fast
    one. Past tense and participle are not told apart.
    """
    if word in _IRREGULAR:
        root = _IRREGULAR[word]
        if root not in _IRREGULAR_VERBS or word.endswith("s"):
            return ""
        return "+ing" if word.endswith("ing") else "+ed"
    if len(word) < 4 or not word.isalpha() or _past(word) == word:
        return ""
    return "+ing" if word.endswith("ing") else "+ed"


_IRREGULAR_VERBS = frozenset(
    "take give get begin become lead make feel eat drink bring come go show speak think grow know".split()
)


def _plural(word: str) -> str:
    if word == "testes":
        return word
    if word.endswith(("sses", "xes", "ches", "shes", "zzes", "uses")) and not word.endswith(("auses", "ouses")):
        return word[:-2]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word
    if word.endswith("ied") and len(word) > 4:
        return word[:-3] + "y"
    for ending in ("ed", "ing"):
        stem = word.removesuffix(ending)
        if stem == word or not _VOWEL.search(stem):
            continue
        if stem.endswith(("at", "bl", "iz", "yz")):
            return stem + "e"
        if len(stem) > 2 and stem[-1] == stem[-2] and stem[-1] not in "lsz":
            return stem[:-1]
        if len(_MEASURE.findall(stem)) == 1 and _SHORT.search(stem):
            return stem + "e"
        return stem
    return word


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    stem = word[:-1]
    measure = len(_MEASURE.findall(stem))
    return stem if measure > 1 or (measure == 1 and not _SHORT.search(stem)) else word
