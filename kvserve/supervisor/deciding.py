"""Decides for one model: reads the machine, asks llama.cpp where it can, and chooses.

`kvserve plan` rests on this module alone: it is imported without asyncio and structlog, which take
longer to import than a plan takes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvserve.core.findings import NOTHING_FOUND, Findings, likely
from kvserve.core.floors import why_below
from kvserve.core.loss import NOTHING_MEASURED, Quality
from kvserve.core.machine import Backend, Build, Gpu, Host, Machine
from kvserve.core.plan import Plan, Request, Task
from kvserve.core.selector import default_reserve, select
from kvserve.core.shape import ModelShape
from kvserve.device.host import process_rss, read_host
from kvserve.device.nvml import process_memory, read_gpus
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.confirming import Asker, confirm
from kvserve.units import MIB

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


class Decider:
    """Decides for one model and one standing request, of which only the context changes. `quality`
    gives what was measured, at each plan anew."""

    def __init__(
        self,
        shape: ModelShape,
        request: Request,
        machines: Machines,
        calibration: Calibration,
        oracle: Asker | None = None,
        quality: Callable[[], Quality] = lambda: NOTHING_MEASURED,
    ) -> None:
        self.shape = shape
        self.machines = machines
        self.calibration = calibration
        self._request = request
        self._oracle = oracle
        self._quality = quality

    def allows(self, plan: Plan, task: Task) -> bool:
        """Whether a plan's KV types are good enough for a task. A floor that the user set by type
        is the last word."""
        launch = plan.chosen.launch
        request = replace(self._request, n_ctx=launch.n_ctx, also=task)
        return why_below(launch.pair, self.shape, request, self._quality()) is None

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
        return confirm(plan, self._oracle, decide, likely(plan) if ahead else ())

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
        overheads = self.calibration.overheads(machine.gpus, machine.build, self.shape)
        return select(self.shape, machine, request, overheads, findings, self._quality())


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
