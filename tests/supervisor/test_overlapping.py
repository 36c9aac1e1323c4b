"""A reload in which both workers live for a while, and every way in which one of them may go."""

import asyncio
import os

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.errors import NotReady
from kvserve.ipc.messages import (
    CarryReport,
    ExportedState,
    LoadFailed,
    Paused,
    ShareCores,
    TakeIn,
    TakenIn,
)
from tests.supervisor.stage import (
    Generate,
    Load,
    Pause,
    Reload,
    Shutdown,
    Stage,
    play,
)

PHASES = ("spawning", "loading", "draining", "handover")


class Overlapped(Reload):
    async def finish(self) -> None:
        """Whatever is left to do by whichever worker is the last."""
        stage = self.stage
        await stage.settle()
        if self.phase is Phase.DRAINING and not self.old.gone:
            self.old.say(Paused())
            await stage.settle()
            self.old.die()
            await stage.settle()
        await self.answered_by_the_last()


async def halted(phase: str, stage: Stage) -> Overlapped:
    stage.planner.beside = 2**30
    old = await stage.serving()
    old.pauses = False
    caller = await stage.submit()
    old.started(caller.id)
    old.answer(caller.id, 1, 2)
    if phase == "spawning":
        stage.gate.clear()
    answer = asyncio.create_task(stage.supervisor.change_context(32768))
    await stage.settle()
    reload = Overlapped(stage, old, caller, answer)
    assert reload.phase is Phase.OVERLAPPING
    if phase in ("draining", "handover"):
        reload.new.load()
        await stage.settle()
        assert reload.phase is Phase.DRAINING
        assert old.of_kind(Pause)
    if phase == "handover":
        old.say(Paused())
        await stage.settle()
        assert reload.phase is Phase.HANDOVER
    return reload


def test_the_next_worker_loads_while_the_present_one_answers() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0, carry_bytes=2**20)
        reload = await halted("loading", stage)
        old, new = reload.old, reload.new
        assert new.of_kind(Load)[0].type_k == "q8_0"
        assert stage.supervisor.ready
        late = await stage.submit()
        assert old.of_kind(Generate)[-1].id == late.id
        assert old.of_kind(Pause) == []
        await stage.pass_time(5)
        new.load()
        await stage.settle()
        assert reload.phase is Phase.DRAINING
        assert old.of_kind(Pause)
        stage.now += 0.25
        file = os.memfd_create("state")
        old.pid = os.getpid()
        old.say(Paused((ExportedState(file, 8, 5),), export_seconds=0.125))
        await stage.settle()
        os.close(file)
        assert reload.phase is Phase.HANDOVER
        assert old.of_kind(Shutdown)
        (told,) = new.of_kind(TakeIn)
        assert (len(told.carried), told.type_k) == (1, "q8_0")
        assert new.of_kind(Generate) == []
        stage.now += 0.375
        new.say(TakenIn(CarryReport(n_sequences=1, n_tokens=5)))
        await stage.settle()
        assert (await reload.answer).changed
        assert [g.id for g in new.of_kind(Generate)] == [reload.caller.id, late.id]
        assert new.of_kind(Generate)[0].resume == (1, 2)
        record = stage.supervisor.status().reloads[-1]
        assert (record.outcome, record.overlapped, record.pause_seconds) == ("done", True, 0.5)
        assert record.n_tokens_carried == 5
        assert len(stage.workers) == 2
        old.die()
        await stage.settle()
        assert stage.supervisor.status().n_worker_deaths == 0
        await stage.end()

    play(story)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dies", [False, True])
def test_the_present_worker_knows_whether_it_shares_the_cores(phase: str, dies: bool) -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0)
        reload = await halted(phase, stage)
        assert [one.shared for one in reload.old.of_kind(ShareCores)] == [True]
        if dies and phase == "spawning":
            stage.spawn_fails = True
        elif dies:
            reload.new.die(-9)
        stage.gate.set()
        await stage.settle()
        stage.spawn_fails = False
        # After the handover began it has stopped, and nothing is to be told to it.
        over = [False] if dies and phase != "handover" else []
        assert [one.shared for one in reload.old.of_kind(ShareCores)] == [True, *over]
        for worker in stage.workers:
            assert worker is reload.old or not worker.of_kind(ShareCores)
        if not dies and phase in ("spawning", "loading"):
            reload.new.load()
        await reload.finish()

    play(story)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", ["old", "new"])
def test_whoever_dies_the_reload_is_done_and_nothing_is_lost(phase: str, who: str) -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0)
        reload = await halted(phase, stage)
        if who == "old":
            reload.old.die(-9)
        elif phase != "spawning":
            reload.new.die(-9)
        else:
            stage.spawn_fails = True
        stage.gate.set()
        await stage.settle()
        stage.spawn_fails = False
        await reload.finish()
        assert (await reload.answer).changed
        status = stage.supervisor.status()
        assert status.plan is not None
        assert status.plan.chosen.launch.n_ctx == 32768
        assert status.reloads[-1].outcome == "done"
        assert reload.caller.text == "t1 t2 t3 "
        assert reload.caller.n_ends == 1
        if who == "new":
            assert not status.reloads[-1].overlapped
            assert status.reloads[-1].detail
        else:
            assert len(stage.workers) == 2
        await stage.end()
        assert all(worker.gone for worker in stage.workers)

    play(story)


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_ends_both_workers(phase: str) -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0)
        reload = await halted(phase, stage)
        stage.gate.set()
        await stage.end()
        assert stage.supervisor.status().phase is Phase.STOPPED
        assert all(worker.gone for worker in stage.workers)
        assert reload.caller.n_ends == 1
        with pytest.raises(NotReady):
            await reload.answer

    play(story)


def test_memory_that_another_takes_meanwhile_puts_the_workers_in_order() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0)
        reload = await halted("loading", stage)
        reload.new.say(LoadFailed("CUDA out of memory", out_of_memory=True))
        await stage.settle()
        assert reload.phase is Phase.DRAINING
        await reload.finish()
        assert (await reload.answer).changed
        record = stage.supervisor.status().reloads[-1]
        assert (record.outcome, record.overlapped) == ("done", False)
        assert record.detail == "CUDA out of memory"
        await stage.end()

    play(story)


@pytest.mark.parametrize("phase", ["loading", "handover"])
def test_a_successor_that_hangs_is_ended(phase: str) -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0, load_timeout=600.0, request_timeout=None, step_timeout=1e6)
        reload = await halted(phase, stage)
        await stage.pass_time(599)
        assert not reload.new.killed
        await stage.pass_time(2)
        assert reload.new.killed
        await reload.finish()
        assert (await reload.answer).changed
        await stage.end()

    play(story)


def test_an_old_worker_that_does_not_leave_after_the_handover_is_killed() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0)
        reload = await halted("handover", stage)
        await reload.finish()
        assert not reload.old.killed
        await stage.pass_time(11)
        assert reload.old.killed
        await stage.end()

    play(story)


def test_a_worker_that_does_not_pause_is_no_fault_of_its_requests() -> None:
    async def story() -> None:
        stage = Stage(drain_timeout=0.0, pause_timeout=1.0)
        reload = await halted("draining", stage)
        await stage.pass_time(60)
        assert reload.old.killed
        await stage.settle()
        assert reload.phase is Phase.SERVING
        reload.new.die(-9)
        await stage.settle()
        stage.worker.load()
        await stage.settle()
        stage.worker.answer(reload.caller.id, 3, done=True)
        await stage.settle()
        assert reload.caller.text == "t1 t2 t3 "
        await stage.end()

    play(story)
