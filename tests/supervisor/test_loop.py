"""Histories of events and what the supervisor makes of them. No process, no real time."""

import asyncio

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    DoesNotFit,
    InvalidRequest,
    NotReady,
    Overloaded,
    ReloadInProgress,
    WorkerFailed,
)
from kvserve.ipc.messages import Failed, LoadFailed, NeedsContext, Paused, Progress
from tests.supervisor.stage import (
    Cancel,
    Generate,
    Load,
    Pause,
    Shutdown,
    Stage,
    plan_for,
    play,
)


def test_a_start_loads_and_answers_what_waited() -> None:
    async def story() -> None:
        stage = Stage()
        early = await stage.submit()
        assert stage.supervisor.status().phase is Phase.LOADING
        assert stage.worker.of_kind(Generate) == []
        load = stage.worker.of_kind(Load)[0]
        assert (load.type_k, load.n_ctx, load.extra_buffers) == ("f16", 16384, True)
        stage.worker.say(Progress(fraction=0.5))
        await stage.settle()
        assert stage.supervisor.status().load_fraction == 0.5
        worker = await stage.serving()
        assert stage.supervisor.first_ready.done()
        assert [g.id for g in worker.of_kind(Generate)] == [early.id]
        worker.started(early.id)
        worker.answer(early.id, 1, 2)
        worker.answer(early.id, 3, done=True)
        await stage.settle()
        assert early.text == "t1 t2 t3 "
        assert early.served[0].cache_type == "f16:f16"
        assert early.served[0].n_ctx == 16384
        assert early.done is not None
        assert early.done.reason == "stop"
        status = stage.supervisor.status()
        assert (status.n_answered, status.n_running, status.n_waiting) == (1, 0, 0)
        await stage.end()
        assert early.n_ends == 1

    play(story)


def test_the_worker_gets_twice_its_places_and_the_rest_waits_in_order() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        callers = [await stage.submit() for _ in range(10)]
        assert [g.id for g in worker.of_kind(Generate)] == [c.id for c in callers[:8]]
        worker.answer(callers[3].id, 1, done=True)
        await stage.settle()
        assert worker.of_kind(Generate)[-1].id == callers[8].id
        await stage.end()
        assert all(caller.n_ends == 1 for caller in callers)

    play(story)


def test_a_reload_drains_restarts_and_goes_on() -> None:
    async def story() -> None:
        stage = Stage()
        old = await stage.serving()
        running = await stage.submit()
        old.started(running.id)
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        assert stage.supervisor.status().phase is Phase.DRAINING
        assert not stage.supervisor.ready
        late = await stage.submit()
        assert len(old.of_kind(Generate)) == 1
        old.answer(running.id, 1, done=True)
        await stage.settle()
        assert running.done is not None
        assert old.of_kind(Shutdown)
        assert stage.supervisor.status().phase is Phase.LEAVING
        old.die()
        await stage.settle()
        new = stage.worker
        assert new is not old
        assert new.of_kind(Load)[0].type_k == "q8_0"
        new.load()
        await stage.settle()
        outcome = await change
        assert outcome.changed
        assert str(outcome.plan.chosen.launch.pair) == "q8_0:q8_0"
        assert [g.id for g in new.of_kind(Generate)] == [late.id]
        # The plan was made with what the old worker gives back.
        assert stage.planner.returning == [1000]
        record = stage.supervisor.status().reloads[-1]
        assert (record.outcome, record.from_cache_type, record.to_cache_type) == (
            "done",
            "f16:f16",
            "q8_0:q8_0",
        )
        await stage.end()

    play(story)


def test_a_request_that_outlasts_the_drain_goes_on_with_the_next_worker() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=30.0)
        old = await stage.serving()
        old.pauses = False
        caller = await stage.submit()
        old.started(caller.id)
        old.answer(caller.id, 1, 2)
        await stage.settle()
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        await stage.pass_time(29)
        assert old.of_kind(Pause) == []
        await stage.pass_time(2)
        assert len(old.of_kind(Pause)) == 1
        old.answer(caller.id, 3)
        old.say(Paused())
        await stage.settle()
        old.die()
        await stage.settle()
        stage.worker.load()
        await stage.settle()
        await change
        resumed = stage.worker.of_kind(Generate)[0]
        assert resumed.resume == (1, 2, 3)
        stage.worker.started(caller.id)
        stage.worker.answer(caller.id, 4, done=True)
        await stage.settle()
        assert caller.text == "t1 t2 t3 t4 "
        assert len(caller.served) == 1
        await stage.end()

    play(story)


