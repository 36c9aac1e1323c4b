"""What the measuring process (`python -m kvserve.worker.measure`) reads and writes, as JSON.

One `MeasureRequest` on stdin; on stdout one line for each launch, in order, as soon as it is
known: where llama.cpp takes the process down, the lines before that stand.
"""

import msgspec

from kvserve.ipc.messages import Load


class MeasureRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The launches to measure, all of one model file."""

    launches: tuple[Load, ...]


class DeviceBuffers(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one of llama.cpp's devices holds, in bytes, exact to the log's 0.01 MiB.

    `device` is its buffer type: `CPU`, `CUDA0`, or `CUDA_Host` for pinned host memory.
    """

    device: str
    kv_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """The buffers of the launch with this index."""

    index: int
    buffers: tuple[DeviceBuffers, ...]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """llama.cpp does not take this launch; `reason` is one line in its words."""

    index: int
    reason: str


MeasureAnswer = Measured | Refused


class KernelTime(msgspec.Struct, frozen=True):
    """How fast one KV pair is: the median time of a single-token step at the beginning of the
    context, and after `depth` tokens. What `python -m kvserve.worker.kernels` answers."""

    depth: int
    shallow_seconds: float
    deep_seconds: float

    @property
    def growth_seconds(self) -> float:
        """What the depth adds to a step: attention over the cache, and nothing else."""
        return self.deep_seconds - self.shallow_seconds
