"""The scheduler: order, chunks, growth, preemption, sharing, ends and errors, case by case."""

from __future__ import annotations

import re

import pytest
from paged_model import PAGE, Runner, alone, make_request, make_scheduler

from m3.engine.config import EngineConfig
from m3.engine.kv_cache import PagePool
from m3.engine.request import Finished, Request
from m3.engine.scheduler import Plan, QueueFull, Scheduler, block_table


def refused(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def planned(plan: Plan) -> tuple[list[str], list[tuple[str, int, int]]]:
    return [request.id for request in plan.decodes], [
        (request.id, start, stop) for request, start, stop in plan.prefills
    ]


def ids(requests) -> list[str]:
    return [request.id for request in requests]


# -- order and rows ---------------------------------------------------------------------------------------------------
def test_a_request_prefills_then_decodes():
    scheduler = make_scheduler()
    runner = Runner(scheduler)
    request = make_request("a", 5, max_tokens=3)
    scheduler.add(request)
    assert [planned(runner.step()) for _ in range(3)] == [([], [("a", 0, 5)]), (["a"], []), (["a"], [])]
    assert runner.finished["a"] == Finished(id="a", reason="length")
    assert request.tokens == alone(request, scheduler.limit)
    assert (request.state, request.finish_reason, request.pages) == ("finished", "length", [])
    assert not scheduler.has_work()


def test_a_prompt_of_one_token_prefills():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 1))
    assert planned(Runner(scheduler).step()) == ([], [("a", 0, 1)])


def test_long_prompts_are_cut_into_chunks_that_fill_the_steps():
    scheduler = make_scheduler(max_step_tokens=8)
    runner = Runner(scheduler)
    for request in [make_request("a", 13), make_request("b", 6)]:
        scheduler.add(request)
    assert [planned(runner.step()) for _ in range(4)] == [
        ([], [("a", 0, 8)]),
        ([], [("a", 8, 13), ("b", 0, 3)]),
        (["a"], [("b", 3, 6)]),
        (["a", "b"], []),
    ]


def test_decodes_come_first_and_chunks_take_the_rest():
    scheduler = make_scheduler(max_step_tokens=8)
    runner = Runner(scheduler)
    scheduler.add(make_request("a", 4))
    runner.step()
    scheduler.add(make_request("b", 40))
    assert planned(runner.step()) == (["a"], [("b", 0, 7)])
    assert runner.rows == 8


def test_max_running_requests_run():
    scheduler = make_scheduler(max_running=2)
    runner = Runner(scheduler)
    for id in "abc":
        scheduler.add(make_request(id, 2, max_tokens=2))
    assert planned(runner.step())[1] == [("a", 0, 2), ("b", 0, 2)]
    assert planned(runner.step()) == (["a", "b"], [])
    assert planned(runner.step()) == ([], [("c", 0, 2)])


def test_nobody_overtakes_a_request_that_waits_for_pages():
    scheduler = make_scheduler(num_pages=6)
    runner = Runner(scheduler)
    for request in [make_request("a", 12, max_tokens=3), make_request("large", 16), make_request("small", 1)]:
        scheduler.add(request)
    assert [planned(runner.step()) for _ in range(3)] == [([], [("a", 0, 12)]), (["a"], []), (["a"], [])]
    assert planned(runner.step()) == ([], [("large", 0, 16)])


def test_whoever_runs_keeps_a_page_to_grow_into():
    scheduler = make_scheduler(num_pages=3)
    runner = Runner(scheduler)
    scheduler.add(make_request("a", 4, max_tokens=2))
    scheduler.add(make_request("b", 8))
    assert [planned(runner.step()) for _ in range(3)] == [([], [("a", 0, 4)]), (["a"], []), ([], [("b", 0, 8)])]


def test_block_table_is_the_requests_own_pages():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9))
    plan = scheduler.plan(0.0)
    ((request, _, _),) = plan.prefills
    (row,) = block_table([request])
    assert row is request.pages
    assert len(row) == 3


# -- lookahead --------------------------------------------------------------------------------------------------------
def prefilled(scheduler: Scheduler, *requests: Request) -> Runner:
    runner = Runner(scheduler)
    for request in requests:
        scheduler.add(request)
    runner.until(lambda plan: all(request.drawn for request in requests))
    return runner


LOOKAHEAD = {
    "in_the_page": (4, 4, 2),  # tokens 5, slots 4..7
    "over_its_end": (4, 5, 3),
    "many_pages": (4, 13, 5),
    "exactly": (6, 6, 3),  # tokens 7, slots 6..11
}


