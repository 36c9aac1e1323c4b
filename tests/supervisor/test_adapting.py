"""The context that moves by itself: up for a request, down after a time without need."""

import asyncio
from dataclasses import replace

import pytest

from kvserve.core.growth import Adapt, GrowthPolicy
from kvserve.core.lifecycle import Phase
from kvserve.core.plan import Task
from kvserve.errors import BelowFloor, ContextLengthExceeded, DoesNotFit, WorkerFailed
from kvserve.ipc.messages import LoadFailed, NeedsContext, Paused, Started
from tests.supervisor.stage import SPEC, FakeWorker, Generate, Stage, play

FULL = GrowthPolicy(Adapt.FULL, max_ctx=65536)
GROW = replace(FULL, adapt=Adapt.GROW)


async def turn_over(stage: Stage, old: FakeWorker) -> FakeWorker:
    """Let the drained worker leave and its successor load."""
    await stage.settle()
    old.die()
    await stage.settle()
    stage.worker.load()
    await stage.settle()
    return stage.worker


def test_a_prompt_that_needs_more_is_answered_by_a_larger_context() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        long, short = await stage.submit(), await stage.submit()
        old.say(NeedsContext(id=long.id, n_tokens=20000))
        old.answer(short.id, 1, done=True)
        await stage.settle()
        assert stage.supervisor.status().n_waiting == 1
        new = await turn_over(stage, old)
        assert new.launch.n_ctx == 32768
        assert str(new.launch.pair) == "q8_0:q8_0"
        assert [g.id for g in new.of_kind(Generate)] == [long.id]
        new.started(long.id)
        new.answer(long.id, 1, done=True)
        await stage.settle()
        assert long.done is not None
        assert long.served[0].n_ctx == 32768
        assert stage.supervisor.status().reloads[-1].reason == "grow"
        await stage.end()

    play(story)


@pytest.mark.parametrize(
    ("vram_gib", "longest", "n_ctx"),
    [(24.0, 2**20, 65536), (24.0, 32768, 32768), (7.6, 2**20, 32768)],
    ids=["fits", "does not fit", "costs precision"],
)
def test_growing_counts_what_runs_where_that_costs_nothing(
    vram_gib: float, longest: int, n_ctx: int
) -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        stage.planner.vram_gib, stage.planner.longest = vram_gib, longest
        old = await stage.serving()
        long, running = await stage.submit(), await stage.submit()
        old.say(Started(running.id, 15000))
        old.answer(running.id, 1)
        old.say(NeedsContext(id=long.id, n_tokens=20000))
        await stage.settle()
        old.say(Paused())
        new = await turn_over(stage, old)
        assert new.launch.n_ctx == n_ctx
        assert {g.id for g in new.of_kind(Generate)} == {long.id, running.id}
        await stage.end()

    play(story)


def test_a_prompt_of_exactly_the_context_grows_too() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit()
        old.say(NeedsContext(id=caller.id, n_tokens=16384))
        new = await turn_over(stage, old)
        assert new.launch.n_ctx == 32768
        await stage.end()

    play(story)


def test_a_request_that_asks_for_a_context_gets_it_before_it_starts() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit(replace(SPEC, min_ctx=30000))
        assert old.of_kind(Generate) == []
        new = await turn_over(stage, old)
        assert [g.id for g in new.of_kind(Generate)] == [caller.id]
        await stage.end()

    play(story)


@pytest.mark.parametrize(
    ("policy", "n_tokens", "words"),
    [
        (GROW, 65536, "maximum context length is 65536 tokens, and the request needs 65537"),
        (replace(GROW, adapt=Adapt.OFF), 20000, "kvserve reload --ctx 20257"),
    ],
)
def test_what_may_not_be_grown_to_is_refused_with_the_numbers(
    policy: GrowthPolicy, n_tokens: int, words: str
) -> None:
    async def story() -> None:
        stage = Stage(growth=policy)
        worker = await stage.serving()
        caller = await stage.submit()
        worker.say(NeedsContext(id=caller.id, n_tokens=n_tokens))
        await stage.settle()
        assert isinstance(caller.error, ContextLengthExceeded)
        assert words in caller.error.message
        assert stage.supervisor.ready
        await stage.end()

    play(story)


