"""What a worker copies before its pause: who gets it, what waits for it, and where it stays when
somebody dies."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.errors import NotReady
from kvserve.ipc.messages import (
    CarryReport,
    CopiedAhead,
    CopiedPiece,
    CopyAhead,
    ExportedState,
    LoadFailed,
    Paused,
    TakeAhead,
    TakeIn,
    TakenAhead,
    TakenIn,
    Transcode,
)
from tests.supervisor.stage import Caller, Generate, Load, Pause, Reload, Stage, play

BESIDE = ("copying", "taking ahead", "pausing", "taking in")
IN_ORDER = ("copying", "rewriting", "pausing", "leaving", "loading")


class Files:
    """Memory files that this process plays the worker's part with."""

    def __init__(self) -> None:
        self.mine: list[int] = []

    def make(self, n_tokens: int) -> int:
        self.mine.append(os.memfd_create(f"copying-{n_tokens}"))
        return self.mine[-1]

    def close(self) -> None:
        for descriptor in self.mine:
            os.close(descriptor)
        self.mine.clear()

    @staticmethod
    def n_held() -> int:
        """Those that anybody here has open."""
        held = 0
        for path in Path("/proc/self/fd").iterdir():
            try:
                held += "copying-" in str(path.readlink())
            except FileNotFoundError:
                continue
        return held


@pytest.fixture
def files() -> Iterator[Files]:
    made = Files()
    yield made
    made.close()


class Copied(Reload):
    """A reload whose old worker copies into `files` ahead of its pause."""

    def __init__(self, stage: Stage, files: Files, caller: Caller) -> None:
        answer = asyncio.create_task(stage.supervisor.change_context(32768))
        super().__init__(stage, stage.workers[0], caller, answer)
        self.files = files

    async def copied(self) -> None:
        pieces = tuple(CopiedPiece(self.files.make(n), 8) for n in (2, 4))
        lost = CopiedPiece(self.files.make(3), 8)
        self.old.say(CopiedAhead((pieces, (lost,))))
        self.pieces = pieces
        await self.stage.settle()

    async def paused(self) -> None:
        ahead = tuple(piece.fd for piece in self.pieces)
        rest = ExportedState(self.files.make(5), 8, 5, ahead, 4)
        self.old.say(Paused((rest,), export_seconds=0.125))
        await self.stage.settle()

    async def finish(self) -> None:
        """Whatever is left to do by whoever is left; nothing that was copied is held then."""
        stage = self.stage
        stage.transcode_gate.set()
        await stage.settle()
        if self.old.of_kind(CopyAhead) and not self.old.of_kind(Pause) and not self.old.gone:
            await self.copied()
        if self.phase is Phase.DRAINING and not self.old.gone:
            self.old.say(Paused())
            await stage.settle()
        self.old.die()
        await stage.settle()
        await self.answered_by_the_last()
        assert self.caller.text == "t1 t2 t3 "
        assert self.caller.n_ends == 1
        assert (await self.answer).changed


async def begun(stage: Stage, files: Files, *, beside: bool) -> Copied:
    stage.planner.beside = 2**30 if beside else None
    old = await stage.serving()
    old.pid = os.getpid()
    old.pauses = old.copies = False
    caller = await stage.submit()
    old.started(caller.id)
    old.answer(caller.id, 1, 2)
    stage.transcode_gate.clear()
    reload = Copied(stage, files, caller)
    await stage.settle()
    return reload


async def halted_beside(phase: str, stage: Stage, files: Files) -> Copied:
    reload = await begun(stage, files, beside=True)
    assert not reload.old.of_kind(CopyAhead)
    reload.new.load()
    await stage.settle()
    assert reload.phase is Phase.OVERLAPPING
    assert reload.old.of_kind(CopyAhead)
    if phase == "copying":
        return reload
    await reload.copied()
    (told,) = reload.new.of_kind(TakeAhead)
    assert [len(paths) for paths in told.carried] == [2, 1]
    assert not reload.old.of_kind(Pause)
    if phase == "taking ahead":
        return reload
    reload.new.say(TakenAhead())
    await stage.settle()
    assert reload.phase is Phase.DRAINING
    assert reload.old.of_kind(Pause)
    if phase == "pausing":
        return reload
    await reload.paused()
    assert reload.phase is Phase.HANDOVER
    return reload


