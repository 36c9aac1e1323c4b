"""The planner: reads the machine afresh, decides, waits for memory, and weighs what was loaded."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog

from kvserve.core.findings import NOTHING_FOUND, Findings, likely
from kvserve.core.floors import why_below
from kvserve.core.loss import NOTHING_MEASURED, Quality
from kvserve.core.machine import Backend, Build, Gpu, Host, Machine
from kvserve.core.plan import Launch, Plan, Request, Task
from kvserve.core.selector import default_reserve, select
from kvserve.core.shape import ModelShape
from kvserve.device.host import process_rss, read_host
from kvserve.device.nvml import process_memory, read_gpus
from kvserve.ipc.messages import Loaded
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.confirming import Asker, confirm
from kvserve.supervisor.status import Measured
from kvserve.units import MIB

log = structlog.get_logger(__name__)

GPU_SETTLE_SECONDS = 5.0
"""Consumer drivers give a dead process's memory back up to 1.5 s late."""
HOST_SETTLE_SECONDS = 1.0
MEASURING_BYTES = 1024 * MIB
"""Free memory of each GPU beside which a CUDA context of about 500 MiB does no harm."""
_POLL_SECONDS = 0.05
_OUT_OF_MEMORY_STEP_BYTES = 256 * MIB


class Machines:
    """Reads the machine: the readers are arguments so that tests can give recorded ones."""

    def __init__(
        self,
        build: Build,
        read_gpus: Callable[[], tuple[Gpu, ...]] = read_gpus,
        read_host: Callable[[], Host] = read_host,
        gpu_process_memory: Callable[[str, int], int | None] = process_memory,
        host_process_memory: Callable[[int], int | None] = process_rss,
    ) -> None:
        self.build = build
        self._read_gpus = read_gpus
        self._read_host = read_host
        self.gpu_process_memory = gpu_process_memory
        self.host_process_memory = host_process_memory

    def read(self) -> Machine:
        """The machine at this moment; GPUs that the build cannot use are left out."""
        gpus = self._read_gpus() if self.build.cuda else ()
        return Machine(host=self._read_host(), gpus=gpus, build=self.build)


class MachinePlanner:
    """Plans for one model and one standing request, of which only the context changes. `quality`
    gives what was measured, at each plan anew."""

    def __init__(
        self,
        shape: ModelShape,
        request: Request,
        machines: Machines,
        calibration: Calibration,
        settle_seconds: float = GPU_SETTLE_SECONDS,
        oracle: Asker | None = None,
        quality: Callable[[], Quality] = lambda: NOTHING_MEASURED,
    ) -> None:
        self._shape = shape
        self._request = request
        self._machines = machines
        self._calibration = calibration
        self._oracle = oracle
        self._quality = quality
        self._settle_seconds = settle_seconds
        self._told: set[Launch] = set()
        self._free_before: dict[str, int] = {}

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
        decide = self.decide_confirmed if may_measure else self.decide
        return await asyncio.to_thread(
            decide, machine, n_ctx, returning_bytes, n_out_of_memory, task=task
        )

    def allows(self, plan: Plan, task: Task) -> bool:
        """Whether a plan's KV types are good enough for a task. A floor that the user set by type
        is the last word."""
        launch = plan.chosen.launch
        request = replace(self._request, n_ctx=launch.n_ctx, also=task)
        return why_below(launch.pair, self._shape, request, self._quality()) is None

    def decide(
        self,
        machine: Machine,
        n_ctx: int | None,
        returning_bytes: int,
        n_out_of_memory: int,
        *,
        task: Task | None = None,
    ) -> Plan:
        """The same for a machine that was read already, with what is known of llama.cpp's figures
        and without asking for more."""
        findings = NOTHING_FOUND if self._oracle is None else self._oracle.findings
        return self._decide(machine, n_ctx, returning_bytes, n_out_of_memory, task, findings)

    def decide_confirmed(
        self,
        machine: Machine,
        n_ctx: int | None,
        returning_bytes: int,
        n_out_of_memory: int,
        *,
        task: Task | None = None,
        ahead: bool = False,
    ) -> Plan:
        """The same, with a chosen launch that llama.cpp laid out, where it can be asked. Takes
        about a second for what is not known yet, and a CUDA context on the GPU meanwhile. With
        `ahead` the launches that reloads may need are asked about in the same go."""
        plan = self.decide(machine, n_ctx, returning_bytes, n_out_of_memory, task=task)
        if self._oracle is None:
            return plan
        decide = partial(self._decide, machine, n_ctx, returning_bytes, n_out_of_memory, task)
        plan = confirm(plan, self._oracle, decide, likely(plan) if ahead else ())
        self._tell(plan)
        return plan

    def _tell(self, plan: Plan) -> None:
        for candidate in plan.differences:
            if candidate.launch in self._told:
                continue
            self._told.add(candidate.launch)
            log.warning(
                "computed sizes differ from llama.cpp's; its own are used",
                cache_type=str(candidate.launch.pair),
                n_ctx=candidate.launch.n_ctx,
                n_gpu_layers=candidate.launch.n_gpu_layers,
                computed_bytes=candidate.formula_bytes,
                exact_bytes=candidate.memory.own_bytes,
            )

    def _decide(
        self,
        machine: Machine,
        n_ctx: int | None,
        returning_bytes: int,
        n_out_of_memory: int,
        task: Task | None,
        findings: Findings,
    ) -> Plan:
        request = replace(self._request, n_ctx=n_ctx, also=task)
        machine = _with_returned(machine, request, returning_bytes)
        if n_out_of_memory:
            free = sum(gpu.free_bytes for gpu in machine.gpus) or machine.host.free_bytes
            base = request.reserve_bytes
            reserve = default_reserve(free) if base is None else base
            reserve += n_out_of_memory * _OUT_OF_MEMORY_STEP_BYTES
            request = replace(request, reserve_bytes=reserve)
        overheads = self._calibration.overheads(machine.gpus, machine.build, self._shape)
        return select(self._shape, machine, request, overheads, findings, self._quality())

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


def _with_returned(machine: Machine, request: Request, returning_bytes: int) -> Machine:
    """The machine with the leaving worker's memory counted as free, shared out over the GPUs."""
    if not returning_bytes:
        return machine
    if not machine.gpus or request.backend is Backend.CPU:
        host = replace(machine.host, free_bytes=machine.host.free_bytes + returning_bytes)
        return replace(machine, host=host)
    share = returning_bytes // len(machine.gpus)
    gpus = tuple(
        replace(gpu, free_bytes=min(gpu.total_bytes, gpu.free_bytes + share))
        for gpu in machine.gpus
    )
    return replace(machine, gpus=gpus)