def test_a_growth_that_does_not_fit_is_refused_with_what_does() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        worker = await stage.serving()
        caller = await stage.submit()
        nearest = "nearest: --ctx 18944 fits with f16:f16"
        stage.planner.error = DoesNotFit(nearest, needed_bytes=2, free_bytes=1)
        worker.say(NeedsContext(id=caller.id, n_tokens=20000))
        await stage.settle()
        assert isinstance(caller.error, ContextLengthExceeded)
        assert nearest in caller.error.message
        assert "maximum context length is 16384" in caller.error.message
        assert stage.supervisor.ready
        await stage.end()

    play(story)


def test_a_growth_that_cannot_be_loaded_is_rolled_back_and_refused() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit()
        old.say(NeedsContext(id=caller.id, n_tokens=20000))
        await stage.settle()
        old.die()
        await stage.settle()
        stage.worker.say(LoadFailed(message="out of memory", out_of_memory=True))
        await stage.settle()
        stage.worker.load()
        await stage.settle()
        assert isinstance(caller.error, ContextLengthExceeded)
        assert "out of memory" in caller.error.message
        assert stage.supervisor.status().plan.chosen.launch.n_ctx == 16384
        await stage.end()
        assert caller.n_ends == 1

    play(story)


def test_after_a_time_without_need_the_context_goes_back() -> None:
    async def story() -> None:
        stage = Stage(growth=FULL, request_timeout=None, step_timeout=1e9)
        old = await stage.serving()
        caller = await stage.submit()
        old.say(NeedsContext(id=caller.id, n_tokens=20000))
        large = await turn_over(stage, old)
        await stage.pass_time(700)
        # A running request keeps the context, and one that needed it renews the wait.
        assert stage.supervisor.ready
        large.answer(caller.id, *range(20000), done=True)
        await stage.settle()
        await stage.pass_time(599)
        assert stage.supervisor.ready
        await stage.pass_time(2)
        assert stage.supervisor.status().phase is Phase.LEAVING
        small = await turn_over(stage, large)
        assert small.launch.n_ctx == 16384
        assert stage.supervisor.status().reloads[-1].reason == "shrink"
        await stage.pass_time(10_000)
        assert stage.worker is small
        await stage.end()

    play(story)


def test_growth_right_after_a_shrink_waits() -> None:
    async def story() -> None:
        stage = Stage(growth=replace(FULL, shrink_after=0.0, min_interval=30.0))
        old = await stage.serving()
        caller = await stage.submit()
        old.say(NeedsContext(id=caller.id, n_tokens=20000))
        large = await turn_over(stage, old)
        large.answer(caller.id, 1, done=True)
        await stage.settle()
        await stage.pass_time(31)
        small = await turn_over(stage, large)
        again = await stage.submit()
        small.say(NeedsContext(id=again.id, n_tokens=20000))
        await stage.settle()
        await stage.pass_time(29)
        assert stage.supervisor.ready
        assert again.error is None
        await stage.pass_time(2)
        assert stage.supervisor.status().phase is Phase.LEAVING
        await stage.end()
        assert again.n_ends == 1

    play(story)


def test_a_context_that_somebody_asks_for_becomes_the_one_to_go_back_to() -> None:
    async def story() -> None:
        stage = Stage(growth=FULL)
        old = await stage.serving()
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        new = await turn_over(stage, old)
        await change
        await stage.pass_time(10_000)
        assert stage.worker is new
        assert stage.supervisor.ready
        await stage.end()

    play(story)