@pytest.mark.parametrize(("prompt", "lookahead", "pages"), LOOKAHEAD.values(), ids=LOOKAHEAD)
def test_a_decode_has_pages_for_its_lookahead(prompt, lookahead, pages):
    scheduler = make_scheduler()
    runner = prefilled(scheduler, request := make_request("a", prompt, max_tokens=32))
    scheduler.lookahead = lookahead
    plan = runner.step()
    assert plan.lookahead == lookahead
    assert len(request.pages) == pages
    assert request.drawn == 1 + lookahead


def test_pages_of_the_lookahead_stay_with_the_request():
    scheduler = make_scheduler()
    runner = prefilled(scheduler, request := make_request("a", 4))
    scheduler.lookahead, runner.accept = 8, lambda lookahead: 1
    runner.step()
    pages = list(request.pages)
    scheduler.lookahead = 1
    runner.step()
    assert request.pages == pages
    assert scheduler.pool.used == len(pages) == 3


def test_lookahead_falls_back_to_1_where_pages_are_short():
    scheduler = make_scheduler(num_pages=4)
    runner = prefilled(scheduler, make_request("a", 4), make_request("b", 4))
    scheduler.lookahead = 5
    plan = runner.step()
    assert (plan.lookahead, ids(plan.decodes), plan.preempted) == (1, ["a", "b"], [])


ROWS = {"all_rows": (8, 8), "one_row_too_many": (9, 1)}


@pytest.mark.parametrize(("lookahead", "granted"), ROWS.values(), ids=ROWS)
def test_lookahead_falls_back_to_1_where_rows_are_short(lookahead, granted):
    scheduler = make_scheduler(max_step_tokens=16)
    runner = prefilled(scheduler, make_request("a", 4, max_tokens=99), make_request("b", 4, max_tokens=99))
    scheduler.lookahead = lookahead
    assert runner.step().lookahead == granted


CONTEXT = {"up_to_the_last_token": (3, 3), "one_slot_too_many": (4, 1)}  # 9 tokens of 12


@pytest.mark.parametrize(("lookahead", "granted"), CONTEXT.values(), ids=CONTEXT)
def test_lookahead_falls_back_to_1_where_the_context_ends(lookahead, granted):
    scheduler = make_scheduler(max_context=12)
    runner = prefilled(scheduler, make_request("a", 8, max_tokens=99))
    scheduler.lookahead = lookahead
    assert runner.step().lookahead == granted


HALF = {"half_of_the_rows": (4, 4, 8), "more": (5, 1, 14)}


@pytest.mark.parametrize(("lookahead", "granted", "rows"), HALF.values(), ids=HALF)
def test_speculation_leaves_half_of_the_rows_to_prompts(lookahead, granted, rows):
    scheduler = make_scheduler(max_step_tokens=16)
    runner = prefilled(scheduler, make_request("a", 4, max_tokens=99), make_request("b", 4, max_tokens=99))
    scheduler.add(make_request("c", 40))
    scheduler.lookahead = lookahead
    plan = runner.step()
    assert plan.lookahead == granted
    assert planned(plan)[1] == [("c", 0, rows)]


@pytest.mark.parametrize("lookahead", [1, 2, 3, 5, 9, 16])
@pytest.mark.parametrize(("num_pages", "max_context"), [(8, 21), (5, 0), (8, 0)], ids=["context", "pool", "both_large"])
def test_speculation_ends_where_plain_decoding_does(lookahead, num_pages, max_context):
    scheduler = make_scheduler(num_pages=num_pages, max_context=max_context)
    scheduler.lookahead = lookahead
    scheduler.add(request := make_request("a", 10, max_tokens=20))
    runner = Runner(scheduler)
    runner.drain()
    assert request.tokens == alone(request, scheduler.limit)
    assert runner.finished["a"].reason == "length"


# -- out of room ------------------------------------------------------------------------------------------------------
def test_a_request_that_outgrows_max_context_ends_with_length():
    scheduler = make_scheduler(max_context=12)
    scheduler.add(request := make_request("a", 10, max_tokens=99))
    runner = Runner(scheduler)
    runner.drain()
    assert len(request.tokens) == 12
    assert runner.finished["a"].reason == "length"


def test_a_request_that_outgrows_the_pool_ends_with_length_and_its_pages_are_free():
    scheduler = make_scheduler(num_pages=3, prefix_reuse=False)
    scheduler.add(request := make_request("a", 10, max_tokens=99))
    runner = Runner(scheduler)
    runner.drain()
    assert len(request.tokens) == 3 * PAGE + 1
    assert runner.finished["a"].reason == "length"
    assert scheduler.pool.free == 3


