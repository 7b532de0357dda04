"""Incremental text: whole characters, stop strings across tokens and bytes, the same text however it is delivered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_core import BYTES, END, LONGEST, PIECES, START, make_tokenizer

from m3.engine.detokenizer import Detokenizer
from m3.engine.outputs import Assembly, Completion
from m3.engine.request import Request, SamplingParams, Tokens
from m3.models.tokenizer import Tokenizer

BY_TOKEN = {token: piece for piece, token in PIECES.items()}
EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@st.composite
def some_tokens(draw: st.DrawFn) -> list[int]:
    """A stretch of the text, twice at most, cut into tokens anywhere."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        position, stop = sorted(draw(st.tuples(*[st.integers(0, len(BYTES))] * 2)))
        while position < stop:
            size = draw(st.integers(1, min(LONGEST, stop - position)))
            found.append(PIECES[BYTES[position : position + size]])
            position += size
    return found


SOME_STOPS = st.lists(
    st.sampled_from(["STOP", "STOPPED", "TOP", "abac", "a", "🩺🩺日", "日", " ", "\n\nUser:", "é 🩺", "本 S", "zzz"]),
    max_size=3,
).map(tuple)


def text_of(tokens: list[int]) -> str:
    return b"".join(BY_TOKEN[token] for token in tokens).decode(errors="replace")


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, int] | None:
    """(characters kept, characters read) at the first character on which a stop string ends."""
    for end in range(1, len(text) + 1):
        found = [len(one) for one in stop if text[:end].endswith(one)]
        if found:
            return end - max(found), end
    return None


def read(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = (), **options) -> tuple[str, int, int]:
    """(text, tokens that it needs, tokens read)"""
    detokenizer = Detokenizer(tokenizer, stop=stop, **options)
    for token in tokens:
        if detokenizer.push(token):
            break
    detokenizer.finish()
    text, count = detokenizer.take()
    assert detokenizer.take() == ("", 0)
    return text, count, detokenizer.count


def spell(text: str) -> list[int]:
    return list(text.encode())


# -- without stop strings ---------------------------------------------------------------------------------------------
@EXAMPLES
@given(tokens=some_tokens())
def test_all_the_text_comes_out(tokenizer, tokens):
    assert read(tokenizer, tokens) == (text_of(tokens), len(tokens), len(tokens))


@EXAMPLES
@given(tokens=st.lists(st.integers(0, 255), max_size=24))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them(tokenizer, tokens):
    assert read(tokenizer, tokens)[0] == tokenizer.decode(tokens)


def test_a_character_comes_out_with_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    seen = []
    for token in spell("a🩺b"):
        detokenizer.push(token)
        seen.append(detokenizer.take())
    assert seen == [("a", 1), ("", 1), ("", 1), ("", 1), ("🩺", 1), ("b", 1)]


