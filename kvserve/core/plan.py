"""The values of a decision: what was asked, what was weighed, what was chosen."""

from dataclasses import dataclass
from enum import StrEnum

from kvserve.core.dtypes import CachePair
from kvserve.core.loss import ExpectedLoss
from kvserve.core.machine import Backend, Machine
from kvserve.core.shape import ModelShape

N_CTX_PADDING = 256
NOTABLE_ERROR = 0.01
"""A difference between formula and llama.cpp that is worth a line in the log."""


class Task(StrEnum):
    """What the context is used for; each task has a KV floor (`core/selector`)."""

    MATH = "math"
    CODE = "code"
    RETRIEVAL = "retrieval"
    RAG = "rag"
    CHAT = "chat"
    SUMMARIZE = "summarize"
    CLASSIFY = "classify"
    TOOLS = "tools"


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What a draft model takes in bytes, on a GPU or on the host, with contexts of 256 tokens,
    twice as many, and so on."""

    gpu_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]

    def on_gpu(self, n_ctx: int) -> int:
        """All of it, on a GPU."""
        return _between(self.gpu_bytes, n_ctx)

    def on_host(self, n_ctx: int) -> int:
        """All of it, on the host."""
        return _between(self.host_bytes, n_ctx)


def _between(n_bytes: tuple[int, ...], n_ctx: int) -> int:
    steps = max(n_ctx / N_CTX_PADDING, 1.0)
    lower = min(int(steps).bit_length() - 1, len(n_bytes) - 2)
    share = steps / 2**lower - 1
    return int(n_bytes[lower] + share * (n_bytes[lower + 1] - n_bytes[lower]))


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. None means: kvserve chooses.

    `max_kld` (nats) and `min_top1` (a share) are floors by measured numbers.

    `task` sets a floor, and so does `also`, the task of a single request.

    `n_ctx` is the longest single request in tokens, None the longest that fits. `pair` fixes the
    KV types, `n_ubatch` the micro-batch, `floor` is the worst pair allowed, `reserve_bytes` stays
    free for the rest of the machine (None: 3 % or 256 MiB, whichever is more). A batch holds at
    most `n_draft` tokens that speculation proposes.
    """

    n_ctx: int | None
    n_parallel: int = 4
    backend: Backend | None = None
    pair: CachePair | None = None
    floor: CachePair | None = None
    task: Task | None = None
    also: Task | None = None
    n_gpu_layers: int | None = None
    n_batch: int = 512
    n_ubatch: int | None = None
    reserve_bytes: int | None = None
    max_kld: float | None = None
    min_top1: float | None = None
    n_draft: int = 0
    draft_model: DraftModel | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """The settings that a worker starts llama.cpp with; everything a reload may change.

    `n_gpu_layers` counts the output layer as one, as llama.cpp does. `tensor_split` is how many of
    them each GPU gets, empty with one GPU. `n_draft` is how many tokens speculation may add to a
    batch: the logits of each are wanted.
    """

    backend: Backend
    pair: CachePair
    n_ctx: int
    n_parallel: int
    n_batch: int
    n_ubatch: int
    n_gpu_layers: int
    n_cpu_moe: int = 0
    flash_attn: bool = True
    tensor_split: tuple[float, ...] = ()
    n_draft: int = 0
    draft_model: DraftModel | None = None

    @property
    def n_outputs(self) -> int:
        """The most tokens of a batch whose logits are wanted."""
        return self.n_parallel + self.n_draft


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by item. `runtime_bytes` is what the device takes beside llama.cpp's own buffers:
    the CUDA context, cuBLAS, graphs; on the host the process itself. `draft_bytes` is a whole draft
    model."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0
    runtime_bytes: int = 0
    draft_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all items."""
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.recurrent_bytes
            + self.compute_bytes
            + self.output_bytes
            + self.runtime_bytes
            + self.draft_bytes
        )

    def plus(self, other: "Memory") -> "Memory":
        """Both together, item by item."""
        return Memory(
            weights_bytes=self.weights_bytes + other.weights_bytes,
            kv_bytes=self.kv_bytes + other.kv_bytes,
            recurrent_bytes=self.recurrent_bytes + other.recurrent_bytes,
            compute_bytes=self.compute_bytes + other.compute_bytes,
            output_bytes=self.output_bytes + other.output_bytes,
            runtime_bytes=self.runtime_bytes + other.runtime_bytes,
        )

    @property
    def own_bytes(self) -> int:
        """What llama.cpp itself tells of a context: cache, state, compute and output."""
        return self.kv_bytes + self.recurrent_bytes + self.compute_bytes + self.output_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """A launch's memory on the GPUs (all together) and on the host; `each` has every GPU's where
    there are several."""

    gpu: Memory
    host: Memory
    each: tuple[Memory, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to launch, with its price and the verdict.

    `memory` and `free_bytes` are those of the device that decides: all GPUs, or the host without
    one; `free_bytes` has the reserve taken off, `headroom_bytes` is negative where it does not
    fit. `max_ctx` is the longest context of this pair with these layers, 0 where even 256 tokens
    do not fit. `reason` says why it was chosen or why it lost. `exact` means that llama.cpp laid
    the launch out and `memory` has its figures; `formula_bytes` is then what was computed for the
    same items. `may_be_chosen` is False for a pair that the request or the build rules out. `loss`
    is None where nothing is known of the pair.
    """

    launch: Launch
    memory: Memory
    host_memory: Memory
    free_bytes: int
    headroom_bytes: int
    fits: bool
    reason: str
    max_ctx: int
    predicted_tps: float | None
    exact: bool = False
    formula_bytes: int | None = None
    may_be_chosen: bool = True
    loss: ExpectedLoss | None = None

    @property
    def formula_error(self) -> float | None:
        """The formulas' error against llama.cpp's own figures, as a share of these; None where
        they are not known."""
        if self.formula_bytes is None or not self.memory.own_bytes:
            return None
        return self.formula_bytes / self.memory.own_bytes - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision with everything that it rests on."""

    shape: ModelShape
    machine: Machine
    request: Request
    chosen: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def confirmed(self) -> bool:
        """Whether llama.cpp laid the chosen launch out and its figures fit."""
        return self.chosen.exact

    @property
    def differences(self) -> tuple[Candidate, ...]:
        """The candidates whose formulas were off by more than `NOTABLE_ERROR`."""
        return tuple(
            candidate
            for candidate in self.candidates
            if candidate.formula_error is not None and abs(candidate.formula_error) > NOTABLE_ERROR
        )