def test_what_a_request_yields_at_the_end_of_the_pool_does_not_depend_on_neighbours():
    scheduler = make_scheduler(num_pages=4)
    requests = [make_request(id, 6, max_tokens=99, seed=index) for index, id in enumerate("abc")]
    for request in requests:
        scheduler.add(request)
    Runner(scheduler).drain()
    assert [request.tokens for request in requests] == [alone(request, 4 * PAGE + 1) for request in requests]


# -- preemption -------------------------------------------------------------------------------------------------------
def test_the_youngest_gives_way_and_loses_no_token():
    scheduler = make_scheduler(num_pages=5)
    old, young = make_request("old", 6, max_tokens=9), make_request("young", 6, max_tokens=9)
    runner = prefilled(scheduler, old, young)
    plan = runner.until(lambda plan: plan.preempted)
    assert (ids(plan.preempted), ids(plan.decodes)) == (["young"], ["old"])
    assert young.tokens == alone(young, len(young.tokens))
    assert young.drawn > 1
    assert (young.state, young.computed, young.pages) == ("waiting", 0, [])
    assert ids(scheduler.waiting) == ["young"]
    runner.drain()
    assert [old.tokens, young.tokens] == [alone(old, scheduler.limit), alone(young, scheduler.limit)]


def test_a_preempted_request_is_admitted_before_those_that_wait():
    scheduler = make_scheduler(num_pages=5, max_running=2)
    runner = prefilled(scheduler, make_request("a", 6, max_tokens=9), make_request("b", 6, max_tokens=9))
    scheduler.add(make_request("c", 1))
    runner.until(lambda plan: plan.preempted)
    assert (ids(scheduler.running), ids(scheduler.waiting)) == (["a"], ["b", "c"])
    assert planned(runner.until(lambda plan: plan.prefills))[1][0][0] == "b"


def test_a_preempted_request_finds_its_own_pages_again():
    scheduler = make_scheduler(num_pages=12)
    request = make_request("a", 9, max_tokens=20)
    runner = prefilled(scheduler, request)
    runner.until(lambda plan: len(request.tokens) == 14)
    pages = list(request.pages)
    scheduler.preempt_all()
    assert scheduler.pool.cached == 3
    plan = runner.step()
    assert ids(plan.preempted) == ["a"]
    assert planned(plan) == ([], [("a", 12, 14)])
    assert request.pages[:3] == pages[:3]
    assert request.cached == 0  # its own work is not another's
    runner.drain()
    assert request.tokens == alone(request, scheduler.limit)


def test_a_preempted_request_recomputes_what_was_evicted():
    scheduler = make_scheduler(num_pages=4)
    request = make_request("a", 9, max_tokens=6)
    runner = prefilled(scheduler, request)
    scheduler.preempt_all()
    scheduler.pool.release(scheduler.pool.allocate(4))
    assert planned(runner.step()) == ([], [("a", 0, 10)])
    runner.drain()
    assert request.tokens == alone(request, scheduler.limit)


def test_pages_that_a_larger_lookahead_left_go_before_anyone_is_preempted():
    scheduler = make_scheduler(num_pages=7, prefix_reuse=False)
    runner = Runner(scheduler, accept=lambda lookahead: 1)
    speculated, other = make_request("a", 4, max_tokens=9), make_request("b", 15, max_tokens=9)
    scheduler.add(speculated)
    scheduler.add(other)
    runner.step()
    scheduler.lookahead = 8
    assert runner.step().lookahead == 8
    scheduler.lookahead = 1
    runner.step()
    assert [len(speculated.pages), len(other.pages), scheduler.pool.free] == [3, 4, 0]
    assert runner.step().preempted == []
    assert [len(speculated.pages), len(other.pages)] == [2, 5]


def test_pages_that_a_larger_lookahead_left_go_to_those_that_wait():
    scheduler = make_scheduler(num_pages=6, prefix_reuse=False)
    runner = prefilled(scheduler, request := make_request("a", 4, max_tokens=99))
    scheduler.lookahead, runner.accept = 12, lambda lookahead: 1
    runner.step()
    assert len(request.pages) == 4
    scheduler.lookahead = 1
    scheduler.add(make_request("b", 7))
    assert planned(runner.step()) == (["a"], [("b", 0, 7)])
    assert len(request.pages) == 2