def test_a_pause_waits_until_the_next_process_is_ready_or_for_so_long() -> None:
    async def story(ready: bool) -> None:
        stage = Stage(drain_timeout=0.0)
        old = await stage.serving()
        await stage.submit()
        stage.ahead_gate.clear()
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        await stage.pass_time(9)
        assert old.of_kind(Pause) == []
        if ready:
            stage.ahead_gate.set()
            await stage.settle()
        else:
            await stage.pass_time(2)
        assert len(old.of_kind(Pause)) == 1
        stage.ahead_gate.set()
        await stage.end()
        with pytest.raises(NotReady):
            await change

    for ready in (True, False):
        play(lambda ready=ready: story(ready))  # type: ignore[misc]


def test_a_worker_that_does_not_pause_is_killed_and_its_requests_go_on() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=1.0)
        old = await stage.serving()
        old.pauses = False
        caller = await stage.submit()
        old.answer(caller.id, 1)
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        await stage.pass_time(2)
        await stage.pass_time(11)
        assert old.killed
        stage.worker.load()
        await stage.settle()
        assert (await change).changed
        assert stage.worker.of_kind(Generate)[0].resume == (1,)
        await stage.end()

    play(story)


def test_a_plan_that_stays_is_answered_at_once() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.serving()
        outcome = await stage.supervisor.change_context(16384)
        assert not outcome.changed
        assert len(stage.workers) == 1
        await stage.end()

    play(story)


def test_a_change_that_does_not_fit_changes_nothing() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.serving()
        stage.planner.error = DoesNotFit("no", needed_bytes=2, free_bytes=1)
        with pytest.raises(DoesNotFit):
            await stage.supervisor.change_context(131072)
        assert stage.supervisor.ready
        await stage.end()

    play(story)


def test_one_change_at_a_time() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        await stage.submit()
        first = asyncio.create_task(stage.supervisor.change_context(32768))
        second = asyncio.create_task(stage.supervisor.change_context(8192))
        await stage.settle()
        with pytest.raises(ReloadInProgress):
            await second
        worker.die(-9)
        await stage.settle()
        with pytest.raises(NotReady):
            await stage.supervisor.change_context(8192)
        stage.worker.load()
        await stage.settle()
        assert (await first).changed
        await stage.end()

    play(story)


def test_a_reload_that_cannot_load_goes_back_to_the_plan_before() -> None:
    async def story() -> None:
        stage = Stage()
        old = await stage.serving()
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        old.die()
        await stage.settle()
        stage.worker.say(LoadFailed(message="CUDA out of memory", out_of_memory=True))
        await stage.settle()
        back = stage.worker
        assert len(stage.workers) == 3
        assert back.launch.n_ctx == 16384
        waiting = await stage.submit()
        back.load()
        await stage.settle()
        with pytest.raises(WorkerFailed, match=r"out of memory; went back to f16:f16 at 16384"):
            await change
        assert stage.supervisor.ready
        assert stage.supervisor.status().reloads[-1].outcome == "rolled_back"
        assert back.of_kind(Generate)[0].id == waiting.id
        await stage.end()

    play(story)


def test_a_dead_worker_is_replaced_and_its_requests_go_on() -> None:
    async def story() -> None:
        stage = Stage()
        first = await stage.serving()
        caller = await stage.submit()
        first.started(caller.id)
        first.answer(caller.id, 1, 2)
        first.die(-11)
        await stage.settle()
        second = await stage.serving()
        assert second is not first
        assert second.of_kind(Generate)[0].resume == (1, 2)
        second.answer(caller.id, 3, done=True)
        await stage.settle()
        assert caller.text == "t1 t2 t3 "
        assert stage.supervisor.status().n_worker_deaths == 1
        await stage.end()

    play(story)


def test_a_request_that_kills_two_workers_is_not_given_a_third() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        poison = await stage.submit()
        worker.die(-11)
        worker = await stage.serving()
        worker.die(-11)
        await stage.settle()
        assert isinstance(poison.error, WorkerFailed)
        await stage.pass_time(1)
        worker = await stage.serving()
        assert worker.of_kind(Generate) == []
        await stage.end()
        assert poison.n_ends == 1

    play(story)


@pytest.mark.parametrize("returncode", [-4, -11])
def test_a_trap_while_loading_is_tried_once_without_repacked_weights(returncode: int) -> None:
    async def story() -> None:
        stage = Stage()
        await stage.settle()
        stage.worker.die(returncode)
        await stage.settle()
        assert stage.worker.of_kind(Load)[0].extra_buffers is False
        stage.worker.die(returncode, "illegal instruction")
        await stage.settle()
        with pytest.raises(WorkerFailed, match="illegal instruction"):
            await stage.supervisor.first_ready
        assert len(stage.workers) == 2
        await stage.end()

    play(story)


