"""The supervisor's states, each with its own data, and the events that it is told.

`Supervisor` alone assigns a state; which may follow which stands in `core.lifecycle`.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from kvserve.core.lifecycle import Phase
from kvserve.core.plan import Plan
from kvserve.errors import KvserveError
from kvserve.ipc.messages import FromWorker, Loaded, LoadFailed, ToWorker
from kvserve.supervisor.admission import Job
from kvserve.supervisor.carry import NOTHING, Carried, Copied
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.status import Measured, ReloadOutcome


class Worker(Protocol):
    """A worker process as the supervisor sees it."""

    @property
    def pid(self) -> int:
        """Its process id, also that of its process group."""
        ...

    def send(self, message: ToWorker) -> None:
        """Queue a frame; never blocks."""
        ...

    async def receive(self) -> FromWorker | None:
        """The next frame, None when there will be no more."""
        ...

    def kill(self, why: str | None = None) -> None:
        """SIGKILL to the whole process group, for the reason `why`; safe to call twice."""
        ...

    async def wait(self) -> Exit:
        """Wait for the end and reap it."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """A change of context under way: who waits for it (None: nobody, a request needed it), since
    when, what it replaces, why, and the context that was asked for (None: the longest)."""

    answer: asyncio.Future[ReloadOutcome] | None
    started_at: float
    previous: Plan
    reason: str = "context"
    n_ctx: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a worker.

    `replan` decides anew just before the spawn, with a reserve raised for each of
    `n_out_of_memory`. `fallback` is the plan to return to where this try fails; `failure` is what
    made an earlier try of the same change fail. `extra_buffers` False loads without llama.cpp's
    repacked CPU weights. `carried` are the sequences of the worker before, which was paused at
    `paused_at`; `copied` is what that one was asked to copy before, None before it is asked and
    when it has paused. `beside_bytes` is the host memory left beside both workers where this
    one loads while the other still serves, None where it comes after it; `in_order_because` is why
    an overlapped start of the same change failed.
    """

    plan: Plan
    reason: str
    replan: bool = False
    n_out_of_memory: int = 0
    extra_buffers: bool = True
    fallback: Plan | None = None
    change: Change | None = None
    failure: str | None = None
    carried: Carried = NOTHING
    copied: Copied | None = None
    paused_at: float | None = None
    beside_bytes: int | None = None
    in_order_because: str | None = None


@dataclass(frozen=True, slots=True)
class Idle:
    """No worker; one will be spawned at `start_at` (clock seconds), None while one is being."""

    attempt: Attempt
    start_at: float | None
    phase: Phase = Phase.IDLE


@dataclass(frozen=True, slots=True)
class Loading:
    """A worker loads the model. `failed` is its own account of why it cannot."""

    worker: Worker
    attempt: Attempt
    since: float
    heard_at: float
    fraction: float = 0.0
    failed: LoadFailed | None = None
    phase: Phase = Phase.LOADING


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker answers."""

    worker: Worker
    attempt: Attempt
    loaded: Loaded
    phase: Phase = Phase.SERVING


@dataclass(frozen=True, slots=True)
class Overlapping:
    """The worker answers while the next one, `successor`, loads beside it for `following`; None
    while it is being spawned. `failed` is the successor's own account of why it cannot.

    When the successor has `answered` that it is loaded, it takes in what the worker has copied
    ahead, for which `waits_until` is the limit.
    """

    worker: Worker
    attempt: Attempt
    loaded: Loaded
    following: Attempt
    successor: Worker | None
    since: float
    heard_at: float
    fraction: float = 0.0
    failed: LoadFailed | None = None
    answered: Loaded | None = None
    waits_until: float = 0.0
    phase: Phase = Phase.OVERLAPPING


@dataclass(frozen=True, slots=True)
class Successor:
    """The next worker, loaded beside the one that still answers."""

    worker: Worker
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker finishes what runs, to make room for `following`. It is told to pause at
    `pause_at`, and not before the next one has imported its modules (`awake`) and rewritten what
    was copied ahead, for which `waits_until` is the limit; from then on `kill_at` is set.
    `successor` takes over where it is there already."""

    worker: Worker
    attempt: Attempt
    loaded: Loaded
    following: Attempt
    pause_at: float
    kill_at: float | None = None
    successor: Successor | None = None
    waits_until: float = 0.0
    awake: bool = False
    phase: Phase = Phase.DRAINING