def test_preempt_all_after_new_weights_recomputes_everything():
    scheduler = make_scheduler()
    runner = prefilled(scheduler, make_request("a", 9), make_request("b", 9))
    scheduler.pool.clear_prefixes()
    scheduler.preempt_all()
    assert scheduler.pool.free == scheduler.pool.num_pages
    plan = runner.step()
    assert planned(plan) == ([], [("a", 0, 11), ("b", 0, 5)])
    assert ids(plan.preempted) == ["b", "a"]


# -- sharing ----------------------------------------------------------------------------------------------------------
def test_a_beginning_is_computed_once():
    scheduler = make_scheduler()
    first, second = make_request("a", [1] * 10), make_request("b", [1] * 8 + [2, 2, 2])
    runner = prefilled(scheduler, first)
    scheduler.add(second)
    assert planned(runner.step()) == (["a"], [("b", 8, 11)])
    assert second.pages[:2] == first.pages[:2]
    assert second.cached == 8
    runner.drain()
    assert runner.finished["b"].cached_tokens == 8
    assert [first.tokens, second.tokens] == [alone(first, scheduler.limit), alone(second, scheduler.limit)]


def test_the_last_prompt_token_is_always_computed():
    scheduler = make_scheduler()
    runner = prefilled(scheduler, make_request("a", [1] * 8))
    scheduler.add(make_request("b", [1] * 8))
    assert planned(runner.step())[1] == [("b", 4, 8)]


def test_generated_tokens_are_shared_too():
    scheduler = make_scheduler()
    first = make_request("a", 6, max_tokens=7)
    scheduler.add(first)
    runner = Runner(scheduler)
    runner.drain()
    scheduler.add(make_request("b", [*first.tokens, 1, 2]))
    assert planned(runner.step())[1] == [("b", 12, 15)]


def test_equal_prompts_that_come_together_are_computed_once():
    scheduler = make_scheduler(max_step_tokens=64)
    requests = [make_request(f"r{index}", [1] * 18, seed=index) for index in range(4)]
    for request in requests:
        scheduler.add(request)
    runner = Runner(scheduler)
    assert planned(runner.step()) == ([], [("r0", 0, 18)])
    assert planned(runner.step()) == (["r0"], [(f"r{index}", 16, 18) for index in (1, 2, 3)])
    runner.drain()
    assert [request.tokens for request in requests] == [alone(request, scheduler.limit) for request in requests]


def test_equal_prompts_without_a_page_to_share_do_not_wait():
    scheduler = make_scheduler()
    for id in "ab":
        scheduler.add(make_request(id, [1] * 4))
    assert planned(Runner(scheduler).step())[1] == [("a", 0, 4), ("b", 0, 4)]


def test_a_prompt_that_shares_the_first_page_alone_waits_for_this_page_alone():
    scheduler = make_scheduler(max_step_tokens=8)
    runner = Runner(scheduler)
    scheduler.add(make_request("a", [1] * 6 + [2] * 14))
    scheduler.add(make_request("b", [1] * 4 + [3] * 5))
    assert [planned(runner.step())[1] for _ in range(3)] == [
        [("a", 0, 8)],
        [("a", 8, 16)],
        [("a", 16, 20), ("b", 4, 8)],
    ]


def test_nothing_is_shared_without_prefix_reuse():
    scheduler = make_scheduler(prefix_reuse=False, max_step_tokens=64)
    for id in "ab":
        scheduler.add(make_request(id, [1] * 9))
    runner = Runner(scheduler)
    assert planned(runner.step())[1] == [("a", 0, 9), ("b", 0, 9)]
    runner.drain()
    assert scheduler.pool.free == scheduler.pool.num_pages


def test_prompt_logprobs_are_computed_at_every_position():
    scheduler = make_scheduler(max_step_tokens=64)
    for id in "ab":
        scheduler.add(make_request(id, [1] * 9, prompt_logprobs=True))
    assert planned(Runner(scheduler).step())[1] == [("a", 0, 9), ("b", 0, 9)]


def test_prompt_logprobs_that_were_interrupted_start_anew_and_those_given_do_not():
    scheduler = make_scheduler(max_step_tokens=12)
    runner = Runner(scheduler)
    scheduler.add(make_request("done", [1] * 6, prompt_logprobs=True))
    scheduler.add(make_request("half", [2] * 9, prompt_logprobs=True))
    assert planned(runner.step())[1] == [("done", 0, 6), ("half", 0, 6)]
    scheduler.preempt_all()
    assert planned(runner.step())[1] == [("done", 4, 7), ("half", 0, 9)]