def test_without_repacked_weights_it_stays_through_a_reload() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.settle()
        stage.worker.die(-4)
        old = await stage.serving()
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        old.die()
        await stage.serving()
        assert stage.worker.of_kind(Load)[0].extra_buffers is False
        await change
        await stage.end()

    play(story)


def test_out_of_memory_at_the_first_load_plans_again_with_more_in_reserve() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.settle()
        for n in (1, 2, 3):
            stage.worker.say(LoadFailed(message="out of memory", out_of_memory=True))
            await stage.settle()
            assert stage.planner.out_of_memory[-1] == n
        stage.worker.say(LoadFailed(message="out of memory", out_of_memory=True))
        await stage.settle()
        with pytest.raises(WorkerFailed, match="out of memory"):
            await stage.supervisor.first_ready
        await stage.end()

    play(story)


def test_a_first_load_that_fails_is_not_tried_again() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.settle()
        waiting = await stage.submit()
        stage.worker.say(LoadFailed(message="bad tensor"))
        await stage.settle()
        with pytest.raises(WorkerFailed, match="bad tensor"):
            await stage.supervisor.first_ready
        assert len(stage.workers) == 1
        assert isinstance(waiting.error, WorkerFailed)
        await stage.end()

    play(story)


def test_deaths_in_a_row_are_answered_ever_later_and_then_with_a_pause() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.serving()
        for delay in (0.0, 1.0, 2.0, 4.0):
            stage.worker.die(-9)
            await stage.settle()
            if delay:
                await stage.pass_time(delay - 0.1)
                assert stage.supervisor.status().phase is Phase.IDLE
                await stage.pass_time(0.2)
            await stage.serving()
        stage.worker.die(-9)
        await stage.settle()
        status = stage.supervisor.status()
        assert status.phase is Phase.FAILED
        assert status.retry_at == pytest.approx(stage.now + 60)
        refused = await stage.submit()
        assert isinstance(refused.error, NotReady)
        assert refused.error.retry_after == pytest.approx(60)
        await stage.pass_time(61)
        await stage.serving()
        await stage.end()

    play(story)


def test_a_smaller_context_can_be_asked_for_after_a_failure() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.serving()
        for _ in range(5):
            stage.worker.die(-9)
            await stage.settle()
            await stage.pass_time(30)
            if stage.supervisor.status().phase is Phase.LOADING:
                await stage.serving()
        assert stage.supervisor.status().phase is Phase.FAILED
        change = asyncio.create_task(stage.supervisor.change_context(8192))
        await stage.settle()
        await stage.serving()
        assert (await change).plan.chosen.launch.n_ctx == 8192
        await stage.end()

    play(story)


def test_memory_that_went_missing_is_planned_around() -> None:
    async def story() -> None:
        stage = Stage(first=plan_for(32768))
        await stage.serving()
        stage.planner.room = False
        stage.planner.vram_gib = 6.4
        stage.worker.die(-9)
        await stage.settle()
        assert str(stage.worker.launch.pair) == "q4_0:q4_0"
        stage.planner.room = True
        await stage.serving()
        await stage.end()

    play(story)


def test_a_silent_worker_with_work_is_killed_and_an_idle_one_is_not() -> None:
    async def story() -> None:
        stage = Stage(step_timeout=120.0, request_timeout=None)
        worker = await stage.serving()
        await stage.pass_time(10_000)
        assert not worker.killed
        caller = await stage.submit()
        await stage.pass_time(100)
        worker.answer(caller.id, 1)
        await stage.settle()
        await stage.pass_time(119)
        assert not worker.killed
        await stage.pass_time(2)
        assert worker.killed
        await stage.serving()
        assert stage.worker.of_kind(Generate)[0].resume == (1,)
        await stage.end()

    play(story)


def test_a_load_that_hangs_is_ended() -> None:
    async def story() -> None:
        stage = Stage(load_timeout=600.0)
        await stage.settle()
        await stage.pass_time(599)
        stage.worker.say(Progress(fraction=0.9))
        await stage.settle()
        await stage.pass_time(599)
        assert not stage.worker.killed
        await stage.pass_time(2)
        assert stage.worker.killed
        with pytest.raises(WorkerFailed, match="silent for 601 s"):
            await stage.supervisor.first_ready
        await stage.end()

    play(story)


def test_given_up_requests_leave_their_place() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        callers = [await stage.submit() for _ in range(10)]
        callers[9].ticket.cancel()
        callers[0].ticket.cancel()
        callers[0].ticket.cancel()
        await stage.settle()
        assert [c.id for c in worker.of_kind(Cancel)] == [callers[0].id]
        assert worker.of_kind(Generate)[-1].id == callers[8].id
        status = stage.supervisor.status()
        assert (status.n_running, status.n_waiting) == (4, 4)
        worker.answer(callers[0].id, 1)
        await stage.settle()
        assert callers[0].text == ""
        await stage.end()

    play(story)


