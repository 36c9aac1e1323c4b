"""GPUs and their memory as the NVIDIA driver reports them; the only importer of `pynvml`.

A box without a GPU, a driver or the NVML library is an ordinary answer here, never an exception.
"""

import atexit
import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pynvml

from kvserve.core.machine import Gpu
from kvserve.device.binding import Binding, MemoryInfo
from kvserve.device.visible import DeviceIds, Visible, order_is_ambiguous, visible_uuids

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GpuReport:
    """The GPUs a CUDA program would see, in its order.

    `reason` says why there are none, or why one that the driver lists is missing; `notes` are
    other things the user should know. Both are one line each.
    """

    gpus: tuple[Gpu, ...]
    driver_version: str | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    """One device as listed; `gpu` is None where the driver does not report its memory."""

    ids: DeviceIds
    name: str
    gpu: Gpu | None
    mig: tuple[Gpu, ...] = ()


class Nvml:
    """One NVML session, begun at first use and ended at exit. Any thread may call it."""

    def __init__(self, binding: Binding = pynvml) -> None:
        self._nvml = binding
        self._lock = threading.RLock()
        self._started = False

    def report(self, environ: Mapping[str, str]) -> GpuReport:
        """Read all GPUs that `environ` lets a CUDA program see. Raises nothing."""
        with self._lock:
            failure = self._start()
            if failure is not None:
                return GpuReport((), reason=failure)
            driver_version = self._try(self._nvml.nvmlSystemGetDriverVersion)
            try:
                found = [
                    self._try(self._read, index) or _unreadable(index)
                    for index in range(self._nvml.nvmlDeviceGetCount())
                ]
            except self._nvml.NVMLError as error:
                return GpuReport((), driver_version, f"the NVIDIA driver failed: {error}")
        return replace(_visible(found, environ), driver_version=driver_version)

    def used_bytes(self, gpu_uuid: str) -> int | None:
        """Return the bytes in use on a GPU by all processes, None where it cannot be read.

        The driver's own reserve is left out where the driver tells it apart (since 510).
        """
        with self._lock:
            memory = self._memory(self._handle(gpu_uuid))
        return None if memory is None else memory.used

    def process_memory(self, gpu_uuid: str, pid: int) -> int | None:
        """Return the GPU bytes that one process holds.

        None where the driver does not say (WSL, some vGPUs) or does not list the pid: it never
        took a CUDA context, or this is a container and the driver counts in the host's pids.
        """
        with self._lock:
            handle = self._handle(gpu_uuid)
            if handle is None:
                return None
            listed = self._try(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        known = [p.usedGpuMemory for p in listed if p.pid == pid and p.usedGpuMemory is not None]
        return sum(known) if known else None

    def processes(self, gpu_uuid: str) -> tuple[tuple[int, int | None], ...]:
        """List the processes with a CUDA context on a GPU: pid, and bytes where the driver says.

        The pids are the host's, also in a container.
        """
        with self._lock:
            handle = self._handle(gpu_uuid)
            if handle is None:
                return ()
            listed = self._try(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        return tuple((process.pid, process.usedGpuMemory) for process in listed)

    def close(self) -> None:
        """End the session; the next call begins another."""
        with self._lock:
            if self._started:
                self._started = False
                self._try(self._nvml.nvmlShutdown)
                atexit.unregister(self.close)

    def _start(self) -> str | None:
        """Begin the session where it is not begun; the answer is why it cannot be."""
        if self._started:
            return None
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            return f"no NVIDIA driver answers: {error}"
        self._started = True
        atexit.register(self.close)
        return None

    def _try(self, call: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None

    def _handle(self, gpu_uuid: str) -> Any:
        if self._start() is not None:
            return None
        return self._try(self._nvml.nvmlDeviceGetHandleByUUID, gpu_uuid)

    def _memory(self, handle: Any) -> MemoryInfo | None:
        if handle is None:
            return None
        nvml = self._nvml
        memory = self._try(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        return memory or self._try(nvml.nvmlDeviceGetMemoryInfo, handle)

    def _read(self, index: int) -> _Found:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu = self._gpu(index, handle)
        mig = self._mig(index, handle)
        ids = DeviceIds(nvml.nvmlDeviceGetUUID(handle), tuple(part.uuid for part in mig))
        return _Found(ids, nvml.nvmlDeviceGetName(handle), gpu, mig)

    def _gpu(self, index: int, handle: Any) -> Gpu | None:
        memory = self._memory(handle)
        if memory is None or memory.total == 0:
            return None
        nvml = self._nvml
        return Gpu(
            index=index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            total_bytes=memory.total,
            free_bytes=memory.free,
            compute_capability=self._try(nvml.nvmlDeviceGetCudaComputeCapability, handle),
            bandwidth=self._bandwidth(handle),
        )

    def _bandwidth(self, handle: Any) -> float | None:
        """Bytes/s: two transfers for each cycle of the memory clock (MHz), over the bus (bits)."""
        nvml = self._nvml
        clock = self._try(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
        width = self._try(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        return clock * 1e6 * 2 * width / 8 if clock and width else None

    def _mig(self, index: int, handle: Any) -> tuple[Gpu, ...]:
        """List the MIG instances; they have memory of their own, and no bandwidth is told."""
        nvml = self._nvml
        mode = self._try(nvml.nvmlDeviceGetMigMode, handle)
        if not mode or not mode[0]:
            return ()
        capability = self._try(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        instances = []
        for slot in range(self._try(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            instance = self._try(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
            gpu = None if instance is None else self._gpu(index, instance)
            if gpu is not None:
                instances.append(replace(gpu, compute_capability=capability, bandwidth=None))
        return tuple(instances)


def _unreadable(index: int) -> _Found:
    return _Found(DeviceIds(uuid=""), f"GPU {index}", None)


def _visible(found: list[_Found], environ: Mapping[str, str]) -> GpuReport:
    seen = visible_uuids(environ.get("CUDA_VISIBLE_DEVICES"), [device.ids for device in found])
    readable = {gpu.uuid: gpu for device in found for gpu in (device.gpu, *device.mig) if gpu}
    gpus = tuple(readable[uuid] for uuid in seen.uuids if uuid in readable)
    notes: list[str] = []
    mig = [gpu for gpu in gpus if any(gpu in device.mig for device in found)]
    if mig:
        # A CUDA process enumerates one MIG instance, whatever the mask shows (MIG User Guide).
        gpus = (mig[0],)
        total = sum(len(device.mig) for device in found)
        notes.append(f"MIG is on: one instance of {total} is used, {mig[0].uuid}")
    if order_is_ambiguous(environ, (device.name for device in found)):
        notes.append(
            "CUDA may number these GPUs in another order than the driver: "
            "write UUIDs (GPU-…) into CUDA_VISIBLE_DEVICES, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return GpuReport(gpus, reason=_reason(found, seen), notes=tuple(notes))


def _reason(found: list[_Found], seen: Visible) -> str | None:
    if not found:
        return "the NVIDIA driver lists no GPU"
    if seen.bad_entry is not None:
        return f"CUDA_VISIBLE_DEVICES ends at {seen.bad_entry!r}, which names no GPU here"
    if not seen.uuids:
        return "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs"
    missing = [device.name for device in found if not device.gpu and device.ids.uuid in seen.uuids]
    if missing:
        return (
            f"left out, since the driver does not report its memory: {', '.join(missing)} "
            "(memory shared with the host, or no permission)"
        )
    return None


@functools.cache
def session() -> Nvml:
    """Return this process's session with the real driver."""
    return Nvml()


def report_gpus(nvml: Nvml | None = None, environ: Mapping[str, str] | None = None) -> GpuReport:
    """Read the GPUs with the reason where there are none. Raises nothing."""
    return (nvml or session()).report(os.environ if environ is None else environ)


def read_gpus(
    nvml: Nvml | None = None, environ: Mapping[str, str] | None = None
) -> tuple[Gpu, ...]:
    """Read the GPUs that a CUDA program started now would see, in its order; () without any."""
    return report_gpus(nvml, environ).gpus


def used_bytes(gpu_uuid: str) -> int | None:
    """See `Nvml.used_bytes`."""
    return session().used_bytes(gpu_uuid)


def process_memory(gpu_uuid: str, pid: int) -> int | None:
    """See `Nvml.process_memory`."""
    return session().process_memory(gpu_uuid, pid)


def processes(gpu_uuid: str) -> tuple[tuple[int, int | None], ...]:
    """See `Nvml.processes`."""
    return session().processes(gpu_uuid)