async def halted_in_order(phase: str, stage: Stage, files: Files) -> Copied:
    reload = await begun(stage, files, beside=False)
    assert reload.phase is Phase.DRAINING
    assert reload.old.of_kind(CopyAhead)
    if phase == "copying":
        return reload
    await reload.copied()
    (told,) = stage.told_ahead
    assert isinstance(told, Transcode)
    assert told.ahead
    assert [len(paths) for paths in told.carried] == [2, 1]
    assert not reload.old.of_kind(Pause)
    if phase == "rewriting":
        return reload
    stage.transcode_gate.set()
    await stage.settle()
    assert reload.old.of_kind(Pause)
    if phase == "pausing":
        return reload
    await reload.paused()
    assert reload.phase is Phase.LEAVING
    if phase == "leaving":
        return reload
    reload.old.die()
    await stage.settle()
    assert reload.phase is Phase.LOADING
    return reload


def on_stage() -> Stage:
    return Stage(drain_timeout=0.0, carry_bytes=2**20)


async def ended(stage: Stage, files: Files) -> None:
    """The end of a story in which somebody died: soon nobody holds a file."""
    files.close()
    await stage.settle()
    await asyncio.sleep(0.05)
    assert files.n_held() == 0
    await stage.end()


def test_beside_the_old_worker_only_the_rest_is_taken_in_the_pause(files: Files) -> None:
    async def story() -> None:
        stage = on_stage()
        reload = await halted_beside("taking in", stage, files)
        (ahead,) = reload.new.of_kind(TakeAhead)
        (rest,) = reload.new.of_kind(TakeIn)
        assert rest.carried[0][:2] == ahead.carried[0]
        assert len(rest.carried[0]) == 3
        assert len(rest.carried) == 1
        reload.new.say(TakenIn(CarryReport(n_sequences=1, n_tokens=5, n_tokens_ahead=4)))
        await reload.finish()
        record = stage.supervisor.status().reloads[-1]
        assert record.carry is not None
        assert (record.carry.n_tokens_ahead, record.carry.export_seconds) == (4, 0.125)
        files.close()
        assert files.n_held() == 0
        await stage.end()

    play(story)


def test_in_order_the_process_rewrites_before_the_pause(files: Files) -> None:
    async def story() -> None:
        stage = on_stage()
        reload = await halted_in_order("loading", stage, files)
        ahead, rest = stage.told_ahead
        assert isinstance(ahead, Transcode)
        assert isinstance(rest, Transcode)
        assert not rest.ahead
        assert rest.carried[0][:2] == ahead.carried[0]
        (load,) = reload.new.of_kind(Load)
        assert load.carried == rest.carried
        await reload.finish()
        files.close()
        assert files.n_held() == 0
        await stage.end()

    play(story)


@pytest.mark.parametrize("phase", BESIDE)
@pytest.mark.parametrize("who", ["old", "new"])
def test_whoever_dies_beside_the_other_nothing_is_lost_or_left(
    files: Files, phase: str, who: str
) -> None:
    async def story() -> None:
        stage = on_stage()
        reload = await halted_beside(phase, stage, files)
        (reload.old if who == "old" else reload.new).die(-9)
        await stage.settle()
        if who == "new" and phase == "taking in":
            (load,) = stage.worker.of_kind(Load)
            assert len(load.carried[0]) == 3
        if who == "old" and phase in ("taking ahead", "pausing"):
            assert reload.new.of_kind(TakeIn) == [TakeIn((), "q8_0", "q8_0")]
            first = [type(one) for one in reload.new.sent if isinstance(one, TakeIn | Generate)]
            assert first[0] is TakeIn
        await reload.finish()
        assert len(reload.old.of_kind(CopyAhead)) == 1
        await ended(stage, files)

    play(story)