def test_a_full_line_refuses_and_time_that_is_up_fails() -> None:
    async def story() -> None:
        stage = Stage(queue_limit=2, request_timeout=60.0)
        await stage.settle()
        callers = [await stage.submit() for _ in range(3)]
        assert isinstance(callers[2].error, Overloaded)
        assert callers[2].error.retry_after
        worker = await stage.serving()
        await stage.pass_time(59)
        assert callers[0].error is None
        await stage.pass_time(2)
        assert isinstance(callers[0].error, DeadlineExceeded)
        assert {c.id for c in worker.of_kind(Cancel)} == {callers[0].id, callers[1].id}
        await stage.end()
        assert [caller.n_ends for caller in callers] == [1, 1, 1]

    play(story)


def test_places_and_the_line_are_told_and_limited_as_they_are() -> None:
    async def story() -> None:
        stage = Stage(queue_limit=5)
        await stage.serving()
        callers = [await stage.submit() for _ in range(10)]
        assert [caller.error is None for caller in callers] == [True] * 9 + [False]
        status = stage.supervisor.status()
        assert (status.n_running, status.n_waiting) == (4, 5)
        await stage.end()

    play(story)


def test_what_the_worker_refuses_reaches_the_caller_in_its_own_class() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        long, bad = await stage.submit(), await stage.submit()
        worker.say(
            NeedsContext(id=long.id, n_tokens=20000),
            Failed(id=bad.id, code="invalid_request", message="token 9 is unknown", param="prompt"),
        )
        await stage.settle()
        assert isinstance(long.error, ContextLengthExceeded)
        assert "maximum context length is 16384 tokens" in long.error.message
        assert "kvserve reload --ctx 20257" in long.error.message
        assert isinstance(bad.error, InvalidRequest)
        assert bad.error.param == "prompt"
        await stage.end()

    play(story)


def test_a_stop_lets_running_requests_finish_and_refuses_others() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        running = await stage.submit()
        stopping = asyncio.create_task(stage.supervisor.stop())
        await stage.settle()
        late = await stage.submit()
        assert isinstance(late.error, NotReady)
        assert worker.of_kind(Shutdown) == []
        worker.answer(running.id, 1, done=True)
        await stage.settle()
        assert running.done is not None
        assert worker.of_kind(Shutdown)
        worker.die()
        await stopping
        await stage.running
        assert stage.supervisor.status().phase is Phase.STOPPED

    play(story)


def test_a_stop_ends_what_does_not_finish() -> None:
    async def story() -> None:
        stage = Stage()
        worker = await stage.serving()
        running = await stage.submit()
        stopping = asyncio.create_task(stage.supervisor.stop())
        await stage.settle()
        await stage.pass_time(5.1)
        assert isinstance(running.error, NotReady)
        assert worker.of_kind(Shutdown)
        assert not worker.killed
        await stage.pass_time(3)
        assert worker.killed
        await stopping
        await stage.running

    play(story)


@pytest.mark.parametrize("moment", ["loading", "draining", "leaving", "failed", "waiting"])
def test_a_stop_ends_at_any_moment(moment: str) -> None:
    async def story() -> None:
        stage = Stage()
        if moment == "loading":
            await stage.settle()
        else:
            worker = await stage.serving()
        if moment in ("draining", "leaving"):
            caller = await stage.submit()
            change = asyncio.create_task(stage.supervisor.change_context(32768))
            await stage.settle()
            if moment == "leaving":
                worker.answer(caller.id, 1, done=True)
                await stage.settle()
        if moment == "failed":
            for _ in range(5):
                stage.worker.die(-9)
                await stage.settle()
                await stage.pass_time(30)
                if stage.supervisor.status().phase is Phase.LOADING:
                    await stage.serving()
        if moment == "waiting":
            for _ in range(2):
                stage.worker.die(-9)
                await stage.settle()
                if stage.supervisor.status().phase is Phase.LOADING:
                    await stage.serving()
            assert stage.supervisor.status().phase is Phase.IDLE
        await stage.end()
        assert stage.supervisor.status().phase is Phase.STOPPED
        if moment in ("draining", "leaving"):
            with pytest.raises(NotReady):
                await change

    play(story)


def test_whoever_comes_after_the_end_is_answered_at_once() -> None:
    async def story() -> None:
        stage = Stage()
        await stage.serving()
        await stage.end()
        caller = await stage.submit()
        assert isinstance(caller.error, NotReady)
        with pytest.raises(NotReady):
            await stage.supervisor.change_context(8192)

    play(story)