def test_bytes_of_no_character_are_not_held_for_ever(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    for token in [0xFF] * 20:
        detokenizer.push(token)
    assert detokenizer.take()[0] == "\ufffd" * 19
    detokenizer.finish()
    assert detokenizer.take()[0] == "\ufffd"


def test_half_a_character_at_the_end_is_shown(tokenizer):
    assert read(tokenizer, spell("a🩺")[:-1])[0] == "a\ufffd"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|end|>b<|start|>")])
def test_special_tokens(tokenizer, skip, text):
    tokens = [ord("a"), END, ord("b"), START]
    assert read(tokenizer, tokens, skip_special_tokens=skip) == (text, 4, 4)


def test_a_special_token_within_a_character_does_not_break_it(tokenizer):
    half, rest = spell("日")[:2], spell("日")[2:]
    assert read(tokenizer, [*half, END, *rest])[0] == "日"


def test_tokens_outside_the_vocabulary_have_no_text(tokenizer):
    assert read(tokenizer, [ord("a"), 10**6, ord("b")]) == ("ab", 3, 3)


def test_nothing(tokenizer):
    assert read(tokenizer, [], ("STOP",)) == ("", 0, 0)


@pytest.mark.parametrize("prompt", [[], spell("The "), spell("né 日本")[:-1], [START, *spell("user"), END]])
def test_the_prompt_is_not_part_of_the_text(tokenizer, prompt):
    assert read(tokenizer, spell("日 x"), prompt=prompt)[0] == "日 x"


# -- with stop strings ------------------------------------------------------------------------------------------------
@EXAMPLES
@given(tokens=some_tokens(), stop=SOME_STOPS)
def test_the_text_ends_before_the_first_stop_string(tokenizer, tokens, stop):
    whole = text_of(tokens)
    kept, _ = first_stop(whole, stop) or (len(whole), len(whole))
    assert read(tokenizer, tokens, stop)[0] == whole[:kept]


@EXAMPLES
@given(tokens=some_tokens(), stop=SOME_STOPS)
def test_the_tokens_are_those_that_the_text_needs(tokenizer, tokens, stop):
    text, count, pushed = read(tokenizer, tokens, stop)
    found = first_stop(text_of(tokens), stop)
    if found is None:
        assert (count, pushed) == (len(tokens), len(tokens))
        return
    characters = [len(text_of(tokens[:size]).removesuffix("\ufffd")) for size in range(len(tokens) + 1)]
    assert text == text_of(tokens)[: found[0]]
    assert count == next(size for size, length in enumerate(characters) if length >= found[0])
    assert pushed >= count


@EXAMPLES
@given(text=st.text("STOPED ab🩺", max_size=24), stop=SOME_STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(tokenizer, text, stop):
    detokenizer = Detokenizer(tokenizer, stop=stop)
    released = ""
    for size, char in enumerate(text, 1):
        for token in spell(char):
            if detokenizer.push(token):
                return
        released += detokenizer.take()[0]
        seen = text[:size]
        held = max((n for one in stop for n in range(1, len(one)) if seen.endswith(one[:n])), default=0)
        assert released == seen[: size - held]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("STOP", ("STOP",), ""),
        ("STOPPED", ("STOPPED", "STOP"), ""),
        ("xxSTOP", ("STOP", "xSTOP"), "x"),
        ("abcd", ("abcd", "bc"), "a"),
        ("aabaabaac", ("aabaac",), "aab"),
        ("STOSTOSTOP!", ("STOP",), "STOSTO"),
        ("STO", ("STOP",), "STO"),
        ("日本", ("本",), "日"),
        ("a\ufffd", ("\ufffd",), "a"),
    ],
    ids=["at-once", "prefix", "longest", "first-to-end", "overlap", "again", "half", "bytes", "replacement"],
)
def test_which_stop_string(tokenizer, text, stop, kept):
    assert read(tokenizer, spell(text), stop)[0] == kept


def test_a_stop_string_that_the_end_completes(tokenizer):
    tokens = spell("a🩺")[:-1]
    assert read(tokenizer, tokens, ("\ufffd",))[:2] == ("a", 1)


def test_a_stop_string_within_the_first_token(tokenizer):
    assert read(tokenizer, [PIECES[b" STOP"], ord("x")], ("STOP",)) == (" ", 1, 1)
    assert read(tokenizer, [PIECES[b" STOP"], ord("x")], (" ST",)) == ("", 0, 1)


# -- delivery ---------------------------------------------------------------------------------------------------------
def deliver(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...], chance: random.Random) -> Completion:
    """The tokens in groups of chance sizes, taken at chance times."""
    params = SamplingParams(stop=stop, logprobs="raw", top_logprobs=1)
    request = Request(id="0", prompt=[1], params=params, seed=0, arrival=0.0, tokens=[1])
    assembly = Assembly(request, tokenizer, request_id="mine")
    outputs, position = [], 0
    while position < len(tokens) and assembly.finish_reason is None:
        group = tokens[position : position + chance.randint(1, 6)]
        position += len(group)
        assembly.add_tokens(
            Tokens(
                id="0",
                tokens=group,
                version=len(group),
                logprobs=[-float(token) for token in group],
                top_logprobs=[[(token, -1.0)] for token in group],
            )
        )
        if chance.random() < 0.5:
            outputs.append(assembly.take())
    assembly.finish("length")
    return Completion.of([1], [*outputs, assembly.take()])


@EXAMPLES
@given(tokens=some_tokens(), stop=SOME_STOPS, chance=st.randoms(use_true_random=False))
def test_grouping_changes_nothing(tokenizer, tokens, stop, chance):
    text, count, pushed = read(tokenizer, tokens, stop)
    found = first_stop(text_of(tokens), stop)
    got = deliver(tokenizer, tokens, stop, chance)
    assert (got.text, got.tokens) == (text, tokens[:count])
    assert got.finish_reason == ("length" if found is None else "stop")
    assert got.usage.completion_tokens == pushed
    assert got.logprobs == [-float(token) for token in got.tokens]
    assert got.top_logprobs == [[(token, -1.0)] for token in got.tokens]
    assert len(got.versions) == len(got.tokens)