@pytest.mark.parametrize("phase", IN_ORDER)
def test_a_worker_that_dies_before_its_next_one_is_there_loses_nothing(
    files: Files, phase: str
) -> None:
    async def story() -> None:
        stage = on_stage()
        reload = await halted_in_order(phase, stage, files)
        (stage.worker if phase == "loading" else reload.old).die(-9)
        await stage.settle()
        if phase in ("copying", "rewriting", "pausing"):
            (load,) = stage.worker.of_kind(Load)
            assert load.carried == ()
        if stage.supervisor.status().phase is Phase.IDLE:
            await stage.pass_time(10)
        await reload.finish() if phase != "loading" else await rolled_back(reload)
        await ended(stage, files)

    play(story)


async def rolled_back(reload: Reload) -> None:
    """The next worker died while it loaded: the context of before is loaded again."""
    stage = reload.stage
    stage.worker.load()
    await stage.settle()
    stage.worker.answer(reload.caller.id, 3, done=True)
    await stage.settle()
    assert reload.caller.text == "t1 t2 t3 "
    with pytest.raises(Exception, match="went back"):
        await reload.answer


@pytest.mark.parametrize(
    ("phase", "beside"),
    [(phase, True) for phase in BESIDE] + [(phase, False) for phase in IN_ORDER],
)
def test_a_stop_leaves_nothing(files: Files, phase: str, beside: bool) -> None:
    async def story() -> None:
        stage = on_stage()
        halted = halted_beside if beside else halted_in_order
        reload = await halted(phase, stage, files)
        await stage.end()
        with pytest.raises(NotReady):
            await reload.answer
        files.close()
        await asyncio.sleep(0.05)
        assert files.n_held() == 0

    play(story)


@pytest.mark.parametrize("beside", [True, False])
def test_the_pause_does_not_wait_for_ever(files: Files, beside: bool) -> None:
    async def story() -> None:
        stage = on_stage()
        halted = halted_beside if beside else halted_in_order
        reload = await halted("copying", stage, files)
        await stage.pass_time(9)
        assert not reload.old.of_kind(Pause)
        await stage.pass_time(2)
        assert reload.old.of_kind(Pause)
        # The answer comes after all: what the export refers to is held.
        await reload.copied()
        assert stage.told_ahead == []
        await reload.paused()
        told = reload.new.of_kind(TakeIn)[0] if beside else stage.told_ahead[0]
        assert isinstance(told, TakeIn | Transcode)
        assert len(told.carried[0]) == 3
        await reload.finish()
        await stage.end()

    play(story)


def test_a_next_worker_without_room_leaves_the_copies_to_the_one_after_it(files: Files) -> None:
    async def story() -> None:
        stage = on_stage()
        reload = await halted_beside("taking ahead", stage, files)
        reload.new.say(LoadFailed("CUDA out of memory", out_of_memory=True))
        await stage.settle()
        assert reload.phase is Phase.DRAINING
        (told,) = stage.told_ahead
        assert isinstance(told, Transcode)
        assert len(told.carried) == 2
        assert len(reload.old.of_kind(CopyAhead)) == 1
        await reload.finish()
        await stage.end()

    play(story)


def test_where_nobody_would_notice_the_pause_comes_at_once(files: Files) -> None:
    async def story() -> None:
        stage = on_stage()
        old = await stage.serving()
        answer = asyncio.create_task(stage.supervisor.change_context(32768))
        await stage.settle()
        assert old.of_kind(CopyAhead) == []
        assert old.of_kind(Pause)
        old.die()
        await stage.settle()
        stage.worker.load()
        await stage.settle()
        assert (await answer).changed
        await stage.end()

    play(story)
