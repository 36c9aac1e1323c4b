"""What follows a worker that failed: again, back, later, or never. Values in, values out."""

from dataclasses import dataclass, replace

from kvserve.errors import KvserveError, WorkerFailed
from kvserve.supervisor.exits import TRAPS, Exit
from kvserve.supervisor.states import Attempt, Loading

MAX_STREAK = 4
"""Failures in a row, without an answered request between them, before a long pause."""
RETRY_SECONDS = 60.0
MAX_OUT_OF_MEMORY = 3
_LONGEST_DELAY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Again:
    """Spawn for `attempt` after `delay` seconds."""

    attempt: Attempt
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Refuse requests with `error`, and try `attempt` again after `retry_after` seconds."""

    attempt: Attempt
    error: KvserveError
    retry_after: float = RETRY_SECONDS


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt in words. `error` is the original one where there is one."""

    message: str
    error: KvserveError | None = None


def load_failure(state: Loading, exit_: Exit) -> Failure:
    """Why a worker that was loading is gone: its own account, else how it ended."""
    if state.failed is not None:
        return Failure(f"the model could not be loaded: {state.failed.message}")
    last = (exit_.last_words.splitlines() or [""])[-1][:300]
    return Failure(f"the worker died while loading: {exit_.cause}" + (f": {last}" if last else ""))


def same_plan_differently(state: Loading, exit_: Exit) -> Attempt | None:
    """The try that mends a known cause: repacked CPU kernels that trap, or memory that was less
    than planned. None where the cause is another, or was mended often enough."""
    attempt = state.attempt
    if state.failed is None:
        trapped = exit_.returncode in TRAPS and attempt.extra_buffers
        return replace(attempt, extra_buffers=False) if trapped else None
    may_step_down = attempt.fallback is None and attempt.n_out_of_memory < MAX_OUT_OF_MEMORY
    if state.failed.out_of_memory and may_step_down:
        return replace(attempt, replan=True, n_out_of_memory=attempt.n_out_of_memory + 1)
    return None


def after_failure(
    attempt: Attempt, failure: Failure, *, streak: int, ever_ready: bool
) -> Again | GiveUp:
    """What follows a failed attempt, `streak` failures in a row counted with this one.

    A change of plan goes back to the plan before it. A daemon that never served gives up at once:
    its user is watching. Otherwise the same plan is tried again, ever later.
    """
    if attempt.fallback is not None:
        back = replace(
            attempt,
            plan=attempt.fallback,
            reason="rollback",
            replan=False,
            n_out_of_memory=0,
            fallback=None,
            failure=failure.message,
            beside_bytes=None,
        )
        return Again(back)
    following = replace(
        attempt,
        reason="restart",
        change=None,
        failure=None,
        paused_at=None,
        beside_bytes=None,
        in_order_because=None,
    )
    if not ever_ready or streak > MAX_STREAK:
        error = failure.error or WorkerFailed(failure.message, retry_after=RETRY_SECONDS)
        return GiveUp(replace(following, replan=True), error)
    delay = 0.0 if streak <= 1 else min(2.0 ** (streak - 2), _LONGEST_DELAY_SECONDS)
    return Again(following, delay)
