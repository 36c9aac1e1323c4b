"""What the supervisor tells whoever counts, in stories of its life."""

import asyncio
from typing import Any

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.ipc.messages import Delta, End, Step
from tests.supervisor.stage import Stage, play


class Heard:
    """An observer that remembers: `calls` are (method, *arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.calls.append((name, *given, *named.values()))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def test_a_requests_tokens_are_timed():
    async def story():
        heard = Heard()
        stage = Stage(observer=heard)
        worker = await stage.serving()
        caller = await stage.submit()
        worker.started(caller.id)
        stage.now += 2.0
        worker.say(Step(n_prefilled=3, deltas=(Delta(caller.id, "a", (1,)),)))
        await stage.settle()
        stage.now += 0.5
        worker.say(
            Step(
                deltas=(Delta(caller.id, "bc", (2, 3)),),
                ends=(End(caller.id, "stop", 3, 3, n_cached_tokens=1),),
            )
        )
        await stage.settle()
        assert heard.of("step") == [(3, 1), (0, 2)]
        assert heard.of("first_token") == [(2.0,)]
        assert heard.of("next_tokens") == [(2, 0.5)]
        assert heard.of("answered") == [(3, 1, 0)]
        assert heard.of("ended") == [("stop", 2.5)]
        await stage.end()

    play(story)


@pytest.mark.parametrize(
    ("happens", "outcome"),
    [("cancel", "cancelled"), ("time", "deadline_exceeded"), ("stop", "not_ready")],
)
def test_how_a_request_ended(happens, outcome):
    async def story():
        heard = Heard()
        stage = Stage(observer=heard, request_timeout=60.0)
        worker = await stage.serving()
        caller = await stage.submit()
        worker.started(caller.id)
        await stage.settle()
        if happens == "cancel":
            caller.ticket.cancel()
        elif happens == "time":
            await stage.pass_time(61)
        await stage.settle()
        await stage.end()
        assert [ended[0] for ended in heard.of("ended")] == [outcome]

    play(story)


@pytest.mark.parametrize(("n_cached", "n_again"), [(0, 5), (1, 4), (3, 0)])
def test_tokens_that_a_new_worker_computes_again(n_cached, n_again):
    async def story():
        heard = Heard()
        stage = Stage(observer=heard)
        worker = await stage.serving()
        caller = await stage.submit()
        worker.started(caller.id)
        worker.answer(caller.id, 1, 2)
        await stage.settle()
        worker.die(-9)
        await stage.settle()
        await stage.pass_time(5)
        worker = await stage.serving()
        worker.say(Step(ends=(End(caller.id, "stop", 3, 4, n_cached_tokens=n_cached),)))
        await stage.settle()
        assert heard.of("answered") == [(3, n_cached, n_again)]
        assert heard.of("worker_died") == [("SIGKILL (killed, perhaps for lack of memory)",)]
        await stage.end()

    play(story)


def test_a_reloads_phases_are_timed():
    async def story():
        heard = Heard()
        stage = Stage(observer=heard)
        worker = await stage.serving()
        del heard.calls[:]
        stage.now += 10
        change = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        stage.now += 0.25
        worker.die(0)
        await stage.settle()
        stage.now += 4
        stage.worker.load()
        await stage.settle()
        await change
        left = heard.of("phase_left")
        assert [phase for phase, _ in left] == [
            Phase.SERVING,
            Phase.DRAINING,
            Phase.LEAVING,
            Phase.IDLE,
            Phase.LOADING,
        ]
        assert dict(left)[Phase.LOADING] == 4
        assert dict(left)[Phase.LEAVING] == 0.25
        ((record,),) = heard.of("reloaded")
        assert (record.reason, record.outcome) == ("context", "done")
        await stage.end()

    play(story)