@dataclass(frozen=True, slots=True)
class Handover:
    """The next worker is loaded and takes in what the paused one exported, which leaves."""

    worker: Worker
    attempt: Attempt
    loaded: Loaded
    since: float
    phase: Phase = Phase.HANDOVER


@dataclass(frozen=True, slots=True)
class Leaving:
    """The drained worker exits; it is killed at `kill_at`."""

    worker: Worker
    following: Attempt
    kill_at: float
    phase: Phase = Phase.LEAVING


@dataclass(frozen=True, slots=True)
class Failing:
    """Every try failed; the next one is at `retry_at`. Requests are refused until then."""

    attempt: Attempt
    error: KvserveError
    retry_at: float
    phase: Phase = Phase.FAILED


@dataclass(frozen=True, slots=True)
class Stopping:
    """Running requests get until `shutdown_at` (None: the worker was told), the worker until
    `kill_at`."""

    worker: Worker
    shutdown_at: float | None
    kill_at: float
    phase: Phase = Phase.STOPPING


@dataclass(frozen=True, slots=True)
class Stopped:
    """Over."""

    phase: Phase = Phase.STOPPED


State = (
    Idle
    | Loading
    | Serving
    | Overlapping
    | Draining
    | Handover
    | Leaving
    | Failing
    | Stopping
    | Stopped
)


def worker_of(state: State) -> Worker | None:
    """The worker of a state that has one."""
    return None if isinstance(state, Idle | Failing | Stopped) else state.worker


def successor_of(state: State) -> Worker | None:
    """The worker that is to follow and lives already."""
    match state:
        case Overlapping(successor=worker):
            return worker
        case Draining(successor=Successor(worker)):
            return worker
        case _:
            return None


def attempt_of(state: State) -> Attempt | None:
    """The attempt that is under way or in force; in a change, the one to come."""
    match state:
        case Overlapping(following=following) | Draining(following=following):
            return following
        case Leaving(following=following):
            return following
        case Idle(attempt=attempt) | Loading(attempt=attempt) | Serving(attempt=attempt):
            return attempt
        case Handover(attempt=attempt):
            return attempt
        case Failing(attempt=attempt):
            return attempt
        case _:
            return None


def plan_of(state: State) -> Plan | None:
    """The plan in force, or the one being loaded."""
    if isinstance(state, Overlapping | Draining):
        return state.attempt.plan
    attempt = attempt_of(state)
    return None if attempt is None else attempt.plan


@dataclass(frozen=True, slots=True)
class Submitted:
    """A caller put a request in line."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A caller gave a request up."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Spawned:
    """A worker process exists; `plan` is the one it was spawned for, made anew where the memory
    had changed."""

    worker: Worker
    plan: Plan


@dataclass(frozen=True, slots=True)
class NotSpawned:
    """No worker could be started for the attempt."""

    error: KvserveError


@dataclass(frozen=True, slots=True)
class SpawnedAhead:
    """The process that the next worker will run in is ready, as far as it can be."""


@dataclass(frozen=True, slots=True)
class TranscodedAhead:
    """The process that the next worker will run in has rewritten what was copied ahead, or will
    not."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A frame from a worker."""

    worker: Worker
    message: FromWorker


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker process is gone and reaped."""

    worker: Worker
    exit: Exit


@dataclass(frozen=True, slots=True)
class Weighed:
    """The devices were read after a load."""

    worker: Worker
    measured: Measured


@dataclass(frozen=True, slots=True)
class ChangeAsked:
    """Somebody wants another context."""

    n_ctx: int | None
    answer: asyncio.Future[ReloadOutcome]


@dataclass(frozen=True, slots=True)
class ChangePlanned:
    """The plan for a change is made, or cannot be. `beside_bytes` is the host memory that its
    worker would leave beside the present one; None where the two do not fit together."""

    change: Change
    result: Plan | KvserveError
    beside_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The daemon is to end."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines are looked at."""


SupervisorEvent = (
    Submitted
    | Cancelled
    | Spawned
    | NotSpawned
    | SpawnedAhead
    | TranscodedAhead
    | Heard
    | Ended
    | Weighed
    | ChangeAsked
    | ChangePlanned
    | StopAsked
    | Tick
)