def test_a_failed_request_publishes_no_more():
    scheduler = make_scheduler()
    runner = prefilled(scheduler, request := make_request("a", 9))
    event = scheduler.finish(request, "error", "logits are not finite")
    assert event == Finished(id="a", reason="error", error="logits are not finite")
    scheduler.check()
    assert scheduler.pool.cached == 0
    assert not runner.finished


# -- ends -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_a_request_ends_at_its_deadline(running):
    scheduler = make_scheduler(max_running=1)
    other, late = make_request("other", 4), make_request("late", 4, arrival=0.5, deadline=2.5, max_tokens=99)
    for request in [late] if running else [other, late]:
        scheduler.add(request)
    runner = Runner(scheduler)
    for _ in range(3):
        assert runner.step().finished == []
    assert runner.step().finished == [Finished(id="late", reason="deadline")]
    assert (late.state, late.pages, late.drawn) == ("finished", [], 3 if running else 0)


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "half_a_prompt", "decoding"])
def test_an_aborted_request_ends_in_the_next_plan(steps):
    scheduler = make_scheduler(prefix_reuse=False)
    scheduler.add(make_request("a", 20))
    runner = Runner(scheduler)
    for _ in range(steps):
        runner.step()
    assert scheduler.abort("a")
    assert scheduler.pool.free == scheduler.pool.num_pages
    assert scheduler.has_work()
    plan = runner.step()
    assert plan.finished == [Finished(id="a", reason="abort")]
    assert planned(plan) == ([], [])
    assert not scheduler.has_work()


def test_abort_of_an_unknown_request_says_so():
    assert not make_scheduler().abort("a")


def test_an_id_can_be_used_again():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    Runner(scheduler).drain()
    scheduler.add(make_request("a", 4))
    assert ids(scheduler.waiting) == ["a"]


# -- errors -----------------------------------------------------------------------------------------------------------
REFUSED = {
    "empty": (0, {}, 0, "1..32 tokens (max_context unlimited, 8 pages of 4); got 0"),
    "pool": (33, {}, 32, "1..32 tokens (max_context unlimited, 8 pages of 4); got 33"),
    "context": (20, {"max_context": 20}, 19, "1..19 tokens (max_context 20, 8 pages of 4); got 20"),
}


@pytest.mark.parametrize(("tokens", "sizes", "longest", "message"), REFUSED.values(), ids=REFUSED)
def test_a_prompt_that_can_never_be_served_is_refused(tokens, sizes, longest, message):
    scheduler = make_scheduler(num_pages=8, **sizes)
    with refused(f"Scheduler.add: prompt: want {message}"):
        scheduler.add(make_request("a", [1] * tokens))
    assert not scheduler.has_work()


@pytest.mark.parametrize(("tokens", "sizes"), [(32, {}), (19, {"max_context": 20})], ids=["pool", "context"])
def test_the_longest_prompt_yields_a_token(tokens, sizes):
    scheduler = make_scheduler(num_pages=8, **sizes)
    scheduler.add(request := make_request("a", [1] * tokens))
    Runner(scheduler).drain()
    assert request.drawn == 1


def test_a_queue_that_is_full_refuses():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_request("a", 1))
    scheduler.add(make_request("b", 1))
    with pytest.raises(QueueFull, match="at most 2 requests that wait"):
        scheduler.add(make_request("c", 1))
    Runner(scheduler).step()
    scheduler.add(make_request("c", 1))
    scheduler.check()


def test_an_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 1))
    with refused("Scheduler.add: id: want an id that no unfinished request has; got 'a'"):
        scheduler.add(make_request("a", 2))


def test_a_request_finishes_once():
    scheduler = make_scheduler()
    scheduler.add(request := make_request("a", 1))
    scheduler.finish(request, "stop")
    with refused("Scheduler.finish: request: want one that is not finished; got 'a'"):
        scheduler.finish(request, "stop")


def test_a_pool_of_other_pages_is_refused():
    with refused("Scheduler: pool: want pages of 16 tokens; got 4"):
        Scheduler(EngineConfig(), PagePool(8, 4))


def test_a_queue_without_room_is_refused():
    with refused("EngineConfig: max_waiting: want an int in 1..2147483647; got 0"):
        make_scheduler(max_waiting=0)


def test_a_step_that_was_not_completed_is_seen():
    scheduler = make_scheduler()
    scheduler.add(request := make_request("a", 4))
    scheduler.plan(0.0)
    request.computed = 4
    with pytest.raises(AssertionError, match="request a has 0 tokens to compute"):
        scheduler.plan(1.0)
