"""What the supervisor knows and shares between its parts: the state, and how it moves.

`loop.Supervisor` is put together from floors, one file each: the situation, what callers see of
it, changes of context, loads, reloads, and the loop. A floor calls down only.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine

import structlog

from kvserve.core.lifecycle import Event, advance
from kvserve.core.plan import Plan
from kvserve.errors import KvserveError, WorkerFailed
from kvserve.supervisor.adapting import Adapting
from kvserve.supervisor.history import History
from kvserve.supervisor.launching import Planner, Policy, Spawner
from kvserve.supervisor.news import News, PhaseEntered
from kvserve.supervisor.observing import Observer, Unobserved
from kvserve.supervisor.requests import Requests
from kvserve.supervisor.states import (
    Attempt,
    Draining,
    Ended,
    Heard,
    Idle,
    NotSpawned,
    Overlapping,
    Serving,
    Spawned,
    State,
    Stopping,
    SupervisorEvent,
    Worker,
    worker_of,
)
from kvserve.supervisor.status import Measured

log = structlog.get_logger(__name__)


class Situation:
    """The state and everything around it. Only the loop's handlers call `_move` and `_update`."""

    def __init__(
        self,
        first: Plan,
        policy: Policy,
        spawner: Spawner,
        planner: Planner,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Unobserved()
        self._news = News()
        self._policy = policy
        self._spawner = spawner
        self._planner = planner
        self._clock = clock
        self._wall_clock = wall_clock
        self._events: asyncio.Queue[SupervisorEvent] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._requests = Requests(policy.queue_limit, self._observer, clock)
        self._phase_began_at = clock()
        self._state: State = Idle(Attempt(first, "start"), start_at=clock())
        self._measured: Measured | None = None
        self._history = History(wall_clock, self._observer, self._news)
        self._planning = False
        self._leaving: dict[Worker, float] = {}
        self._streak = 0
        self._answered_at_load = 0
        self._heard_at = clock()
        self._adapting = Adapting(policy.growth, first.chosen.launch.n_ctx, clock())
        loop = asyncio.get_running_loop()
        self.first_ready: asyncio.Future[None] = loop.create_future()
        self.stopped: asyncio.Future[None] = loop.create_future()

    def post(self, event: SupervisorEvent) -> None:
        """Tell the loop something; from the event loop's thread only."""
        self._events.put_nowait(event)

    def _move(self, event: Event, state: State) -> None:
        """Enter another phase. An unlisted transition raises."""
        if state.phase is not advance(self._state.phase, event):
            raise AssertionError(f"{event} does not lead from {self._state.phase} to {state.phase}")
        now = self._clock()
        previous, seconds = self._state.phase, now - self._phase_began_at
        self._observer.phase_left(previous, seconds)
        self._news.tell(PhaseEntered(state.phase, previous, seconds))
        self._phase_began_at = now
        self._state = state

    def _update(self, state: State) -> None:
        """Replace the data of the present phase."""
        if state.phase is not self._state.phase:
            raise AssertionError(f"{state.phase} is not the present phase {self._state.phase}")
        self._state = state

    def _beside(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _kill_if_stuck(self, worker: Worker | None, seconds: float) -> None:
        if worker is not None and seconds > self._policy.load_timeout:
            log.error("worker hangs while loading", pid=worker.pid)
            worker.kill(f"silent for {seconds:.0f} s while it loaded")

    def _kill_if_hung(self, worker: Worker, now: float) -> None:
        if self._requests.running and now - self._heard_at > self._policy.step_timeout:
            log.error("worker hangs", pid=worker.pid, silent_seconds=round(now - self._heard_at))
            worker.kill(f"silent for {now - self._heard_at:.0f} s with work to do")

    def _answering_worker(self) -> Worker | None:
        answering = isinstance(self._state, Serving | Overlapping | Draining | Stopping)
        return worker_of(self._state) if answering else None

    def _returning_bytes(self) -> int:
        """What the present worker's end would free; the prediction until it was measured."""
        if self._measured is not None:
            return self._measured.returning_bytes
        state = self._state
        if isinstance(state, Serving | Overlapping | Draining):
            return state.attempt.plan.chosen.memory.total_bytes
        return 0

    async def _spawn(self, attempt: Attempt) -> None:
        plan = attempt.plan
        try:
            if attempt.replan or not await self._planner.wait_for_room(plan):
                plan = await self._planner.plan(
                    plan.request.n_ctx,
                    task=plan.request.also,
                    n_out_of_memory=attempt.n_out_of_memory,
                )
        except KvserveError as error:
            self.post(NotSpawned(error))
        except Exception as error:
            log.exception("planning failed")
            self.post(NotSpawned(WorkerFailed(f"planning failed: {error!r}")))
        else:
            await self._start(plan)

    async def _start(self, plan: Plan) -> None:
        """Spawn for a plan, and tell the loop what the worker says until it has ended."""
        try:
            worker = await self._spawner.spawn(plan.chosen.launch)
        except KvserveError as error:
            self.post(NotSpawned(error))
            return
        except Exception as error:
            log.exception("spawning failed")
            self.post(NotSpawned(WorkerFailed(f"no worker could be started: {error!r}")))
            return
        self.post(Spawned(worker, plan))
        try:
            while (message := await worker.receive()) is not None:
                self.post(Heard(worker, message))
            self.post(Ended(worker, await worker.wait()))
        finally:
            worker.kill()
