"""An NVML binding that plays recorded answers. The numbers are those of real machines."""
# ruff: noqa: N802, N815 -- names are those of the C library

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MIB = 2**20


class RecordedError(Exception):
    """NVMLError with the text that the driver gives."""


@dataclass(frozen=True)
class Memory:
    total: int
    free: int
    used: int


@dataclass(frozen=True)
class Process:
    pid: int
    usedGpuMemory: int | None


@dataclass(frozen=True)
class Device:
    """One GPU. What is None raises "Not Supported", as the driver does."""

    uuid: str
    name: str
    memory: Memory | None
    memory_v2: Memory | None = None
    capability: tuple[int, int] | None = (8, 9)
    memory_clock_mhz: int | None = None
    bus_bits: int | None = None
    processes: Sequence[Process] | None = ()
    mig: tuple["Device", ...] | None = None
    lost: bool = False


RTX_4060 = Device(
    uuid="GPU-8c5a9cf5-11f2-4b1d-9e0b-5f2f0a1f7d11",
    name="NVIDIA GeForce RTX 4060",
    memory=Memory(total=8188 * MIB, free=7600 * MIB, used=588 * MIB),
    memory_v2=Memory(total=8188 * MIB, free=7600 * MIB, used=383 * MIB),
    memory_clock_mhz=8501,
    bus_bits=128,
    processes=(Process(4242, 300 * MIB), Process(4242, 20 * MIB), Process(77, None)),
)
RTX_3090 = Device(
    uuid="GPU-8c0011aa-2222-4333-8444-555566667777",
    name="NVIDIA GeForce RTX 3090",
    memory=Memory(total=24576 * MIB, free=24000 * MIB, used=576 * MIB),
    capability=(8, 6),
    memory_clock_mhz=9751,
    bus_bits=384,
    processes=None,
)
H100 = Device(
    uuid="GPU-9aca60d7-fa6c-241a-8b25-c58c41ab1923",
    name="NVIDIA H100 80GB HBM3",
    memory=Memory(total=85520809984, free=84465090560, used=1055719424),
    memory_v2=Memory(total=85520809984, free=84465090560, used=552402944),
    capability=(9, 0),
    memory_clock_mhz=2619,
    bus_bits=5120,
    processes=(Process(514, 543162368),),
)
GB10 = Device(
    uuid="GPU-10101010-aaaa-bbbb-cccc-dddddddddddd",
    name="NVIDIA GB10",
    memory=None,
    capability=(12, 1),
)
A100_WITH_MIG = Device(
    uuid="GPU-a100a100-0000-4000-8000-000000000000",
    name="NVIDIA A100-SXM4-40GB",
    memory=Memory(total=40960 * MIB, free=40000 * MIB, used=960 * MIB),
    capability=(8, 0),
    memory_clock_mhz=1215,
    bus_bits=5120,
    mig=(
        Device(
            uuid="MIG-11111111-0000-5000-8000-000000000000",
            name="NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            memory=Memory(total=19968 * MIB, free=19900 * MIB, used=68 * MIB),
            capability=None,
        ),
        Device(
            uuid="MIG-22222222-0000-5000-8000-000000000000",
            name="NVIDIA A100-SXM4-40GB MIG 2g.10gb",
            memory=Memory(total=9856 * MIB, free=9800 * MIB, used=56 * MIB),
            capability=None,
        ),
    ),
)


@dataclass
class RecordedNvml:
    """The binding; a handle is the Device itself. `calls` counts the session's begin and end."""

    devices: Sequence[Device] = ()
    init_failure: str | None = None
    count_failure: str | None = None
    calls: list[str] = field(default_factory=list)

    NVMLError: type[Exception] = RecordedError
    NVML_CLOCK_MEM: int = 2
    nvmlMemory_v2: int = 0x02000028

    def nvmlInit(self) -> None:
        self.calls.append("init")
        if self.init_failure is not None:
            raise RecordedError(self.init_failure)

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetCount(self) -> int:
        if self.count_failure is not None:
            raise RecordedError(self.count_failure)
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Device:
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Device:
        for device in self.devices:
            for candidate in (device, *(device.mig or ())):
                if candidate.uuid == uuid:
                    return candidate
        raise RecordedError("Not Found")

    def nvmlDeviceGetUUID(self, handle: Device, /) -> str:
        if handle.lost:
            raise RecordedError("GPU is lost")
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Device, /) -> str:
        return handle.name

    def nvmlDeviceGetMemoryInfo(self, handle: Device, version: int | None = None, /) -> Memory:
        return _supported(handle.memory if version is None else handle.memory_v2)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Device, /) -> tuple[int, int]:
        return _supported(handle.capability)

    def nvmlDeviceGetMaxClockInfo(self, handle: Device, clock: int, /) -> int:
        assert clock == self.NVML_CLOCK_MEM
        return _supported(handle.memory_clock_mhz)

    def nvmlDeviceGetMemoryBusWidth(self, handle: Device, /) -> int:
        return _supported(handle.bus_bits)

    def nvmlDeviceGetMigMode(self, handle: Device, /) -> Sequence[int]:
        return [1, 1] if handle.mig else [0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Device, /) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Device, index: int, /) -> Device:
        instances = handle.mig or ()
        if index >= len(instances):
            raise RecordedError("Not Found")
        return instances[index]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Device, /) -> Sequence[Process]:
        return _supported(handle.processes)


def _supported(answer: Any) -> Any:
    if answer is None:
        raise RecordedError("Not Supported")
    return answer