def test_a_parked_request_can_be_given_up() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        keeps_running, caller = await stage.submit(), await stage.submit()
        old.say(NeedsContext(id=caller.id, n_tokens=20000))
        await stage.settle()
        assert stage.supervisor.status().phase is Phase.DRAINING
        caller.ticket.cancel()
        await stage.settle()
        assert stage.supervisor.status().n_waiting == 0
        old.answer(keeps_running.id, 1, done=True)
        await turn_over(stage, old)
        assert stage.worker.of_kind(Generate) == []
        await stage.end()

    play(story)


def test_an_answer_that_fills_the_context_goes_on_in_a_larger_one() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit(replace(SPEC, max_tokens=None))
        (asked,) = old.of_kind(Generate)
        assert asked.may_grow
        old.started(caller.id)
        old.answer(caller.id, 1, 2, 3)
        old.say(NeedsContext(id=caller.id, n_tokens=16384))
        new = await turn_over(stage, old)
        (resumed,) = new.of_kind(Generate)
        assert (resumed.id, len(resumed.resume)) == (caller.id, 3)
        new.answer(caller.id, 4, 5, done=True)
        await stage.settle()
        assert caller.done is not None
        await stage.end()

    play(story)


def test_an_answer_that_no_context_can_hold_ends_where_the_context_does() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit(replace(SPEC, max_tokens=None))
        old.started(caller.id)
        old.answer(caller.id, 1, 2, 3)
        stage.planner.error = DoesNotFit("too big", needed_bytes=2, free_bytes=1)
        old.say(NeedsContext(id=caller.id, n_tokens=16384))
        await stage.settle()
        again = old.of_kind(Generate)[-1]
        assert (again.id, len(again.resume), again.may_grow) == (caller.id, 3, False)
        await stage.end()

    play(story)


@pytest.mark.parametrize("growth", [replace(GROW, adapt=Adapt.OFF), replace(GROW, max_ctx=16384)])
def test_where_nothing_may_grow_an_answer_is_not_told_to(growth: GrowthPolicy) -> None:
    async def story() -> None:
        stage = Stage(growth=growth)
        worker = await stage.serving()
        await stage.submit()
        assert not worker.of_kind(Generate)[0].may_grow
        await stage.end()

    play(story)


MATH = replace(SPEC, task=Task.MATH)


async def grown_to_q8(stage: Stage) -> FakeWorker:
    """On to 32K of q8_0, at the user's wish."""
    old = await stage.serving()
    change = asyncio.create_task(stage.supervisor.change_context(32768))
    new = await turn_over(stage, old)
    assert str((await change).plan.chosen.launch.pair) == "q8_0:q8_0"
    return new


def test_a_task_that_needs_better_types_gets_them() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        worker = await grown_to_q8(stage)
        stage.planner.vram_gib = 12.0
        chat = await stage.submit(replace(SPEC, task=Task.CHAT))
        exact = await stage.submit(MATH)
        assert [g.id for g in worker.of_kind(Generate)] == [chat.id]
        worker.answer(chat.id, 1, done=True)
        new = await turn_over(stage, worker)
        assert str(new.launch.pair) == "f16:f16"
        assert new.launch.n_ctx == 32768
        assert [g.id for g in new.of_kind(Generate)] == [exact.id]
        new.started(exact.id)
        new.answer(exact.id, 1, done=True)
        await stage.settle()
        assert exact.served[0].warning is None
        assert stage.supervisor.status().reloads[-1].reason == "task"
        await stage.end()

    play(story)


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("growth", [GROW, replace(GROW, adapt=Adapt.OFF)])
def test_a_task_whose_types_cannot_be_had_is_told_so(growth: GrowthPolicy, serves: bool) -> None:
    async def story() -> None:
        stage = Stage(growth=growth, serves_below_floor=serves)
        worker = await grown_to_q8(stage)
        stage.planner.error = DoesNotFit("f16 needs more", needed_bytes=2, free_bytes=1)
        caller = await stage.submit(MATH)
        await stage.settle()
        if serves:
            worker.started(caller.id)
            worker.answer(caller.id, 1, done=True)
            await stage.settle()
            assert caller.done is not None
            assert "math" in (caller.served[0].warning or "")
        else:
            assert isinstance(caller.error, BelowFloor)
            assert caller.error.http_status == 409
            assert worker.of_kind(Generate) == []
        await stage.end()

    play(story)


