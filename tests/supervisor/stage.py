"""A supervisor on a stage: its clock, its planner and its workers are played by the test."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from kvserve.core.dtypes import CachePair, parse_pair
from kvserve.core.floors import why_below
from kvserve.core.lifecycle import Phase
from kvserve.core.loss import NOTHING_MEASURED
from kvserve.core.plan import Launch, Plan, Request, Task
from kvserve.core.selector import select
from kvserve.errors import DoesNotFit, KvserveError, WorkerFailed
from kvserve.ipc.messages import (
    Cancel,
    ChatPrompt,
    CopiedAhead,
    CopyAhead,
    Delta,
    End,
    FromWorker,
    Generate,
    Hello,
    Load,
    Loaded,
    MemoryReport,
    Pause,
    Paused,
    Sampling,
    Shutdown,
    Started,
    Step,
    TakenIn,
    TextPrompt,
    ToWorker,
    Transcode,
)
from kvserve.supervisor.admission import Done, GenerationSpec, Served, Text, Ticket
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.launching import Policy
from kvserve.supervisor.loop import Supervisor
from kvserve.supervisor.observing import Observer
from kvserve.supervisor.states import Tick
from kvserve.supervisor.status import Measured
from tests.core.shapes import llama3_8b, machine

__all__ = ["Cancel", "ChatPrompt", "Generate", "Load", "Pause", "Shutdown"]

VRAM_GIB = 7.6
SPEC = GenerationSpec(prompt=TextPrompt("hello"), sampling=Sampling())


def plan_for(n_ctx: int, vram_gib: float = VRAM_GIB, pair: CachePair | None = None) -> Plan:
    return select(llama3_8b(), machine(vram_gib), Request(n_ctx=n_ctx, pair=pair))


class FakeWorker:
    """A worker that says and does what the test tells it to."""

    def __init__(self, launch: Launch, pid: int) -> None:
        self.launch = launch
        self.pid = pid
        self.sent: list[ToWorker] = []
        self.killed = False
        self.killed_for: str | None = None
        self.gone = False
        self.pauses = True
        self.copies = True
        self._frames: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.on_kill: Callable[[], None] = lambda: self.die(-9)

    def send(self, message: ToWorker) -> None:
        self.sent.append(message)
        if isinstance(message, Pause) and self.pauses:
            self.say(Paused())
        if isinstance(message, CopyAhead) and self.copies:
            self.say(CopiedAhead())

    async def receive(self) -> FromWorker | None:
        return await self._frames.get()

    def kill(self, why: str | None = None) -> None:
        if not self.gone:
            self.killed, self.killed_for = True, why
            self.on_kill()

    async def wait(self) -> Exit:
        return await self._exit

    # The test's side.

    def say(self, *messages: FromWorker) -> None:
        for message in messages:
            self._frames.put_nowait(message)

    def die(self, returncode: int = 0, last_words: str = "") -> None:
        if not self.gone:
            self.gone = True
            self._exit.set_result(Exit(returncode, last_words, self.killed_for))
            self._frames.put_nowait(None)

    def load(self, n_ctx: int | None = None) -> None:
        self.say(
            Hello(pid=self.pid, engine="fake", engine_version="1", system_info=""),
            Loaded(
                n_ctx=n_ctx or self.launch.n_ctx,
                n_ctx_train=131072,
                n_vocab=1000,
                memory=MemoryReport(),
                template="model",
                load_seconds=0.1,
            ),
        )

    def answer(self, request_id: int, *tokens: int, done: bool = False) -> None:
        """Generate tokens; token 7 reads as 't7 '. A finished answer counts what was resumed."""
        ends: tuple[End, ...] = ()
        if done:
            ends = (End(request_id, "stop", 3, len(tokens)),)
        text = "".join(f"t{token} " for token in tokens)
        self.say(Step(deltas=(Delta(request_id, text, tokens),), ends=ends))

    def started(self, *request_ids: int) -> None:
        self.say(*(Started(id=request_id, n_prompt_tokens=3) for request_id in request_ids))

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class FakePlanner:
    """Plans for an 8B model on a card whose free memory the test may change."""

    def __init__(self) -> None:
        self.vram_gib = VRAM_GIB
        self.room = True
        self.beside: int | None = None
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.longest = 2**20
        self.out_of_memory: list[int] = []
        self.returning: list[int] = []
        self.measured = Measured(MemoryReport(), device_bytes=1000, returning_bytes=1000)

    async def plan(
        self,
        n_ctx: int | None,
        *,
        task: Task | None = None,
        returning_bytes: int = 0,
        n_out_of_memory: int = 0,
    ) -> Plan:
        self.returning.append(returning_bytes)
        self.out_of_memory.append(n_out_of_memory)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if n_ctx is not None and n_ctx > self.longest:
            raise DoesNotFit(f"{n_ctx} is too much", needed_bytes=2, free_bytes=1)
        request = Request(n_ctx=n_ctx, also=task)
        return select(llama3_8b(), machine(self.vram_gib), request)

    def allows(self, plan: Plan, task: Task) -> bool:
        request = Request(n_ctx=plan.chosen.launch.n_ctx, task=task)
        return why_below(plan.chosen.launch.pair, plan.shape, request, NOTHING_MEASURED) is None

    async def wait_for_room(self, plan: Plan) -> bool:
        return self.room

    async def room_beside(self, plan: Plan) -> int | None:
        return self.beside

    async def weigh(self, plan: Plan, loaded: Loaded, pid: int) -> Measured:
        return self.measured


class Stage:
    """The supervisor with everything around it."""

    def __init__(
        self, first: Plan | None = None, observer: Observer | None = None, **policy: Any
    ) -> None:
        self.now = 1000.0
        self.workers: list[FakeWorker] = []
        self.ahead: list[Launch] = []
        self.told_ahead: list[ToWorker] = []
        self.closed = False
        self.planner = FakePlanner()
        self.spawn_error: WorkerFailed | None = None
        self.spawn_fails = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.ahead_gate = asyncio.Event()
        self.ahead_gate.set()
        self.transcode_gate = asyncio.Event()
        self.transcode_gate.set()
        self.supervisor = Supervisor(
            first or plan_for(16384),
            replace(Policy("/m.gguf", "identity", n_threads=2), **policy),
            spawner=self,
            planner=self.planner,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            observer=observer,
        )
        self.running = asyncio.create_task(self.supervisor.run())

    async def spawn(self, launch: Launch) -> FakeWorker:
        if self.spawn_error is not None:
            raise self.spawn_error
        await self.gate.wait()
        if self.spawn_fails:
            self.spawn_fails = False
            raise WorkerFailed("no more processes")
        worker = FakeWorker(launch, pid=100 + len(self.workers))
        self.workers.append(worker)
        return worker

    async def spawn_ahead(self, launch: Launch) -> None:
        self.ahead.append(launch)
        await self.ahead_gate.wait()

    async def transcode_ahead(self, message: Transcode) -> None:
        self.told_ahead.append(message)
        await self.transcode_gate.wait()

    def tell_ahead(self, message: ToWorker) -> None:
        self.told_ahead.append(message)

    async def close(self) -> None:
        self.closed = True

    @property
    def worker(self) -> FakeWorker:
        """The worker that was spawned last."""
        return self.workers[-1]

    async def settle(self) -> None:
        """Let everything that can happen without time passing happen."""
        for _ in range(40):
            await asyncio.sleep(0)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.supervisor.post(Tick())
        await self.settle()

    async def serving(self) -> FakeWorker:
        """On to a loaded worker."""
        await self.settle()
        self.worker.load()
        await self.settle()
        assert self.supervisor.ready
        return self.worker

    async def submit(self, spec: GenerationSpec = SPEC) -> "Caller":
        caller = Caller(self.supervisor.submit(spec))
        await self.settle()
        return caller

    async def end(self) -> None:
        """Stop, whatever the state."""
        stopping = asyncio.create_task(self.supervisor.stop())
        await self.settle()
        for worker in self.workers:
            worker.die()
        await self.settle()
        await stopping
        await self.running


class Caller:
    """Somebody who waits for an answer, and remembers all of it."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.served: list[Served] = []
        self.text = ""
        self.done: Done | None = None
        self.error: KvserveError | None = None
        self.n_ends = 0
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            async for event in self.ticket:
                match event:
                    case Served():
                        self.served.append(event)
                    case Text(text=text):
                        self.text += text
                    case Done():
                        self.done = event
                        self.n_ends += 1
        except KvserveError as error:
            self.error = error
            self.n_ends += 1

    @property
    def id(self) -> int:
        return self.ticket.id


def play(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run one test's story in an event loop of its own."""
    asyncio.run(story())


def q8() -> CachePair:
    return parse_pair("q8_0")


class Reload:
    """A reload of a worker that answers one request, halted in a phase; `answer` is what whoever
    asked for it gets."""

    def __init__(
        self, stage: Stage, old: FakeWorker, caller: Caller, answer: "asyncio.Task[Any]"
    ) -> None:
        self.stage, self.old, self.caller, self.answer = stage, old, caller, answer

    @property
    def new(self) -> FakeWorker:
        return self.stage.workers[1]

    @property
    def phase(self) -> Phase:
        return self.stage.supervisor.status().phase

    async def answered_by_the_last(self) -> None:
        """The last worker loads and takes in, if that is left, and answers the rest."""
        stage = self.stage
        if self.phase is Phase.LOADING:
            stage.worker.load()
            await stage.settle()
        if self.phase is Phase.HANDOVER:
            stage.worker.say(TakenIn())
            await stage.settle()
        assert self.phase is Phase.SERVING
        stage.worker.answer(self.caller.id, 3, done=True)
        await stage.settle()
