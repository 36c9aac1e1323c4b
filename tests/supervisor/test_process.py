"""The supervisor with real processes: the scripted worker, dying and hanging at every point."""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.core.machine import Backend
from kvserve.errors import KvserveError, WorkerFailed
from kvserve.ipc.messages import Awake, Hello, LoadFailed, Sampling, TextPrompt
from kvserve.supervisor.admission import Done, GenerationSpec, Text
from kvserve.supervisor.launching import Policy
from kvserve.supervisor.loop import Supervisor
from kvserve.supervisor.process import ProcessSpawner
from tests.supervisor.stage import FakePlanner, plan_for, play

SPEC = GenerationSpec(TextPrompt("one two three"), Sampling(), max_tokens=24)
WHOLE = "".join(f"w{i} " for i in range(24))


class Troupe:
    """A supervisor whose workers are scripted processes."""

    def __init__(self, folder: Path, policy: dict[str, Any], script: dict[str, Any]) -> None:
        argv = (sys.executable, "-m", "kvserve.worker.fake", "--script", json.dumps(script))
        self.log = folder / "worker.log"
        self.planner = FakePlanner()
        self.supervisor = Supervisor(
            plan_for(16384),
            replace(Policy("/m.gguf", "identity", n_threads=1), **policy),
            ProcessSpawner(self.log, argv),
            self.planner,
        )
        self.running = asyncio.create_task(self.supervisor.run())

    async def __aenter__(self) -> Supervisor:
        return self.supervisor

    async def __aexit__(self, *exc_info: object) -> None:
        pid = self.supervisor.status().worker_pid
        await self.supervisor.stop()
        await self.running
        assert self.supervisor.status().phase is Phase.STOPPED
        if pid is not None:
            with pytest.raises(ProcessLookupError):
                os.killpg(pid, 0)


def test_the_workers_words_are_for_the_user_alone(tmp_path):
    async def story():
        troupe = Troupe(tmp_path, {}, {})
        async with troupe as supervisor:
            await supervisor.first_ready
            assert troupe.log.stat().st_mode & 0o777 == 0o600

    play(story)


async def ask(supervisor: Supervisor, began: asyncio.Event | None = None) -> str:
    text = ""
    async with supervisor.submit(SPEC) as ticket:
        async for event in ticket:
            match event:
                case Text():
                    text += event.text
                    if began is not None:
                        began.set()
                case Done():
                    text += f"|{event.reason}"
    return text


def n_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_answers_come_whole_and_a_stop_leaves_no_process(tmp_path: Path) -> None:
    async def story() -> None:
        async with Troupe(tmp_path, {}, {}) as supervisor:
            answers = await asyncio.gather(*(ask(supervisor) for _ in range(20)))
            assert answers == [WHOLE + "|length"] * 20

    play(story)


def test_a_reload_in_the_middle_of_answers_changes_nothing_in_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with Troupe(tmp_path, {"drain_timeout": 0.05}, {"step_ms": 5}) as supervisor:
            await supervisor.first_ready
            began = asyncio.Event()
            asking = [asyncio.create_task(ask(supervisor, began)) for _ in range(12)]
            await began.wait()
            outcome = await supervisor.change_context(32768)
            assert outcome.changed
            assert await asyncio.gather(*asking) == [WHOLE + "|length"] * 12
            assert supervisor.status().n_worker_deaths == 0

    play(story)


def test_what_ran_is_handed_to_the_next_worker_and_nothing_stays_open(tmp_path: Path) -> None:
    async def story() -> None:
        # From f16 to q8_0: 32 of 49 bytes are the exported files', the rest the transcoded ones'.
        policy = {"drain_timeout": 0.0, "carry_bytes": 8 * 8}
        # The pause waits for the next process: the answers must last longer than its start.
        async with Troupe(tmp_path, policy, {"step_ms": 80}) as supervisor:
            await supervisor.first_ready
            before = n_open_files()
            began = asyncio.Event()
            asking = [asyncio.create_task(ask(supervisor, began)) for _ in range(8)]
            await began.wait()
            await supervisor.change_context(32768)
            assert await asyncio.gather(*asking) == [WHOLE + "|length"] * 8
            carry = supervisor.status().reloads[-1].carry
            assert carry is not None
            # Five files: two of the three sequences were copied ahead, and have one more each.
            assert carry.n_sequences == 3
            assert carry.n_tokens_ahead >= 2 * 3
            assert carry.n_tokens >= carry.n_tokens_ahead + 3
            assert n_open_files() == before

    play(story)


