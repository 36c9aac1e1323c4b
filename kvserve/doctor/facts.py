"""What the doctor knows of a machine: values alone, so that its rules can be tested as a table."""

from dataclasses import dataclass

from kvserve.core.dtypes import CachePair
from kvserve.core.machine import Backend, Gpu, Host
from kvserve.core.plan import Plan
from kvserve.device.cgroup import Limits
from kvserve.device.hardware import Processor
from kvserve.errors import KvserveError
from kvserve.ipc.measuring import KernelTime


@dataclass(frozen=True, slots=True)
class GpuUser:
    """A process that holds memory of a GPU. `name` is None where it runs outside this container,
    `n_bytes` None where the driver does not say."""

    gpu_uuid: str
    pid: int
    name: str | None
    n_bytes: int | None


@dataclass(frozen=True, slots=True)
class Driver:
    """What NVML says. `gpus` are those that a CUDA program sees, `hidden` those that
    `CUDA_VISIBLE_DEVICES` takes away; `reason` says why there are none, or fewer."""

    version: str | None
    gpus: tuple[Gpu, ...]
    hidden: tuple[Gpu, ...] = ()
    reason: str | None = None
    notes: tuple[str, ...] = ()
    users: tuple[GpuUser, ...] = ()


@dataclass(frozen=True, slots=True)
class Library:
    """The installed llama.cpp: its version and its words about itself, or why it cannot be
    loaded."""

    version: str | None
    system_info: str = ""
    error: str | None = None

    @property
    def cuda(self) -> bool:
        """Whether it was built with CUDA."""
        return "CUDA :" in self.system_info


@dataclass(frozen=True, slots=True)
class Model:
    """The model that was asked about. `error` where its file cannot be used; `plan` is what
    `start` would choose now, or the error that it would end with."""

    path: str
    error: KvserveError | None = None
    has_chat_template: bool = True
    plan: Plan | KvserveError | None = None


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """A KV pair that was tried: its time, or why there is none."""

    pair: CachePair
    time: KernelTime | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """The address to listen on. `error` is the system's word where it is not free, `owner` the
    model of the kvserve that has it."""

    host: str
    number: int
    error: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """Limits of this process: whether memory files can be made, and open files."""

    memfd_error: str | None = None
    n_open_files: int = 1024


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything. `n_cards` are the NVIDIA cards on the PCI bus; `n_host_bytes` is the machine's
    memory before any limit of a control group."""

    python: str
    nvcc: str | None
    driver: Driver
    n_cards: int
    library: Library
    processor: Processor
    host: Host
    n_host_bytes: int
    limits: Limits
    port: Port
    kernel: Kernel
    model: Model | None = None
    state_dir_error: str | None = None
    exposure_error: str | None = None
    unknown_variables: tuple[str, ...] = ()
    kernels: tuple[KernelSpeed, ...] = ()

    @property
    def backend(self) -> Backend | None:
        """Where the plan puts layers; None without a plan."""
        return None if self.plan is None else self.plan.chosen.launch.backend

    @property
    def plan(self) -> Plan | None:
        """What `start` would choose; None where no model was named or nothing fits."""
        plan = None if self.model is None else self.model.plan
        return plan if isinstance(plan, Plan) else None
