"""The planner: decides off the event loop, waits for memory, and weighs what was loaded."""

import asyncio

import structlog

from kvserve.core.machine import Backend, Gpu, Machine
from kvserve.core.plan import Launch, Plan, Task
from kvserve.core.selector import default_reserve
from kvserve.ipc.messages import Loaded
from kvserve.supervisor.deciding import Decider
from kvserve.supervisor.status import Measured
from kvserve.units import MIB

log = structlog.get_logger(__name__)

GPU_SETTLE_SECONDS = 5.0
"""Consumer drivers give a dead process's memory back up to 1.5 s late."""
HOST_SETTLE_SECONDS = 1.0
MEASURING_BYTES = 1024 * MIB
"""Free memory of each GPU beside which a CUDA context of about 500 MiB does no harm."""
_POLL_SECONDS = 0.05


class MachinePlanner:
    """Plans with a decider, off the event loop, and watches the machine before and after a load."""

    def __init__(self, decider: Decider, settle_seconds: float = GPU_SETTLE_SECONDS) -> None:
        self._decider = decider
        self._machines = decider.machines
        self._calibration = decider.calibration
        self._settle_seconds = settle_seconds
        self._free_before: dict[str, int] = {}
        self._told: set[Launch] = set()

    async def plan(
        self,
        n_ctx: int | None,
        *,
        task: Task | None = None,
        returning_bytes: int = 0,
        n_out_of_memory: int = 0,
    ) -> Plan:
        """Decide against fresh free memory. Raises DoesNotFit, UsageError."""
        machine = await asyncio.to_thread(self._machines.read)
        may_measure = _has_room_to_measure(machine)
        decide = self._decider.decide_confirmed if may_measure else self._decider.decide
        plan = await asyncio.to_thread(
            decide, machine, n_ctx, returning_bytes, n_out_of_memory, task=task
        )
        self._tell(plan)
        return plan

    def _tell(self, plan: Plan) -> None:
        for candidate in plan.differences:
            if candidate.launch in self._told:
                continue
            self._told.add(candidate.launch)
            log.warning(
                "llama.cpp takes another size than was computed, and the plan rests on its own",
                cache_type=str(candidate.launch.pair),
                n_ctx=candidate.launch.n_ctx,
                n_gpu_layers=candidate.launch.n_gpu_layers,
                computed_bytes=candidate.formula_bytes,
                exact_bytes=candidate.memory.own_bytes,
            )

    def allows(self, plan: Plan, task: Task) -> bool:
        """Whether a plan's KV types are good enough for a task."""
        return self._decider.allows(plan, task)

    async def wait_for_room(self, plan: Plan) -> bool:
        """Poll until the plan's memory is free; False where it stays taken."""
        on_gpu = plan.chosen.launch.backend is Backend.CUDA
        deadline = asyncio.get_running_loop().time()
        deadline += self._settle_seconds if on_gpu else HOST_SETTLE_SECONDS
        while True:
            machine = await asyncio.to_thread(self._machines.read)
            self._free_before = {gpu.uuid: gpu.free_bytes for gpu in machine.gpus}
            free = sum(self._free_before.values()) if on_gpu else machine.host.free_bytes
            if free >= plan.chosen.memory.total_bytes:
                return True
            if asyncio.get_running_loop().time() >= deadline:
                log.warning(
                    "memory that was planned with is taken",
                    needed_bytes=plan.chosen.memory.total_bytes,
                    free_bytes=free,
                )
                return False
            await asyncio.sleep(_POLL_SECONDS)

    async def room_beside(self, plan: Plan) -> int | None:
        """Whether a plan's worker fits now beside the running one, weights and all, less the
        reserve: on each GPU by its share of the layers, and on the host. Returns the host's bytes
        left then, None where it does not fit.

        Mapped weights are page cache, which counts as free and as taken once, whoever shares it.
        """
        machine = await asyncio.to_thread(self._machines.read)
        self._free_before = {}  # a worker that leaves meanwhile would be taken for this one's use
        on_gpu = plan.chosen.launch.backend is Backend.CUDA
        reserve = plan.request.reserve_bytes

        def unreserved(free_bytes: int) -> int:
            return free_bytes - (default_reserve(free_bytes) if reserve is None else reserve)

        host_bytes = unreserved(machine.host.free_bytes)
        host_bytes -= (plan.chosen.host_memory if on_gpu else plan.chosen.memory).total_bytes
        if host_bytes < 0 or (on_gpu and not machine.gpus):
            return None
        if on_gpu:
            parts = plan.chosen.launch.tensor_split or (1.0,) * len(machine.gpus)
            for gpu, part in zip(machine.gpus, parts, strict=False):
                needed_bytes = plan.chosen.memory.total_bytes * part / sum(parts)
                if unreserved(gpu.free_bytes) < needed_bytes:
                    return None
        return host_bytes

    async def weigh(self, plan: Plan, loaded: Loaded, pid: int) -> Measured:
        """Read what the worker takes. On a GPU the overhead is learnt for the next plan."""
        return await asyncio.to_thread(self._weigh, plan, loaded, pid)

    def _weigh(self, plan: Plan, loaded: Loaded, pid: int) -> Measured:
        memory = plan.chosen.memory
        if plan.chosen.launch.backend is Backend.CPU:
            # Mapped weights count as free already, being page cache.
            anonymous = memory.total_bytes - memory.weights_bytes
            rss = self._machines.host_process_memory(pid)
            return Measured(loaded.memory, device_bytes=rss, returning_bytes=anonymous)
        gpus = self._machines.read().gpus
        taken = self._taken_on_gpus(gpus, pid)
        if taken is None:
            return Measured(loaded.memory, None, returning_bytes=memory.total_bytes)
        buffers = memory.total_bytes - memory.runtime_bytes
        overhead = (taken - buffers) // max(1, len(gpus))
        # The computed buffer of a split model is coarser than the overhead.
        sure = plan.confirmed or plan.chosen.launch.n_gpu_layers > plan.shape.n_layer
        if sure and self._calibration.learn(gpus[0], plan.machine.build, plan.shape, overhead):
            log.info("learnt GPU overhead", overhead_bytes=overhead, gpu=gpus[0].name)
        return Measured(loaded.memory, device_bytes=taken, returning_bytes=taken)

    def _taken_on_gpus(self, gpus: tuple[Gpu, ...], pid: int) -> int | None:
        """By process where the driver tells; else the drop in free memory since the spawn."""
        by_process = [self._machines.gpu_process_memory(gpu.uuid, pid) for gpu in gpus]
        known = [taken for taken in by_process if taken is not None]
        if gpus and len(known) == len(gpus):
            return sum(known)
        drops = [self._free_before.get(gpu.uuid, 0) - gpu.free_bytes for gpu in gpus]
        return sum(drops) if gpus and all(drop > 0 for drop in drops) else None


def _has_room_to_measure(machine: Machine) -> bool:
    """Whether a measuring process fits beside whatever runs on the GPUs now."""
    return all(gpu.free_bytes >= MEASURING_BYTES for gpu in machine.gpus)
