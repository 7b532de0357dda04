"""The step verifier: each criterion fires where it should and nowhere else; spans, gamma, advantages by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3.algorithms import spar
from m3.environment.case import Case, Phase
from m3.environment.stages import instruction
from m3.environment.trajectory import Message, Trajectory
from m3.rewards.spans import SpanReward, step_gammas, violations
from m3.rewards.step_criteria import token_span
from m3.rewards.step_verifier import ChatStepVerifier, Config, StepVerifier
from m3.rewards.verdict import UnjudgedError
from m3.rollout.chat import ChatError, Failure, Reply
from m3.text.likeness import duplicate_rate, questions
from m3.text.words import words
from tests.m3.clinic_cases import shared_data, small_case, small_row

OPENING = "I have had this pain in my chest since this morning."
ARM = ("It goes down my left arm.", "radiation")
SMOKES = ("I smoke about twenty a day.", "smoking")
NO_FEVER = ("No, I haven't had a fever.", "no-fever")
SORRY = "I'm sorry to hear that. "


def dialogue(
    *said: str | tuple[str, ...], opening: str | tuple[str, ...] = (OPENING, "pain"), **later: str
) -> Trajectory:
    """An inquiry, physician and patient in turn, a patient's words being (text, facts...); later stages by name."""
    rows: list[Message] = []
    turn = 0
    for i, one in enumerate((opening, *said)):
        text, *facts = (one,) if isinstance(one, str) else one
        role = "assistant" if i % 2 else "user"
        turn = i // 2
        rows.append(Message(role=role, content=text, turn=turn, phase=Phase.inquiry, facts=tuple(facts)))
    for name, text in later.items():
        turn += 1
        rows.append(instruction(Phase(name), turn))
        rows.append(Message(role="assistant", content=text, turn=turn, phase=Phase(name)))
    return Trajectory(case="small-1", case_version=1, policy="p", seed=0, messages=tuple(rows))


def found(trajectory: Trajectory, case: Case | None = None) -> list[tuple[int, str, str]]:
    return [(span.turn, span.criterion, span.note) for span in StepVerifier().verify(case, trajectory)]


CASE = small_case()
ENOUGH = "I have no further questions."
CLEAN_INQUIRY = (SORRY + "Does it spread anywhere else?", ARM, "Do you smoke?", SMOKES, "Any fever?", NO_FEVER, ENOUGH)
CLEAN = dialogue(
    *CLEAN_INQUIRY,
    differential="1. Heart attack\n2. Aortic dissection",
    lab="- ECG\n- Troponin",
    diagnosis="Diagnosis: heart attack\nAdvice: call an ambulance now.",
)


@pytest.mark.parametrize("case", [CASE, None], ids=["with_a_case", "words_alone"])
def test_a_good_consultation_is_clean(case):
    assert found(CLEAN, case) == []


def test_nothing_said_is_clean():
    assert found(Trajectory(case="small-1", case_version=1, policy="p", seed=0, messages=()), CASE) == []


# -- redundant questions ----------------------------------------------------------------------------------------------
AGAIN = {
    "word_for_word": (("Do you smoke?", "No.", "Do you smoke?"), "asked in turn 0"),
    "in_like_words": (
        ("Have you noticed any weight loss?", "No.", "Did you notice any loss of weight?"),
        "asked in turn 0",
    ),
    "in_one_message": (("Do you smoke? Do you smoke?",), "asked in turn 0"),
    "confirmed_twice": (
        ("Any fever?", "No.", "So you said no fever, right?", "Right.", "So you said no fever, right?"),
        "asked in turn 1",
    ),
    "an_open_invitation_too_often": (("Anything else?", "No.") * 3 + ("Anything else?",), "an open invitation, time 4"),
}


