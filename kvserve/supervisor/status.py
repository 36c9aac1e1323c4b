"""What the supervisor shows of itself: frozen snapshots for the API and the CLI."""

from dataclasses import dataclass

from kvserve.core.lifecycle import Phase
from kvserve.core.plan import Plan
from kvserve.ipc.messages import CarryReport, MemoryReport


@dataclass(frozen=True, slots=True)
class ReloadRecord:
    """One change of worker. Times are seconds since the epoch; `outcome` is done, rolled_back or
    failed; `from_cache_type` is None for the first load. `carry` tells how many sequences came
    along, and why others did not. `overlapped` says that the new worker loaded while the old one
    served; requests stood still for `pause_seconds`, None where none was paused."""

    reason: str
    started_at: float
    seconds: float
    outcome: str
    from_cache_type: str | None
    from_n_ctx: int | None
    to_cache_type: str
    to_n_ctx: int
    detail: str | None = None
    carry: CarryReport | None = None
    overlapped: bool = False
    pause_seconds: float | None = None

    @property
    def n_tokens_carried(self) -> int:
        """Tokens of the sequences that came along."""
        return 0 if self.carry is None else self.carry.n_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """What the worker and the devices say after a load, beside the plan's prediction.

    `device_bytes` is the worker's use of GPU memory by NVML (its resident memory without a GPU),
    None where it cannot be known. `returning_bytes` will be free again when the worker leaves.
    """

    engine: MemoryReport
    device_bytes: int | None
    returning_bytes: int


@dataclass(frozen=True, slots=True)
class Status:
    """The daemon at one moment. `speculation` tells how tokens are proposed, or why they are not;
    `n_drafted` were, of which `n_accepted` were right, since the daemon started."""

    phase: Phase
    plan: Plan | None
    measured: Measured | None
    load_fraction: float | None
    template: str | None
    engine: str | None
    worker_pid: int | None
    n_waiting: int
    n_running: int
    n_answered: int
    n_failed: int
    n_worker_deaths: int
    n_cells_used: int
    speculation: str | None
    n_drafted: int
    n_accepted: int
    error: str | None
    retry_at: float | None
    reloads: tuple[ReloadRecord, ...]
    started_at: float


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """The answer to a change of context: the plan in force and whether the worker changed."""

    plan: Plan
    changed: bool
    seconds: float