@pytest.mark.parametrize(
    ("point", "beside"),
    [
        ("copy", False),
        ("copied", False),
        ("transcode", False),
        ("copy", True),
        ("copied", True),
        ("take_ahead", True),
        ("take_in", True),
    ],
)
def test_a_worker_killed_while_copies_are_under_way_is_not_noticed(
    point: str, beside: bool, tmp_path: Path
) -> None:
    script = {"die_at": point, "die_once_file": str(tmp_path / "died"), "step_ms": 80}

    async def story() -> None:
        policy = {"drain_timeout": 0.0, "carry_bytes": 2**20}
        troupe = Troupe(tmp_path, policy, script)
        troupe.planner.beside = 2**20 if beside else None
        async with troupe as supervisor:
            await supervisor.first_ready
            before = n_open_files()
            began = asyncio.Event()
            asking = [asyncio.create_task(ask(supervisor, began)) for _ in range(4)]
            await began.wait()
            assert (await supervisor.change_context(32768)).changed
            assert await asyncio.gather(*asking) == [WHOLE + "|length"] * 4
            assert (tmp_path / "died").exists()
            async with asyncio.timeout(20):
                while n_open_files() > before:  # noqa: ASYNC110 - the kernel closes them
                    await asyncio.sleep(0.01)

    play(story)


