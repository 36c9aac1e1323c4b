"""The host's memory and cores, and facts about processes; the only importer of `psutil`."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvserve.core.machine import Host
from kvserve.device.cgroup import read_limits

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the kernel reports of the whole machine.

    `available_bytes` can be had without swapping; `cpus` are the logical CPUs that this process
    may run on, `n_physical` all the machine's cores (None where unknown).
    """

    total_bytes: int
    available_bytes: int
    cpus: frozenset[int]
    n_physical: int | None


def read_kernel() -> Kernel:
    """Read the machine as it is now."""
    memory = psutil.virtual_memory()
    return Kernel(
        total_bytes=memory.total,
        available_bytes=memory.available,
        cpus=frozenset(os.sched_getaffinity(0)),
        n_physical=psutil.cpu_count(logical=False),
    )


def read_host(root: Path = _ROOT, kernel: Kernel | None = None) -> Host:
    """Read the host's memory and cores within the limits of the process's control groups.

    `n_cores` counts physical cores that the affinity mask allows, at most the CPU quota rounded
    up, and at least 1. `root` is where `proc` and `sys` lie.
    """
    kernel = kernel or read_kernel()
    limits = read_limits(root)
    n_cores = _n_cores(root, kernel)
    if limits.cpus is not None:
        n_cores = min(n_cores, math.ceil(limits.cpus))
    limited = limits.memory_bytes is not None and limits.memory_bytes < kernel.total_bytes
    free_bytes = kernel.available_bytes
    if limits.free_bytes is not None:
        free_bytes = min(free_bytes, limits.free_bytes)
    return Host(
        total_bytes=min(kernel.total_bytes, limits.memory_bytes or kernel.total_bytes),
        free_bytes=free_bytes,
        n_cores=max(1, n_cores),
        limited_by_cgroup=limited,
    )


def process_started_at(pid: int, root: Path = _ROOT) -> float | None:
    """Return when a process started, in seconds since the machine's boot; None where there is none.

    Since boot, because the wall clock may be set while the process runs: a pid and this number
    name one process. Zombies count as gone.
    """
    try:
        text = (root / "proc" / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # proc(5): field 2, the name, may hold brackets; field 3 is the state, field 22 the start.
    fields = text[text.rindex(")") + 1 :].split()
    if fields[0] in "ZX":
        return None
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def process_alive(pid: int, started_at: float, root: Path = _ROOT) -> bool:
    """Whether the process that had this pid at `started_at` (`process_started_at`) still runs."""
    return process_started_at(pid, root) == started_at


def process_rss(pid: int) -> int | None:
    """Return the resident bytes of a process; None where there is none or it may not be read."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.Error, ValueError):
        return None


def _n_cores(root: Path, kernel: Kernel) -> int:
    """Count the cores of the allowed CPUs: hyperthreads of one core list the same siblings."""
    topology = root / "sys/devices/system/cpu"
    try:
        cores = {
            (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
            for cpu in kernel.cpus
        }
    except OSError:
        return min(len(kernel.cpus), kernel.n_physical or len(kernel.cpus))
    return len(cores)
