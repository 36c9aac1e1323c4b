"""The supervisor: one task that owns the state, and tells workers and callers what follows.

Everybody else posts events. Slow work (spawning, planning, reading devices) runs beside the loop
and comes back as an event.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import structlog
from msgspec import structs

from kvserve.core.growth import Adapt, grown
from kvserve.core.lifecycle import Event, advance
from kvserve.core.plan import Plan, Task
from kvserve.errors import KvserveError, NotReady, ReloadInProgress, WorkerFailed
from kvserve.ipc.messages import (
    Failed,
    FromWorker,
    Hello,
    Loaded,
    LoadFailed,
    NeedsContext,
    Pause,
    Paused,
    Progress,
    Shutdown,
    Started,
    Step,
    TakeIn,
    TakenIn,
    Transcode,
)
from kvserve.supervisor.adapting import Adapting
from kvserve.supervisor.admission import GenerationSpec, Job, Ticket
from kvserve.supervisor.carry import NOTHING, Carried, adopt, export_limit
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.history import History
from kvserve.supervisor.launching import Planner, Policy, Spawner, fingerprint, load_message
from kvserve.supervisor.news import Listener, News, PhaseEntered, WeightsLoaded
from kvserve.supervisor.observing import Observer, Unobserved
from kvserve.supervisor.recovery import (
    Failure,
    GiveUp,
    after_failure,
    load_failure,
    same_plan_differently,
)
from kvserve.supervisor.requests import Requests, Terms
from kvserve.supervisor.states import (
    Attempt,
    Cancelled,
    Change,
    ChangeAsked,
    ChangePlanned,
    Draining,
    Ended,
    Failing,
    Handover,
    Heard,
    Idle,
    Leaving,
    Loading,
    NotSpawned,
    Overlapping,
    Serving,
    Spawned,
    State,
    StopAsked,
    Stopped,
    Stopping,
    Submitted,
    Successor,
    SupervisorEvent,
    Tick,
    Weighed,
    Worker,
    attempt_of,
    plan_of,
    successor_of,
    worker_of,
)
from kvserve.supervisor.status import Measured, ReloadOutcome, Status

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
LEAVE_SECONDS = 10.0
SLOWEST_EXPORT = 2**29
"""Bytes a second that a worker which exports its sequences makes at least."""
STOP_GRACE_SECONDS = 5.0
STOP_KILL_SECONDS = 7.5


class Supervisor:
    """Owns the state. Create it inside the event loop, then await `run()` in a task of its own."""

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

    # What callers use: supervisor.service.Service.

    @property
    def ready(self) -> bool:
        """Whether a worker serves, and new requests need not wait for a reload."""
        return isinstance(self._state, Serving | Overlapping)

    def submit(self, spec: GenerationSpec) -> Ticket:
        """Put a request in line."""
        ticket = Ticket(next(self._ids), lambda request_id: self.post(Cancelled(request_id)))
        now = self._clock()
        limit = self._policy.request_timeout
        deadline = None if limit is None else now + limit
        if self.stopped.done():
            ticket.put(NotReady("the server is shutting down"))
        else:
            job = Job(ticket.id, spec, ticket, submitted_at=now, deadline=deadline)
            self.post(Submitted(job))
        return ticket

    def listen(self) -> AbstractContextManager[Listener]:
        """Be told what happens from now on."""
        return self._news.listen()

    async def plan(self, n_ctx: int | None) -> Plan:
        """What would be chosen now; the running worker's memory counts as free."""
        return await self._planner.plan(n_ctx, returning_bytes=self._returning_bytes())

    async def change_context(self, n_ctx: int | None) -> ReloadOutcome:
        """Plan for another context, and reload where the plan differs."""
        if self.stopped.done():
            raise NotReady("the server is shutting down")
        answer: asyncio.Future[ReloadOutcome] = asyncio.get_running_loop().create_future()
        self.post(ChangeAsked(n_ctx, answer))
        return await answer

    async def stop(self) -> None:
        """End the worker and the loop."""
        self.post(StopAsked())
        await asyncio.shield(self.stopped)

    def status(self) -> Status:
        """The state at this moment."""
        state = self._state
        loaded = state.loaded if isinstance(state, Serving | Overlapping | Draining) else None
        failing = state if isinstance(state, Failing) else None
        worker = worker_of(state)
        return Status(
            phase=state.phase,
            plan=plan_of(state),
            measured=self._measured if loaded else None,
            load_fraction=state.fraction if isinstance(state, Loading | Overlapping) else None,
            template=loaded.template if loaded else None,
            engine=self._history.engine,
            worker_pid=worker.pid if worker else None,
            n_waiting=self._requests.n_waiting,
            n_running=len(self._requests.running),
            n_answered=self._requests.n_answered,
            n_failed=self._requests.n_failed,
            n_worker_deaths=self._history.n_worker_deaths,
            n_cells_used=self._requests.n_cells_used if self._requests.running else 0,
            speculation=loaded.speculation if loaded else None,
            n_drafted=self._requests.n_drafted,
            n_accepted=self._requests.n_accepted,
            error=failing.error.message if failing else None,
            retry_at=self._wall_clock() + failing.retry_at - self._clock() if failing else None,
            reloads=self._history.reloads,
            started_at=self._history.started_at,
        )

    # The loop.

    def post(self, event: SupervisorEvent) -> None:
        """Tell the loop something; from the event loop's thread only."""
        self._events.put_nowait(event)

    async def run(self) -> None:
        """Handle events until stopped. Whatever happens, no worker and no waiting caller stays."""
        ticking = asyncio.create_task(self._tick())
        try:
            while not isinstance(self._state, Stopped):
                self.handle(await self._events.get())
        finally:
            ticking.cancel()
            for task in self._tasks:
                task.cancel()
            for worker in (worker_of(self._state), successor_of(self._state), *self._leaving):
                if worker is not None:
                    worker.kill()
            if (attempt := attempt_of(self._state)) is not None:
                attempt.carried.close()
            self._requests.fail_all(NotReady("the server is shutting down"))
            self._news.tell(None)
            await self._spawner.close()
            if not self.stopped.done():
                self.stopped.set_result(None)
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Whoever came while the loop ended is answered too."""
        error = NotReady("the server is shutting down")
        while not self._events.empty():
            match self._events.get_nowait():
                case Submitted(job):
                    job.ticket.put(error)
                case ChangeAsked(_, answer) if not answer.done():
                    answer.set_exception(error)
                case _:
                    pass

    def handle(self, event: SupervisorEvent) -> None:
        """Take one event to its consequences; events of a worker that was replaced are void."""
        match event:
            case Submitted(job):
                self._on_submitted(job)
            case Cancelled(request_id):
                self._requests.cancel(request_id, self._answering_worker())
            case ChangeAsked(n_ctx, answer):
                self._on_change_asked(n_ctx, answer)
            case ChangePlanned(change, result, beside_bytes):
                self._on_change_planned(change, result, beside_bytes)
            case StopAsked():
                self._on_stop_asked()
            case Spawned() | NotSpawned() | Heard() | Ended() | Weighed():
                self._on_worker_event(event)
            case Tick():
                pass
        self._look_at_clock(self._clock())

    def _on_worker_event(self, event: Spawned | NotSpawned | Heard | Ended | Weighed) -> None:
        match event:
            case Spawned(worker, plan):
                self._on_spawned(worker, plan)
            case NotSpawned(error):
                if isinstance(self._state, Idle):
                    self._on_attempt_failed(self._state.attempt, Failure(error.message, error))
                elif isinstance(self._state, Overlapping):
                    self._reload_in_order(self._state, error.message)
            case Heard(worker, message) if worker is worker_of(self._state):
                self._on_heard(worker, message)
            case Ended(worker, exit_) if worker is worker_of(self._state):
                self._on_ended(exit_)
            case Heard(worker, message) if worker is successor_of(self._state):
                self._on_successor_heard(worker, message)
            case Ended(worker, exit_) if worker is successor_of(self._state):
                self._on_successor_lost(exit_)
            case Ended(worker, _):
                self._leaving.pop(worker, None)
            case Weighed(worker, measured) if worker is worker_of(self._state):
                self._measured = measured
            case _:
                pass

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

    async def _tick(self) -> None:
        while True:
            self.post(Tick())
            await asyncio.sleep(TICK_SECONDS)

    def _look_at_clock(self, now: float) -> None:
        """Whatever is due: deadlines, timeouts, and the next requests for an answering worker."""
        self._requests.expire(now, self._answering_worker())
        for overdue in [worker for worker, kill_at in self._leaving.items() if now >= kill_at]:
            overdue.kill()
        match self._state:
            case Idle(attempt, start_at=float(start_at)) as idle if now >= start_at:
                self._update(replace(idle, start_at=None))
                self._history.spawning()
                self._beside(self._spawn(attempt))
            case Loading(worker, heard_at=heard_at):
                self._kill_if_stuck(worker, now - heard_at)
            case Serving() as serving:
                self._answer(serving, now)
                self._adapt(serving, now)
            case Overlapping() as overlapping:
                self._answer(overlapping, now)
                self._kill_if_stuck(overlapping.successor, now - overlapping.heard_at)
            case Handover(worker, since=since):
                self._kill_if_stuck(worker, now - since)
            case Draining() as draining:
                self._drain(draining, now)
            case Leaving(worker, kill_at=kill_at) if now >= kill_at:
                worker.kill()
            case Failing(attempt, retry_at=retry_at) if now >= retry_at:
                self._move(Event.RETRY, Idle(attempt, start_at=now))
                self._look_at_clock(now)
            case Stopping() as stopping:
                self._finish_stopping(stopping, now)
            case _:
                pass

    def _kill_if_stuck(self, worker: Worker | None, seconds: float) -> None:
        if worker is not None and seconds > self._policy.load_timeout:
            log.error("worker hangs while loading", pid=worker.pid)
            worker.kill(f"silent for {seconds:.0f} s while it loaded")

    def _answer(self, state: Serving | Overlapping, now: float) -> None:
        """Hand the next requests to the worker, and see that it works."""
        if not self._requests.running:
            self._heard_at = now
        plan = state.attempt.plan
        # Twice the batch: the next prompts are tokenized before a place is free.
        places = 2 * plan.chosen.launch.n_parallel
        self._requests.dispatch(state.worker, places, self._terms(plan, state.loaded.n_ctx))
        self._kill_if_hung(state.worker, now)

    def _kill_if_hung(self, worker: Worker, now: float) -> None:
        if self._requests.running and now - self._heard_at > self._policy.step_timeout:
            log.error("worker hangs", pid=worker.pid, silent_seconds=round(now - self._heard_at))
            worker.kill(f"silent for {now - self._heard_at:.0f} s with work to do")

    def _answering_worker(self) -> Worker | None:
        answering = isinstance(self._state, Serving | Overlapping | Draining | Stopping)
        return worker_of(self._state) if answering else None

    def _on_submitted(self, job: Job) -> None:
        state = self._state
        if isinstance(state, Failing):
            wait = max(1.0, state.retry_at - self._clock())
            job.ticket.put(NotReady(f"no worker: {state.error.message}", retry_after=wait))
        elif isinstance(state, Stopping | Stopped):
            job.ticket.put(NotReady("the server is shutting down"))
        else:
            self._requests.admit(job)

    # A worker comes.

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

    def _on_spawned(self, worker: Worker, plan: Plan) -> None:
        state = self._state
        now = self._clock()
        if isinstance(state, Overlapping) and state.successor is None:
            self._update(replace(state, successor=worker, since=now, heard_at=now))
            worker.send(load_message(state.following, self._policy))
            return
        if not isinstance(state, Idle):  # stopped meanwhile
            worker.kill()
            return
        attempt = replace(state.attempt, plan=plan)
        self._measured = None
        self._move(Event.SPAWN, Loading(worker, attempt, since=now, heard_at=now))
        worker.send(load_message(attempt, self._policy))

    def _on_heard(self, worker: Worker, message: FromWorker) -> None:
        self._heard_at = self._clock()
        match message, self._state:
            case Hello(), _:
                self._history.engine = f"{message.engine} {message.engine_version}"
            case Progress() | Loaded() | LoadFailed() | TakenIn(), _:
                self._on_load_heard(worker, message)
            case Started(), Serving(attempt=attempt, loaded=loaded) | Overlapping(
                attempt=attempt, loaded=loaded
            ) | Draining(attempt=attempt, loaded=loaded):
                cache_type = str(attempt.plan.chosen.launch.pair)
                mark = fingerprint(attempt.plan, self._policy)
                self._requests.started(message, loaded.n_ctx, cache_type, mark)
            case NeedsContext(), _:
                self._requests.park(message)
            case Step(), _:
                self._requests.step(message)
                self._adapting.note(message, self._heard_at)
            case Failed(), _:
                self._requests.refused(message)
            case Paused(), Draining() as state:
                self._requests.worker_paused()
                self._on_paused(state, adopt(worker.pid, message))
            case Paused(), Stopping() as state:
                self._update(replace(state, shutdown_at=self._clock()))
            case _:
                log.debug("frame out of place", frame=type(message).__name__)

    def _on_load_heard(
        self, worker: Worker, message: Progress | Loaded | LoadFailed | TakenIn
    ) -> None:
        match message, self._state:
            case Progress(), Loading() as state:
                self._update(replace(state, fraction=message.fraction, heard_at=self._heard_at))
                self._news.tell(WeightsLoaded(message.fraction))
            case Loaded(), Loading() as state:
                self._on_loaded(state, message)
            case TakenIn(), Handover(loaded=loaded) as state:
                self._on_loaded(state, structs.replace(loaded, carried=message.carried))
            case LoadFailed(), Loading() as state:
                self._update(replace(state, failed=message))
                worker.kill()
            case _:
                log.debug("frame out of place", frame=type(message).__name__)

    def _on_paused(self, state: Draining, carried: Carried) -> None:
        if state.successor is None:
            self._leave(state, carried)
        else:
            self._hand_over(state, state.successor, carried)

    def _on_loaded(self, state: Loading | Handover, message: Loaded) -> None:
        # Gigabytes take the kernel a while to free.
        self._beside(asyncio.to_thread(state.attempt.carried.close))
        carry = state.attempt.carried.reported(message.carried)
        attempt = replace(state.attempt, carried=NOTHING)
        in_force = replace(
            attempt, change=None, paused_at=None, beside_bytes=None, in_order_because=None
        )
        self._move(Event.LOADED, Serving(state.worker, in_force, message))
        self._answered_at_load = self._requests.n_answered
        self._beside(self._weigh(state.worker, attempt.plan, message))
        outcome = "done" if attempt.failure is None else "rolled_back"
        pause = None if attempt.paused_at is None else self._clock() - attempt.paused_at
        self._history.record(attempt, outcome, carry=carry, pause_seconds=pause)
        launch = attempt.plan.chosen.launch
        log.info(
            "serving",
            cache_type=str(launch.pair),
            n_ctx=message.n_ctx,
            n_gpu_layers=launch.n_gpu_layers,
            load_seconds=round(message.load_seconds, 2),
            overlapped=attempt.beside_bytes is not None,
            pause_seconds=None if pause is None else round(pause, 3),
        )
        if carry is not None:
            log.info(
                "sequences carried",
                n_sequences=carry.n_sequences,
                n_tokens=carry.n_tokens,
                refused=carry.refused,
                seconds=round(carry.seconds, 3),
            )
        if not self.first_ready.done():
            self.first_ready.set_result(None)
        unasked = attempt.change is not None and attempt.change.reason != "context"
        self._adapting.loaded(message.n_ctx, self._clock(), adapted=unasked)
        if attempt.change is not None:
            error = attempt.failure and WorkerFailed(
                f"{attempt.failure}; went back to {launch.pair} at {message.n_ctx} tokens"
            )
            self._finish(attempt.change, error or attempt.plan)
        self._requests.unpark(message.n_ctx)

    async def _weigh(self, worker: Worker, plan: Plan, loaded: Loaded) -> None:
        self.post(Weighed(worker, await self._planner.weigh(plan, loaded, worker.pid)))

    # A worker goes.

    def _on_ended(self, exit_: Exit) -> None:
        match self._state:
            case Loading() as state:
                self._on_load_lost(state, exit_)
            case Serving(attempt=attempt):
                self._history.worker_died(exit_.cause)
                log.error("worker died", cause=exit_.cause, last_words=exit_.last_words[-500:])
                if self._requests.n_answered > self._answered_at_load:
                    self._streak = 0
                self._requests.worker_died(exit_.cause)
                failure = Failure(f"the worker died: {exit_.cause}")
                self._on_attempt_failed(replace(attempt, fallback=None, change=None), failure)
            case Overlapping() | Draining() as state:
                self._history.worker_died(exit_.cause)
                self._requests.worker_died(exit_.cause)
                self._on_predecessor_lost(state)
            case Handover(attempt=attempt):
                # What it was to take in is kept for one more try, in the ordinary order.
                why = f"the worker died while it took conversations over: {exit_.cause}"
                self._observer.worker_died(f"handover: {exit_.cause}")
                log.error("handover failed", cause=exit_.cause)
                again = replace(attempt, beside_bytes=None, in_order_because=why)
                self._move(Event.LOST, Idle(again, start_at=self._clock()))
            case Leaving(following=following):
                self._move(Event.LOST, Idle(following, start_at=self._clock()))
            case Stopping():
                self._move(Event.LOST, Stopped())
            case _:
                pass

    def _on_load_lost(self, state: Loading, exit_: Exit) -> None:
        if state.failed is None and state.attempt.carried is not NOTHING:
            # It may be what it was to take in that killed it.
            state.attempt.carried.close()
            state = replace(state, attempt=replace(state.attempt, carried=NOTHING))
        failure = load_failure(state, exit_)
        mended = same_plan_differently(state, exit_)
        log.error("load failed", error=failure.message, mended=mended is not None)
        self._observer.worker_died(f"loading: {exit_.cause}")
        if mended is not None:
            self._move(Event.LOST, Idle(mended, start_at=self._clock()))
        else:
            self._on_attempt_failed(state.attempt, failure)

    def _on_attempt_failed(self, attempt: Attempt, failure: Failure) -> None:
        """From LOADING, SERVING or IDLE: on to the next try, or to FAILED."""
        now = self._clock()
        self._streak += 1
        ever_ready = self.first_ready.done()
        following = after_failure(attempt, failure, streak=self._streak, ever_ready=ever_ready)
        given_up = isinstance(following, GiveUp)
        start_at = None if isinstance(following, GiveUp) else now + following.delay
        idle = Idle(following.attempt, start_at=start_at)
        if isinstance(self._state, Idle):
            self._update(idle)
        else:
            self._move(Event.LOST, idle)
        if attempt.change is not None and following.attempt.change is None:
            self._history.record(attempt, "failed", failure.message)
            self._finish(attempt.change, failure.error or WorkerFailed(failure.message))
        if isinstance(following, GiveUp):
            error = following.error
            log.error("giving up for now", error=error.message, retry_after=following.retry_after)
            following.attempt.carried.close()
            attempt_later = replace(following.attempt, carried=NOTHING)
            self._move(Event.GIVE_UP, Failing(attempt_later, error, now + following.retry_after))
            self._requests.fail_all(error)
            self._streak = 0
        if given_up and not self.first_ready.done():
            self.first_ready.set_exception(failure.error or WorkerFailed(failure.message))

    # A change of context.

    def _on_change_asked(self, n_ctx: int | None, answer: asyncio.Future[ReloadOutcome]) -> None:
        state = self._state
        if self._planning or isinstance(state, Overlapping | Draining | Handover | Leaving):
            error: KvserveError = ReloadInProgress(
                "a reload is under way; try again", retry_after=5
            )
        elif isinstance(state, Serving | Failing):
            self._planning = True
            change = Change(answer, self._wall_clock(), previous=state.attempt.plan)
            self._beside(self._plan_change(n_ctx, change))
            return
        elif isinstance(state, Stopping | Stopped):
            error = NotReady("the server is shutting down")
        else:
            error = NotReady("the model is loading; try again", retry_after=5)
        answer.set_exception(error)

    async def _plan_change(
        self, n_ctx: int | None, change: Change, task: Task | None = None
    ) -> None:
        beside_bytes = None
        try:
            plan = await self._planner.plan(
                n_ctx, task=task, returning_bytes=self._returning_bytes()
            )
            result: Plan | KvserveError = plan
            beside_bytes = await self._planner.room_beside(plan)
        except KvserveError as error:
            result = error
        except Exception as error:
            log.exception("planning failed")
            result = WorkerFailed(f"planning failed: {error!r}")
        self.post(ChangePlanned(change, result, beside_bytes))

    def _on_change_planned(
        self, change: Change, result: Plan | KvserveError, beside_bytes: int | None
    ) -> None:
        self._planning = False
        state = self._state
        if isinstance(result, KvserveError):
            self._finish(change, result)
        elif isinstance(state, Serving):
            attempt = state.attempt
            if result.chosen.launch == attempt.plan.chosen.launch:
                self._update(replace(state, attempt=replace(attempt, plan=result)))
                self._finish(change, result)
                return
            following = Attempt(
                plan=result,
                reason=change.reason,
                extra_buffers=attempt.extra_buffers,
                fallback=attempt.plan,
                change=change,
                beside_bytes=beside_bytes,
            )
            if beside_bytes is None:
                self._reload_in_order(
                    Overlapping(state.worker, attempt, state.loaded, following, None, 0, 0)
                )
            else:
                self._overlap(state, following)
        elif isinstance(state, Failing):
            attempt = replace(state.attempt, plan=result, replan=False, change=change)
            self._move(Event.RETRY, Idle(attempt, start_at=self._clock()))
        else:
            self._finish(change, NotReady("the worker was lost meanwhile; try again"))

    def _drain(self, state: Draining, now: float) -> None:
        if state.kill_at is None and (now >= state.pause_at or not self._requests.running):
            following = replace(state.following, paused_at=now)
            carry_bytes = self._policy.carry_limit(following.plan)
            if following.beside_bytes is not None:
                carry_bytes = min(carry_bytes, following.beside_bytes)
            limit = export_limit(
                carry_bytes,
                state.attempt.plan.chosen.launch.pair,
                state.following.plan.chosen.launch.pair,
            )
            state.worker.send(Pause(export_bytes=limit))
            n_bytes = min(limit, state.attempt.plan.chosen.memory.kv_bytes)
            patience = self._policy.pause_timeout + n_bytes / SLOWEST_EXPORT
            self._update(replace(state, following=following, kill_at=now + patience))
        elif state.kill_at is not None and now >= state.kill_at:
            state.worker.kill("it did not pause for a reload")
        else:
            self._kill_if_hung(state.worker, now)

    def _overlap(self, state: Serving, following: Attempt) -> None:
        """Both workers fit: the next one loads while the present one answers."""
        now = self._clock()
        self._history.spawning()
        self._move(
            Event.OVERLAP,
            Overlapping(
                state.worker, state.attempt, state.loaded, following, None, since=now, heard_at=now
            ),
        )
        self._beside(self._start(following.plan))

    def _reload_in_order(self, state: Overlapping, why: str | None = None) -> None:
        """The present worker leaves first; `why` an overlapped start failed, where it was tried."""
        following = replace(state.following, beside_bytes=None, in_order_because=why)
        if why is not None:
            log.warning("the next worker has to wait for the present one's memory", reason=why)
        pause_at = self._clock() + self._policy.drain_timeout
        self._beside(self._spawner.spawn_ahead(following.plan.chosen.launch))
        self._move(
            Event.RELOAD,
            Draining(state.worker, state.attempt, state.loaded, following, pause_at=pause_at),
        )

    def _on_successor_heard(self, worker: Worker, message: FromWorker) -> None:
        now = self._clock()
        match message, self._state:
            case Hello(), Overlapping() as state:
                self._update(replace(state, heard_at=now))
            case Progress(), Overlapping() as state:
                self._update(replace(state, fraction=message.fraction, heard_at=now))
                self._news.tell(WeightsLoaded(message.fraction))
            case LoadFailed(), Overlapping() as state:
                self._update(replace(state, failed=message))
                worker.kill()
            case Loaded(), Overlapping() as state:
                self._move(
                    Event.RELOAD,
                    Draining(
                        state.worker,
                        state.attempt,
                        state.loaded,
                        state.following,
                        pause_at=now + self._policy.drain_timeout,
                        successor=Successor(worker, message),
                    ),
                )
            case _:
                log.debug("frame out of place", frame=type(message).__name__)

    def _on_successor_lost(self, exit_: Exit) -> None:
        """The present worker still answers: the same reload goes on in the ordinary order."""
        self._observer.worker_died(f"overlapping: {exit_.cause}")
        match self._state:
            case Overlapping(failed=failed) as state:
                why = f"died while loading beside it: {exit_.cause}"
                self._reload_in_order(state, failed.message if failed else why)
            case Draining() as state:
                why = f"died before it took over: {exit_.cause}"
                following = replace(state.following, beside_bytes=None, in_order_because=why)
                self._update(replace(state, following=following, successor=None))
                self._beside(self._spawner.spawn_ahead(following.plan.chosen.launch))
            case _:
                pass

    def _on_predecessor_lost(self, state: Overlapping | Draining) -> None:
        """A worker that was to be replaced died: the next one goes on alone, or is spawned."""
        now = self._clock()
        successor = successor_of(state)
        following = state.following
        if isinstance(state, Overlapping) and successor is None:
            self._move(Event.LOST, Idle(following, start_at=None))  # it is being spawned
            return
        if successor is None:
            self._move(Event.LOST, Idle(following, start_at=now))
            return
        self._move(Event.LOST, Idle(following, start_at=None))
        self._measured = None
        loading = Loading(successor, following, since=now, heard_at=now)
        if isinstance(state, Overlapping):
            loading = replace(loading, fraction=state.fraction, failed=state.failed)
        self._move(Event.SPAWN, loading)
        if isinstance(state, Draining) and state.successor is not None:
            self._on_loaded(loading, state.successor.loaded)

    def _hand_over(self, state: Draining, successor: Successor, carried: Carried) -> None:
        now = self._clock()
        state.worker.send(Shutdown())
        self._leaving[state.worker] = now + LEAVE_SECONDS
        attempt = replace(state.following, carried=carried)
        self._measured = None
        self._move(
            Event.HAND_OVER, Handover(successor.worker, attempt, successor.loaded, since=now)
        )
        pair = attempt.plan.chosen.launch.pair
        successor.worker.send(TakeIn(carried.paths, pair.k, pair.v))

    def _leave(self, state: Draining, carried: Carried) -> None:
        state.worker.send(Shutdown())
        kill_at = self._clock() + LEAVE_SECONDS
        following = replace(state.following, carried=carried)
        if carried.paths:
            pair = following.plan.chosen.launch.pair
            self._spawner.tell_ahead(Transcode(carried.paths, pair.k, pair.v))
        self._move(Event.DRAINED, Leaving(state.worker, following, kill_at=kill_at))

    def _finish(self, change: Change, result: Plan | KvserveError) -> None:
        """A change came to its end: tell whoever asked for it, or the requests that needed it."""
        if isinstance(result, Plan) and change.reason == "context":
            self._adapting.asked(result.chosen.launch.n_ctx)
        if isinstance(result, NotReady) and change.reason != "context":
            return  # the parked requests are looked at again when a worker serves
        if isinstance(result, KvserveError) and change.reason == "grow":
            for job in self._adapting.in_vain(list(self._requests.parked.values()), change.n_ctx):
                self._requests.refuse(job, self._adapting.n_ctx, result.message)
        if change.reason == "task":
            if isinstance(result, KvserveError):
                self._settle_tasks(result.message, change.previous)
            elif result.chosen.launch == change.previous.chosen.launch:
                self._settle_tasks(f"{result.chosen.launch.pair} stays the best", result)
        if change.answer is None or change.answer.done():  # nobody asked, or they hung up
            return
        if isinstance(result, KvserveError):
            change.answer.set_exception(result)
            return
        changed = result.chosen.launch != change.previous.chosen.launch
        seconds = self._wall_clock() - change.started_at
        change.answer.set_result(ReloadOutcome(result, changed=changed, seconds=seconds))

    def _terms(self, plan: Plan, n_ctx: int) -> Terms:
        return Terms(
            n_ctx=n_ctx,
            may_grow=grown(n_ctx + 1, self._policy.growth) is not None,
            allows=partial(self._planner.allows, plan),
        )

    def _settle_tasks(self, why: str, plan: Plan) -> None:
        terms = self._terms(plan, self._adapting.n_ctx)
        may_serve = self._policy.serves_below_floor
        if self._requests.settle_tasks(why, terms, may_serve=may_serve):
            self.post(Tick())  # they are in line again

    def _adapt(self, state: Serving, now: float) -> None:
        """Move the context or the KV type unasked, as the requests need it."""
        if self._planning:
            return
        requests, adapting = self._requests, self._adapting
        for lost in adapting.hopeless(list(requests.parked.values())):
            requests.refuse(lost.job, lost.n_ctx, lost.remedy)
        if self._policy.growth.adapt is Adapt.OFF:
            self._settle_tasks("nothing is changed unasked (adapt is off)", state.attempt.plan)
        idle = not requests.running and not len(requests.line)
        allows = partial(self._planner.allows, state.attempt.plan)
        move = adapting.move(requests.parked.values(), allows, now, idle=idle)
        if move is None:
            return
        log.info("context moves", reason=move.reason, task=move.task, to_n_ctx=move.n_ctx)
        self._planning = True
        change = Change(None, self._wall_clock(), state.attempt.plan, move.reason, move.n_ctx)
        self._beside(self._plan_change(move.n_ctx, change, move.task))

    def _returning_bytes(self) -> int:
        """What the present worker's end would free; the prediction until it was measured."""
        if self._measured is not None:
            return self._measured.returning_bytes
        state = self._state
        if isinstance(state, Serving | Overlapping | Draining):
            return state.attempt.plan.chosen.memory.total_bytes
        return 0

    # The end.

    def _on_stop_asked(self) -> None:
        state = self._state
        now = self._clock()
        if (attempt := attempt_of(state)) is not None and attempt.change is not None:
            self._finish(attempt.change, NotReady("the server is shutting down"))
        if (successor := successor_of(state)) is not None:
            successor.kill()
        if isinstance(state, Idle | Failing):
            self._move(Event.STOP, Stopped())
        elif isinstance(state, Serving | Overlapping | Draining):
            self._requests.fail_waiting(NotReady("the server is shutting down"))
            shutdown_at = now + STOP_GRACE_SECONDS
            self._move(
                Event.STOP, Stopping(state.worker, shutdown_at, kill_at=now + STOP_KILL_SECONDS)
            )
        elif isinstance(state, Loading | Handover | Leaving):
            state.worker.kill()
            self._move(Event.STOP, Stopping(state.worker, None, kill_at=now + STOP_KILL_SECONDS))

    def _finish_stopping(self, state: Stopping, now: float) -> None:
        if state.shutdown_at is not None and (
            now >= state.shutdown_at or not self._requests.running
        ):
            self._requests.fail_all(NotReady("the server is shutting down"))
            state.worker.send(Shutdown())
            self._update(replace(state, shutdown_at=None))
        elif now >= state.kill_at:
            state.worker.kill()