@pytest.mark.parametrize("point", ["loaded", "first_step", "step:7"])
@pytest.mark.parametrize("number", [9, 11])
def test_a_worker_that_dies_once_is_not_noticed_by_callers(
    point: str, number: int, tmp_path: Path
) -> None:
    script = {"die_at": point, "signal": number, "die_once_file": str(tmp_path / "died")}

    async def story() -> None:
        async with Troupe(tmp_path, {}, script) as supervisor:
            asking = [asyncio.create_task(ask(supervisor)) for _ in range(6)]
            assert await asyncio.gather(*asking) == [WHOLE + "|length"] * 6
            assert supervisor.status().n_worker_deaths == 1

    play(story)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"die_at": "hello"}, "SIGKILL"),
        ({"die_at": "load"}, "SIGKILL"),
        ({"die_at": "load", "signal": 11}, "SIGSEGV"),
        ({"fail_load": "tensor blk.0 has the wrong shape"}, "wrong shape"),
        ({"oom_load": True}, "could not be loaded"),
        ({"garbage_at": "load"}, "while loading"),
        ({"hang_at": "load"}, "while loading"),
        ({"hang_at": "hello"}, "while loading"),
    ],
)
def test_a_first_load_that_fails_says_why(
    script: dict[str, Any], words: str, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Troupe(tmp_path, {"load_timeout": 1.0}, script) as supervisor:
            waiting = asyncio.create_task(ask(supervisor))
            with pytest.raises(WorkerFailed, match=words):
                await supervisor.first_ready
            with pytest.raises(KvserveError):
                await waiting

    play(story)


def test_a_trap_is_mended_by_loading_without_repacked_weights(tmp_path: Path) -> None:
    async def story() -> None:
        script = {"die_unless_no_extra_buffers": True}
        async with Troupe(tmp_path, {}, script) as supervisor:
            assert await ask(supervisor) == WHOLE + "|length"

    play(story)


@pytest.mark.parametrize("script", [{"hang_at": "first_step"}, {"garbage_at": "first_step"}])
def test_a_worker_gone_mad_is_replaced_and_a_request_that_maddens_two_fails(
    script: dict[str, Any], tmp_path: Path
) -> None:
    async def story() -> None:
        async with Troupe(tmp_path, {"step_timeout": 0.5}, script) as supervisor:
            with pytest.raises(WorkerFailed, match="died"):
                await ask(supervisor)
            assert supervisor.status().n_worker_deaths == 2

    play(story)


def test_a_worker_that_ignores_the_pause_is_killed(tmp_path: Path) -> None:
    async def story() -> None:
        policy = {"drain_timeout": 0.0, "pause_timeout": 0.3}
        async with Troupe(tmp_path, policy, {"step_ms": 40, "ignore_pause": True}) as supervisor:
            await supervisor.first_ready
            began = asyncio.Event()
            asking = asyncio.create_task(ask(supervisor, began))
            await began.wait()
            assert (await supervisor.change_context(32768)).changed
            assert await asking == WHOLE + "|length"

    play(story)


def test_a_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    async def story() -> None:
        spawner = ProcessSpawner(tmp_path / "log", ("/nowhere/worker",))
        with pytest.raises(WorkerFailed, match="could be started"):
            await spawner.spawn(plan_for(8192).chosen.launch)

    play(story)


def children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_a_worker_started_ahead_is_the_next_one_and_none_is_left_behind(tmp_path: Path) -> None:
    argv = (sys.executable, "-m", "kvserve.worker.fake", "--script", "{}")
    cpu = plan_for(8192).chosen.launch
    gpu = replace(cpu, backend=Backend.CUDA)
    cpu = replace(cpu, backend=Backend.CPU)

    async def story() -> None:
        spawner = ProcessSpawner(tmp_path / "log", argv)
        await spawner.spawn_ahead(cpu)
        await spawner.spawn_ahead(cpu)
        worker = await spawner.spawn(cpu)
        other = await spawner.spawn(cpu)
        assert worker.pid != other.pid
        await spawner.spawn_ahead(cpu)
        elsewhere = await spawner.spawn(gpu)
        await spawner.spawn_ahead(gpu)
        before = children()
        await spawner.close()
        (left,) = before - children()
        assert left not in (worker.pid, other.pid, elsewhere.pid)
        for one in (worker, other, elsewhere):
            one.kill()
            await one.wait()

    play(story)


def test_a_worker_that_died_ahead_is_replaced(tmp_path: Path) -> None:
    script = {"die_at": "hello", "die_once_file": str(tmp_path / "died")}
    argv = (sys.executable, "-m", "kvserve.worker.fake", "--script", json.dumps(script))
    launch = plan_for(8192).chosen.launch

    async def story() -> None:
        spawner = ProcessSpawner(tmp_path / "log", argv)
        await spawner.spawn_ahead(launch)
        async with asyncio.timeout(20):
            while not (tmp_path / "died").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        worker = await spawner.spawn(launch)
        assert isinstance(await worker.receive(), Awake)
        assert isinstance(await worker.receive(), Hello)
        worker.kill()
        await worker.wait()

    play(story)


REFUSES = """
import argparse, socket, time
from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import LoadFailed
parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
fd = parser.parse_known_args()[0].fd
WorkerChannel(socket.socket(fileno=fd)).send(LoadFailed("not that version"))
time.sleep(60)
"""


def test_a_refusal_of_a_worker_started_ahead_is_heard(tmp_path: Path) -> None:
    launch = plan_for(8192).chosen.launch

    async def story() -> None:
        spawner = ProcessSpawner(tmp_path / "log", (sys.executable, "-c", REFUSES))
        await spawner.spawn_ahead(launch)
        worker = await spawner.spawn(launch)
        assert await worker.receive() == LoadFailed("not that version")
        worker.kill()
        await worker.wait()

    play(story)


def test_a_request_that_got_on_is_given_to_another_worker_again(tmp_path: Path) -> None:
    script = {"die_at": "step:9"}

    async def story() -> None:
        async with Troupe(tmp_path, {}, script) as supervisor:
            assert await ask(supervisor) == WHOLE + "|length"
            assert supervisor.status().n_worker_deaths == 2

    play(story)


def test_a_hanging_worker_is_said_to_have_hung(tmp_path: Path) -> None:
    async def story() -> None:
        async with Troupe(tmp_path, {"step_timeout": 0.5}, {"hang_at": "first_step"}) as supervisor:
            with pytest.raises(WorkerFailed, match=r"silent for \d+ s with work to do"):
                await ask(supervisor)

    play(story)
