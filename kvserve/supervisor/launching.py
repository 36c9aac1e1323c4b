"""What the supervisor needs to start workers: its policy, and who spawns, plans and weighs."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from msgspec import structs

from kvserve.core.growth import Adapt, GrowthPolicy
from kvserve.core.machine import Backend
from kvserve.core.plan import Launch, Plan, Task
from kvserve.ipc.messages import Load, Loaded, Speculate, ToWorker, Transcode
from kvserve.supervisor.loads import load_of
from kvserve.supervisor.states import Attempt, Worker
from kvserve.supervisor.status import Measured


class Spawner(Protocol):
    """Starts worker processes."""

    async def spawn(self, launch: Launch) -> Worker:
        """A new worker. Raises WorkerFailed."""
        ...

    async def spawn_ahead(self, launch: Launch) -> None:
        """Prepare for a `spawn` that comes soon; returns when that is done. Never raises."""
        ...

    async def transcode_ahead(self, message: Transcode) -> None:
        """Have what `spawn_ahead` prepared rewrite sequences; returns when that is done, or there
        is nobody to do it. Never raises."""
        ...

    def tell_ahead(self, message: ToWorker) -> None:
        """Send a frame to what `spawn_ahead` prepared, if it did."""
        ...

    async def close(self) -> None:
        """Nothing is spawned any more: end what was prepared."""
        ...


class Planner(Protocol):
    """Reads the machine and decides."""

    async def plan(
        self,
        n_ctx: int | None,
        *,
        task: Task | None = None,
        returning_bytes: int = 0,
        n_out_of_memory: int = 0,
    ) -> Plan:
        """Decide against fresh free memory plus `returning_bytes` that a leaving worker gives
        back; each out-of-memory seen at load raises the reserve. The KV types are good enough for
        `task` too. Raises DoesNotFit, UsageError."""
        ...

    def allows(self, plan: Plan, task: Task) -> bool:
        """Whether a plan's KV types are good enough for a task."""
        ...

    async def wait_for_room(self, plan: Plan) -> bool:
        """Poll the device until the plan's memory is free; False where it stays taken."""
        ...

    async def room_beside(self, plan: Plan) -> int | None:
        """Whether a plan's worker fits now, beside whatever runs: the host's bytes that it and the
        reserve would leave, None where it does not fit."""
        ...

    async def weigh(self, plan: Plan, loaded: Loaded, pid: int) -> Measured:
        """Read what the worker takes after a load, and learn from it."""
        ...


NO_GROWTH = GrowthPolicy(Adapt.OFF, max_ctx=0)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits, in seconds where not said otherwise; `request_timeout` None is no limit.

    `carry_bytes` is the host memory that sequences may take on their way to the next worker, None
    for a quarter of what is free then; `cache_bytes` those that had to leave a worker's KV cache,
    None for an eighth. `pause_timeout` is for the step that a pause waits for: a worker that takes
    longer is killed. `speculate` says where proposed tokens come from, at most `n_draft_each` of
    one sequence.
    """

    model_path: str
    model_identity: str
    n_threads: int
    queue_limit: int = 256
    request_timeout: float | None = 600.0
    drain_timeout: float = 30.0
    pause_timeout: float = 10.0
    load_timeout: float = 600.0
    step_timeout: float = 120.0
    carry_bytes: int | None = 0
    cache_bytes: int | None = 0
    growth: GrowthPolicy = NO_GROWTH
    serves_below_floor: bool = True
    speculate: Speculate = "off"
    n_draft_each: int = 0
    draft_path: str | None = None

    def cache_limit(self, plan: Plan) -> int:
        """The host memory for what leaves the KV cache under a plan, in bytes."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        return min(plan.machine.host.free_bytes // 8, _spare_on_host(plan))

    def carry_limit(self, following: Plan) -> int:
        """The host memory for sequences on their way to `following`, in bytes."""
        if self.carry_bytes is not None:
            return self.carry_bytes
        return min(following.machine.host.free_bytes // 4, _spare_on_host(following))


def _spare_on_host(plan: Plan) -> int:
    """Half of what a plan leaves of the host's memory beside itself and the reserve."""
    chosen, host = plan.chosen, plan.machine.host
    on_cpu = chosen.launch.backend is Backend.CPU
    left = chosen.headroom_bytes if on_cpu else host.free_bytes - chosen.host_memory.total_bytes
    return max(0, left // 2)


def load_message(attempt: Attempt, policy: Policy) -> Load:
    """The first frame to a worker."""
    return structs.replace(
        load_of(policy.model_path, attempt.plan.chosen.launch, policy.n_threads),
        extra_buffers=attempt.extra_buffers,
        carried=attempt.carried.paths,
        cache_ram_bytes=policy.cache_limit(attempt.plan),
        speculate=policy.speculate,
        n_draft_each=policy.n_draft_each,
        draft_path=policy.draft_path,
    )


def fingerprint(plan: Plan, policy: Policy) -> str:
    """The OpenAI `system_fingerprint`: another one for another model, build or launch."""
    facts = (policy.model_identity, plan.machine.build.version, plan.chosen.launch)
    return "kvs-" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
