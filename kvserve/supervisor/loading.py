"""A worker comes: it is told to load, it serves, or it fails and another try follows."""

import asyncio
from dataclasses import replace

import structlog
from msgspec import structs

from kvserve.core.lifecycle import Event
from kvserve.core.plan import Plan
from kvserve.errors import WorkerFailed
from kvserve.ipc.messages import (
    Loaded,
    LoadFailed,
    Progress,
    TakenIn,
)
from kvserve.supervisor.carry import NOTHING
from kvserve.supervisor.changing import Changes
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.launching import load_message
from kvserve.supervisor.news import WeightsLoaded
from kvserve.supervisor.recovery import (
    Failure,
    GiveUp,
    after_failure,
    load_failure,
    same_plan_differently,
)
from kvserve.supervisor.states import (
    Attempt,
    Failing,
    Handover,
    Idle,
    Loading,
    Overlapping,
    Serving,
    Weighed,
    Worker,
)

log = structlog.get_logger(__name__)


class Loads(Changes):
    """From a spawned worker to one that serves."""

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
                n_tokens_ahead=carry.n_tokens_ahead,
                refused=carry.refused,
                seconds=round(carry.seconds, 3),
                export_seconds=round(carry.export_seconds, 3),
                transcode_seconds=round(carry.transcode_seconds, 3),
                import_seconds=round(carry.import_seconds, 3),
                proof_seconds=round(carry.proof_seconds, 3),
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

    def _on_load_lost(self, state: Loading, exit_: Exit) -> None:
        if state.failed is None and state.attempt.carried is not NOTHING:
            # It may be what it was to take in that killed it.
            state.attempt.carried.close()
            state = replace(state, attempt=replace(state.attempt, carried=NOTHING))
        failure = load_failure(state, exit_)
        mended = same_plan_differently(state, exit_)
        ends_the_start = mended is None and not self.first_ready.done()
        log.error(
            "load failed",
            error=failure.message,
            mended=mended is not None,
            file_only=ends_the_start,  # whoever starts the daemon is told by its last words
        )
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
            if ever_ready:  # the first load's error ends the daemon, which tells it
                log.error(
                    "giving up for now", error=error.message, retry_after=following.retry_after
                )
            following.attempt.carried.close()
            attempt_later = replace(following.attempt, carried=NOTHING)
            self._move(Event.GIVE_UP, Failing(attempt_later, error, now + following.retry_after))
            self._requests.fail_all(error)
            self._streak = 0
        if given_up and not self.first_ready.done():
            self.first_ready.set_exception(failure.error or WorkerFailed(failure.message))