def test_types_that_were_changed_for_requests_are_left_for_a_while() -> None:
    async def story() -> None:
        stage = Stage(growth=replace(GROW, min_interval=30))
        old = await stage.serving()
        long = await stage.submit()
        old.say(NeedsContext(id=long.id, n_tokens=20000))
        new = await turn_over(stage, old)
        assert str(new.launch.pair) == "q8_0:q8_0"
        new.answer(long.id, 1, done=True)
        exact = await stage.submit(MATH)
        assert stage.supervisor.ready
        await stage.pass_time(31)
        last = await turn_over(stage, new)
        assert (last.launch.n_ctx, str(last.launch.pair)) == (16384, "f16:f16")
        assert [g.id for g in last.of_kind(Generate)] == [exact.id]
        await stage.end()

    play(story)


def test_a_long_prompt_with_a_task_is_refused_where_nothing_may_change() -> None:
    """It lacks context, whatever its task: once it made the loop spin."""

    async def story() -> None:
        stage = Stage(growth=replace(GROW, adapt=Adapt.OFF))
        await stage.serving()
        caller = await stage.submit(replace(SPEC, task=Task.CHAT, min_ctx=20000))
        await stage.settle()
        assert isinstance(caller.error, ContextLengthExceeded)
        await stage.end()

    play(story)


def test_an_answer_whose_prompt_fits_no_more_ends_with_what_there_is() -> None:
    async def story() -> None:
        stage = Stage(growth=replace(GROW, adapt=Adapt.OFF))
        worker = await stage.serving()
        caller = await stage.submit(replace(SPEC, max_tokens=None))
        worker.started(caller.id)
        worker.answer(caller.id, 1, 2, 3)
        for _ in range(2):
            worker.say(NeedsContext(id=caller.id, n_tokens=20000))
            await stage.settle()
            await stage.pass_time(1)
        assert caller.done is not None
        assert (caller.done.reason, caller.done.n_generated_tokens) == ("length", 3)
        await stage.end()

    play(story)


def test_a_worker_lost_while_growth_is_planned_does_not_fail_the_request() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        caller = await stage.submit()
        stage.planner.gate.clear()
        old.say(NeedsContext(id=caller.id, n_tokens=20000))
        await stage.settle()
        old.die(-9)
        await stage.settle()
        stage.planner.gate.set()
        await stage.settle()
        assert caller.error is None
        await stage.pass_time(5)
        stage.worker.load()
        await stage.settle()
        new = await turn_over(stage, stage.worker)
        assert [g.id for g in new.of_kind(Generate)] == [caller.id]
        await stage.end()

    play(story)


def test_a_request_that_no_plan_can_hold_does_not_take_others_down() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        old = await stage.serving()
        huge, long = await stage.submit(), await stage.submit()
        stage.planner.longest = 32768
        old.say(NeedsContext(id=huge.id, n_tokens=60000), NeedsContext(id=long.id, n_tokens=20000))
        new = await turn_over(stage, old)
        assert isinstance(huge.error, ContextLengthExceeded)
        assert [g.id for g in new.of_kind(Generate)] == [long.id]
        await stage.end()

    play(story)


def test_planning_that_breaks_down_is_told_and_tried_again() -> None:
    async def story() -> None:
        stage = Stage(growth=GROW)
        await stage.serving()
        stage.planner.error = ZeroDivisionError()
        with pytest.raises(WorkerFailed, match="ZeroDivisionError"):
            await asyncio.wait_for(stage.supervisor.change_context(32768), 5)
        stage.planner.error = None
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await turn_over(stage, stage.worker)
        assert (await change).changed
        await stage.end()

    play(story)
