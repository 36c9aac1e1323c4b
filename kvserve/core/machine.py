"""The machine and the llama.cpp build, as values: what `device/` and the probe report."""

from dataclasses import dataclass
from enum import StrEnum

from kvserve.core.dtypes import CachePair


class Backend(StrEnum):
    """Where the layers run."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one moment. `free_bytes` is what NVML calls free: other processes are off it.

    `bandwidth` is the memory's peak in bytes/s, None where the driver does not say.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    bandwidth: float | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """The host's memory at one moment, within the cgroup's limit where there is one.

    `free_bytes` can be had without swapping (page cache counts as free).
    """

    total_bytes: int
    free_bytes: int
    n_cores: int
    limited_by_cgroup: bool = False


@dataclass(frozen=True, slots=True)
class Build:
    """What the installed llama.cpp can do.

    `kv_pairs` are the pairs with compiled CUDA flash-attention kernels (`FA_QUANTS`); None where
    the build did not say, which means llama.cpp's default set.
    """

    version: str
    cuda: bool
    kv_pairs: frozenset[CachePair] | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """All that the selector knows of the hardware and the build."""

    host: Host
    gpus: tuple[Gpu, ...]
    build: Build