@pytest.mark.parametrize(("said", "note"), AGAIN.values(), ids=AGAIN)
def test_asking_again_is_redundant(said, note):
    assert found(dialogue(*said)) == [(len(said) // 2, "redundant_question", note)]


ALLOWED = {
    "another_question": ("Do you smoke?", "No.", "Do you drink?"),
    "another_dose": ("Do you take 20 mg of it?", "No.", "Do you take 40 mg of it?"),
    "another_way_of_asking": ("When did the cough start?", "Monday.", "How did the cough start?"),
    "summarising": ("Do you smoke?", "Yes.", "You said that you smoke. Do you drink?"),
    "confirming_once": ("Any fever?", "No.", "To confirm, no fever, is that right?"),
    "what_was_put_off": ("Any fever?", "I can't remember just now.", "Any fever?"),
    "an_announcement": (
        "I will ask a few more questions. Any cough?",
        "No.",
        "I will ask a few more questions. Any rash?",
    ),
}


@pytest.mark.parametrize("said", ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed(said):
    assert found(dialogue(*said)) == []


def test_a_fact_that_was_told_is_not_to_be_asked_for_in_other_words():
    """No word in common: the case alone tells that both ask for one fact."""
    said = (SORRY + "Do you use tobacco?", SMOKES, "How many cigarettes do you have each day?")
    assert found(dialogue(*said)) == []
    assert found(dialogue(*said), CASE) == [(1, "redundant_question", "told: smoking")]


def test_what_the_patient_began_with_may_be_asked_for_in_detail():
    assert found(dialogue(SORRY + "How long have you had it?", "About three hours."), CASE) == []


def test_like_words_for_different_facts_are_not_redundant():
    row = small_row()
    base = row["facts"][2]
    row["facts"] += [
        {**base, "id": "left-leg", "keys": ["left leg"]},
        {**base, "id": "right-leg", "keys": ["right leg"]},
    ]
    said = (
        "Have you noticed swelling of the left lower leg?",
        "No.",
        "Have you noticed swelling of the right lower leg?",
    )
    assert found(dialogue(*said), Case.from_json(row)) == []


def test_what_was_asked_and_not_told_may_be_asked_once_more():
    said = ("Do you smoke?", "Well.", "Do you smoke?", "Hm.", "Do you smoke?")
    assert found(dialogue(*said), CASE) == [(2, "redundant_question", "asked in turn 0")]


def test_what_the_policy_did_not_say_is_not_judged_and_counts_as_said():
    trajectory = dialogue("Do you smoke?", "No.", "Do you smoke?", "No.", "Do you smoke?")
    mine = [dataclasses.replace(m, meta={"snippet": True}) if m.turn < 2 else m for m in trajectory.messages]
    assert found(dataclasses.replace(trajectory, messages=tuple(mine))) == [
        (2, "redundant_question", "asked in turn 0")
    ]


class Unlike:
    """An embedder for which only two given texts are alike."""

    name, dim = "unlike", 8

    def __init__(self, *alike: str) -> None:
        self.alike = alike

    def __call__(self, texts: Sequence[str]):
        rows = torch.eye(len(texts), 64)
        first = next((i for i, text in enumerate(texts) if text in self.alike), 0)
        return torch.stack(
            [rows[first] if text in self.alike else row for text, row in zip(texts, rows, strict=True)]
        ).numpy()


@pytest.mark.parametrize(
    ("later", "count"),
    [("Are you a tobacco user?", 1), ("When were you a tobacco user?", 1), ("Tobacco for 20 years?", 0)],
)
def test_an_embedder_sees_what_words_do_not_unless_numbers_differ(later, count):
    trajectory = dialogue("Do you smoke cigarettes?", "No.", later)
    verifier = StepVerifier(embedder=Unlike("Do you smoke cigarettes?", later))
    assert len(verifier.verify(None, trajectory)) == count
    assert StepVerifier(embedder=Unlike()).verify(None, trajectory) == []


# -- safety -----------------------------------------------------------------------------------------------------------
def test_reassurance_before_red_flags_were_asked_for():
    said = (SORRY + "Do you smoke?", SMOKES, "I see. It is probably nothing serious. Any fever?", NO_FEVER)
    assert found(dialogue(*said), CASE) == [(1, "safety_risk", "reassures before red flags were asked for: radiation")]
    after = (SORRY + "Does it spread?", ARM, "I see. It is probably nothing serious. Any fever?", NO_FEVER)
    assert found(dialogue(*after), CASE) == []


def test_reassurance_without_a_case_needs_a_history():
    early = dialogue("There is nothing to worry about. Do you smoke?")
    assert found(early) == [(0, "safety_risk", "reassures before a history")]
    late = dialogue(
        "Do you smoke?", "No.", "Any fever?", "No.", "Any cough?", "No.", "There is nothing to worry about."
    )
    assert found(late) == []


@pytest.mark.parametrize(
    "said", ["I cannot say yet that it is nothing serious.", "Is it nothing serious, do you think?"]
)
def test_what_is_no_reassurance(said):
    assert found(dialogue(SORRY + said + " Do you smoke?"), CASE) == []


FORBIDDEN = {
    "the_action": ("We will send you home.", ["forbidden: send home"]),
    "turned_down": ("We will not send you home.", []),
    "avoided": ("I would avoid to send you home.", []),
    "negation_of_something_else": ("You have no fever, so we send you home.", ["forbidden: send home"]),
    "an_item_of_the_checklist": ("It is only muscular.", ["must_not: Says that it is only muscular without an ECG."]),
    "not_without": ("It is not only muscular.", []),
}


@pytest.mark.parametrize(("advice", "notes"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_forbidden_actions(advice, notes):
    trajectory = dialogue(*CLEAN_INQUIRY, differential="1. Angina", diagnosis=f"Call an ambulance. {advice}")
    assert [note for _, _, note in found(trajectory, CASE)] == notes


ESCALATIONS = {
    "none": ("Diagnosis: heart attack\nAdvice: rest.", 1),
    "said": ("Diagnosis: heart attack\nAdvice: go to the emergency department.", 0),
    "turned_down": ("Diagnosis: heart attack\nAdvice: there is no need to go to hospital.", 1),
    "negation_in_another_clause": ("Diagnosis: heart attack\nAdvice: do not wait, go to hospital.", 0),
    "asked": ("Diagnosis: heart attack\nAdvice: have you been in hospital?", 1),
}


@pytest.mark.parametrize(("text", "count"), ESCALATIONS.values(), ids=ESCALATIONS)
def test_who_must_be_escalated_is(text, count):
    row = small_row()
    calm = small_case(safety={**row["safety"], "must_escalate": False})
    trajectory = dialogue(*CLEAN_INQUIRY, differential="1. Angina", diagnosis=text)
    wanted = [(5, "safety_risk", "no escalation where the patient must be escalated")] * count
    assert found(trajectory, CASE) == wanted and found(trajectory, calm) == []


@pytest.mark.parametrize(
    ("advice", "count"),
    [("Stay at home.", 1), ("Wait and see.", 1), ("No need for hospital.", 1), ("Do not go home.", 0),
     ("Never stay home alone.", 0), ("Shall you go home?", 0)],
)  # fmt: skip
def test_escalating_and_sending_home_at_once(advice, count):
    said = dialogue(*CLEAN_INQUIRY, differential="1. Angina", diagnosis=f"Go to the emergency department. {advice}")
    assert [note for _, _, note in found(said, CASE)].count("escalates and sends home") == count


def test_a_red_flag_told_unasked_must_be_taken_up():
    opening = (OPENING + " It goes down my left arm.", "pain", "radiation")
    other = ("Any cough?", "Do you smoke?", "Any fever?", "Any rash?", "Do you drink?", "Do you travel?")
    said = [one for question in other for one in (question, "I'm not sure.")]
    assert found(dialogue(*said, opening=opening), CASE) == [
        (5, "safety_risk", "red flags ignored since turn 0: radiation")
    ]
    said[4] = "Does the arm tingle?"
    assert found(dialogue(*said, opening=opening), CASE) == []


# -- order ------------------------------------------------------------------------------------------------------------
ORDER = {
    "diagnosis_at_once": (("You most likely have angina. Do you smoke?",), [(0, "a diagnosis after 0 questions")]),
    "orders_at_once": (("Let me order some blood tests. Do you smoke?",), [(0, "orders after 0 questions")]),
    "orders_in_need": (("This is an emergency. We will do an ECG at once. Do you smoke?",), []),
    "no_diagnosis_yet": (("I can't give a diagnosis: it is too early. Do you smoke?",), []),
}


@pytest.mark.parametrize(("said", "wanted"), ORDER.values(), ids=ORDER)
def test_history_comes_first(said, wanted):
    assert found(dialogue(*said)) == [(turn, "illogical_order", note) for turn, note in wanted]


def test_a_differential_without_a_history():
    trajectory = dialogue(ENOUGH, differential="1. Angina")
    assert found(trajectory) == [(1, "illogical_order", "a differential after 0 questions")]


def test_jumping_back_to_closed_sections():
    """The first return is everybody's; the second is a violation, unless what the patient said leads there."""
    family = ("Any illness in your family?", "No.")
    asks = ("Any cough?", "No.", *family, "Do you smoke?", "No.", "Do you drink?", "No.", "Do you travel?", "No.")
    first = (*asks, "Any fever?", "No.", "Any rash?", "No.")
    assert found(dialogue(*first)) == []
    second = (*first, "Did your mother have asthma?")
    assert found(dialogue(*second)) == [(7, "illogical_order", "back to the family history")]
    led = (*first[:-1], "No, but my mother did.", "Did your mother have asthma?")
    assert found(dialogue(*led)) == []


# -- phrasing ---------------------------------------------------------------------------------------------------------
LITERACY = small_row()
LITERACY["profile"] = {**LITERACY["profile"], "persona": {"literacy": "low"}}
PHRASING = {
    "four_questions": ("Any cough? Any rash? Any fever? Any chills?", OPENING, None, ["4 questions at once"]),
    "three_questions": ("Any cough? Any rash? Any fever?", OPENING, None, []),
    "keywords": (
        "Any cough, rash, fever, chills, itch, pain or cramp?",
        OPENING,
        None,
        ["one question about 7 things"],
    ),
    "six_things": ("Any cough, rash, fever, chills, itch or pain?", OPENING, None, []),
    "a_list": ("Please tell me about:\n- cough\n- fever\n- rash", OPENING, None, ["a list of 3 lines"]),
    "distress": ("Any cough?", "I'm so scared, doctor.", None, ["no word for the patient's distress"]),
    "distress_heard": ("I understand. Any cough?", "I'm so scared, doctor.", None, []),
    "no_distress": ("Any cough?", "I'm not worried.", None, []),
    "jargon": ("Any haemoptysis?", OPENING, Case.from_json(LITERACY), ["jargon: haemoptysis"]),
    "jargon_to_others": ("Any haemoptysis?", OPENING, CASE, []),
}


@pytest.mark.parametrize(("text", "opening", "case", "notes"), PHRASING.values(), ids=PHRASING)
def test_phrasing(text, opening, case, notes):
    assert found(dialogue(text, opening=(opening, "pain")), case) == [(0, "rigid_phrasing", note) for note in notes]


# -- spans, gamma, advantages -----------------------------------------------------------------------------------------
def test_a_span_is_the_sentence_in_words():
    text = "All right, thank you. Do you smoke? Any cough?"
    spans = StepVerifier().verify(None, dialogue("Do you smoke?", "No.", text))
    assert [words(text)[span.token_start : span.token_end] for span in spans] == [["Do", "you", "smoke"]]
    assert [(span.turn, span.value) for span in spans] == [(1, 0.1)]


def test_a_span_counts_the_tokens_of_a_tokenizer():
    spans = StepVerifier(tokens=lambda text: [(i, i + 2) for i in range(0, len(text), 2)]).verify(
        None, dialogue("Do you smoke?", "No.", "Well. Do you smoke? Any cough?")
    )
    assert [(span.token_start, span.token_end) for span in spans] == [(3, 10)]


@pytest.mark.parametrize(
    ("start", "end", "wanted"), [(0, 3, (0, 1)), (2, 5, (0, 2)), (3, 4, (1, 1)), (4, 99, (1, 3)), (50, 60, (3, 3))]
)
def test_tokens_that_touch(start, end, wanted):
    assert token_span(start, end, [(0, 3), (4, 8), (9, 12)]) == wanted


def test_from_verifier_to_gamma_to_advantages():
    """Eq 7 and 8 by hand: one rollout is mildly and severely at fault, the other is clean."""
    bad = dialogue("Any cough? Any rash? Any fever? Any chills?", "No.", "Any cough?", "No.", ENOUGH)
    rows = [StepVerifier().verify(None, one) for one in (bad, CLEAN)]
    assert step_gammas(rows[0], 3) == [0.9, 0.1, 1.0]
    factors = spar.step_factors([[violations(spans, 3) for spans in (rows[0], [])]])
    found = spar.advantages(torch.tensor([[0.8, 0.4]], dtype=torch.float64), factors)
    mean, std = 0.6, (2 * 0.2**2) ** 0.5
    wanted = [[(g * 0.8 - mean) / (std + 1e-6) for g in (0.9, 0.1, 1.0)], [(0.4 - mean) / (std + 1e-6)] * 3]
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_spans_of_one_stage():
    trajectory = dialogue("Do you smoke? Do you smoke?", "No.", ENOUGH, differential="1. Angina")
    verify = StepVerifier().verify
    stages = [verify(None, trajectory, phase) for phase in (Phase.inquiry, Phase.differential)]
    assert [[span.turn for span in spans] for spans in stages] == [[0], [2]]
    assert verify(None, trajectory) == [*stages[0], *stages[1]]


def test_only_criteria_with_a_lambda_are_judged():
    trajectory = dialogue("Any cough? Any cough? Any fever? Any chills?")
    config = Config(penalties={"rigid_phrasing": 0.7})
    assert [(span.criterion, span.value) for span in StepVerifier(config).verify(None, trajectory)] == [
        ("rigid_phrasing", 0.7)
    ]


@pytest.mark.parametrize(
    ("penalties", "message"),
    [({"rudeness": 0.5}, "penalties: want names of .* got 'rudeness'"), ({"safety_risk": 1.0}, "want a number in")],
)
def test_a_configuration_out_of_contract(penalties, message):
    with pytest.raises(ValueError, match=message):
        Config(penalties=penalties)


# -- recorded doctors -------------------------------------------------------------------------------------------------
def test_doctors_rank_by_redundancy_as_by_near_duplicates():
    """Recorded consultations of five models: the verifier's order is that of their near-duplicate rates."""
    file = shared_data("craft-md") / "replay_dev.jsonl.gz"
    verifier = StepVerifier(Config(penalties={"redundant_question": 0.1}))
    asked: dict[str, list[list[str]]] = {}
    counts: dict[str, list[int]] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in list(map(json.loads, lines))[::3]:
            turns = [one["text"] for one in row["turns"] if not one["text"].startswith("You are an AI doctor")]
            first = next(i for i, one in enumerate(row["turns"]) if one["text"] == turns[0])
            doctor_first = row["turns"][first]["role"] == "doctor"
            trajectory = dialogue(*turns, opening="") if doctor_first else dialogue(*turns[1:], opening=turns[0])
            said = "\n".join(message.content for message in trajectory.of("assistant"))
            asked.setdefault(row["doctor"], []).append(questions(said))
            steps = {span.turn for span in verifier.verify(None, trajectory)}
            counts.setdefault(row["doctor"], []).append(len(steps) / max(trajectory.turns, 1))
    redundancy = {doctor: sum(shares) / len(shares) for doctor, shares in counts.items()}
    likeness = {doctor: duplicate_rate(dialogues) for doctor, dialogues in asked.items()}
    order = sorted(likeness, key=likeness.__getitem__)
    assert order[-1] == "mistral-v1" and order[0] == "mistral-v2"
    assert sorted(redundancy, key=redundancy.__getitem__) == order


# -- a language model as verifier -------------------------------------------------------------------------------------
class Scripted:
    """A chat client that gives replies in order and keeps what it was asked."""

    model = "scripted"

    def __init__(self, *replies: str | Exception) -> None:
        self.replies, self.asked = list(replies), []

    async def chat(self, messages, **options) -> Reply:
        self.asked.append((messages, options))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(text=reply)


REPEATED = dialogue("Do you smoke?", "No.", "Well.  Do you\nsmoke? Any cough?")
GOOD = {"turn": 1, "quote": "do you smoke?", "criterion": "redundant_question", "why": "asked before"}


def judge(*replies: str | Exception, case: Case | None = None):
    client = Scripted(*replies)
    return asyncio.run(ChatStepVerifier(client).verify(case, REPEATED)), client


def test_a_quote_is_found_in_the_text():
    judgement, client = judge("```json\n" + json.dumps({"violations": [GOOD]}) + "\n```", case=CASE)
    assert judgement.spans == (
        SpanReward(turn=1, token_start=1, token_end=4, value=0.1, criterion="redundant_question", note="asked before"),
    )
    assert judgement.malformed == {} and judgement.replies == 1
    messages, options = client.asked[0]
    assert "[1] physician: Well." in messages[1]["content"] and "radiates to the left arm" in messages[1]["content"]
    assert "redundant_question" in messages[0]["content"] and options["json_schema"]["required"] == ["violations"]


def test_malformed_entries_are_counted_by_name_and_never_guessed():
    entries = [
        GOOD,
        {**GOOD, "turn": 7},
        {**GOOD, "quote": "do you drink?"},
        {**GOOD, "quote": "  "},
        {**GOOD, "criterion": "rudeness"},
        {**GOOD, "turn": True},
        {**GOOD, "why": 3},
        "turn 1",
    ]
    judgement, _ = judge(json.dumps({"violations": entries}))
    assert len(judgement.spans) == 1
    assert judgement.malformed == {"turn": 1, "quote": 1, "fields": 4, "criterion": 1}


def test_an_unreadable_reply_is_asked_for_again():
    judgement, client = judge("I think that it is fine.", '{"violations": 3}', '{"violations": []}')
    assert judgement.spans == () and judgement.replies == 3
    assert len({options["seed"] for _, options in client.asked}) == 3


BLANK = "```json" + "\n" * 20_000 + "x"


@pytest.mark.parametrize("reply", [BLANK, '{"violations": ' + "1" * 5000 + "}"], ids=["blanks", "many-digits"])
def test_a_strange_reply_is_unreadable_and_costs_no_time(reply):
    began = time.process_time()
    with pytest.raises(UnjudgedError, match="step verifier: 3 unparsable"):
        judge(reply, reply, reply)
    assert time.process_time() - began < 2.0


def test_no_readable_reply_is_no_clean_bill():
    with pytest.raises(UnjudgedError, match="step verifier: 3 unparsable"):
        judge("fine", "fine", "fine")


def test_no_reply_is_named():
    with pytest.raises(UnjudgedError, match="step verifier: over_budget: spent"):
        judge(ChatError(Failure.over_budget, "spent"))


# -- anything at all --------------------------------------------------------------------------------------------------
PIECES = st.sampled_from(
    (
        *("Do you smoke?", "Any fever?", "Diagnosis: angina.", "- ECG\n- CT\n- MRI", "send home", "You will be fine."),
        *("Don't worry, it is nothing.", "You said that", "I will order blood tests.", "a" * 300),
        *("?", "\n", "\u2028", "🙂", "İ", "e\u0301?"),
    )
)
SPEECH = st.one_of(st.lists(PIECES, max_size=5).map(" ".join), st.text(max_size=40))


@settings(deadline=None, max_examples=30)
@given(st.lists(SPEECH, max_size=9), st.sampled_from([CASE, None]))
def test_whatever_is_said_spans_lie_in_their_messages(said, case):
    trajectory = dialogue(*said, differential="1. Angina", diagnosis="Diagnosis: angina")
    spans = StepVerifier().verify(case, trajectory)
    texts = {m.turn: m.content for m in trajectory.messages if m.role == "assistant"}
    assert all(0 <= span.token_start <= span.token_end <= len(words(texts[span.turn])) for span in spans)
    assert set(step_gammas(spans, trajectory.turns)) <= {0.1, 0.5, 0.9, 1.0}
    assert StepVerifier().verify(case, trajectory) == spans
