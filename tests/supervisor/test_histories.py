"""Any history of events: nothing raises, every request ends once, every worker ends."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.lifecycle import Phase
from kvserve.errors import KvserveError
from kvserve.ipc.messages import LoadFailed, Paused, TakenIn
from tests.supervisor.stage import Caller, Generate, Stage, play

MOVES = (
    "submit",
    "cancel",
    "load",
    "fail load",
    "out of memory",
    "token",
    "finish",
    "paused",
    "die",
    "trap",
    "grow",
    "shrink",
    "room",
    "no room",
    "taken in",
    "old dies",
    "a second",
    "a minute",
    "an hour",
)


async def _move(stage: Stage, move: str, callers: list[Caller], changes: list[object]) -> None:
    worker = stage.workers[-1] if stage.workers else None
    match move:
        case "submit":
            callers.append(await stage.submit())
        case "cancel" if callers:
            callers.pop(0).ticket.cancel()
        case "grow" | "shrink":
            n_ctx = 32768 if move == "grow" else 8192
            changes.append(asyncio.create_task(stage.supervisor.change_context(n_ctx)))
        case "a second" | "a minute" | "an hour":
            await stage.pass_time({"a second": 1, "a minute": 60, "an hour": 3600}[move])
        case "room" | "no room":
            stage.planner.beside = 2**30 if move == "room" else None
        case "old dies" if len(stage.workers) > 1:
            stage.workers[-2].die(-9)
        case _ if worker is None or worker.gone:
            pass
        case "load":
            worker.load()
        case "fail load" | "out of memory":
            worker.say(LoadFailed(message="no", out_of_memory=move == "out of memory"))
        case "token" | "finish":
            given_to_it = [g.id for g in worker.of_kind(Generate)]
            if given_to_it:
                worker.answer(given_to_it[-1], 1, done=move == "finish")
        case "paused":
            worker.say(Paused())
        case "taken in":
            worker.say(TakenIn())
        case "die":
            worker.die(-9)
        case "trap":
            worker.die(-11)
    await stage.settle()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(MOVES), max_size=40))
def test_every_history_ends_well(moves: list[str]) -> None:
    async def story() -> None:
        stage = Stage()
        callers: list[Caller] = []
        changes: list[asyncio.Task[object]] = []
        kept: list[Caller] = []
        await stage.settle()
        for move in moves:
            await _move(stage, move, callers, changes)  # type: ignore[arg-type]
            kept += [caller for caller in callers if caller not in kept]
            assert not stage.running.done()
        given_up = [caller for caller in kept if caller not in callers]
        await stage.end()
        assert stage.supervisor.status().phase is Phase.STOPPED
        assert all(caller.n_ends == 1 for caller in callers)
        assert all(caller.n_ends <= 1 for caller in given_up)
        assert all(worker.gone for worker in stage.workers)
        for change in changes:
            assert change.done()
            assert change.exception() is None or isinstance(change.exception(), KvserveError)
        if stage.supervisor.first_ready.done():
            stage.supervisor.first_ready.exception()

    play(story)
