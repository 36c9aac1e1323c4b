"""Sequences on their way from one worker to the next, held by the daemon as memory files.

The old worker exports into memory files (memfd) of its own, most of it while it still answers; the
daemon opens them through /proc before that worker leaves, and the next worker opens the daemon's.
Nothing touches a disk, and what nobody holds any more is gone.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import structlog

from kvserve.core.dtypes import BLOCK_ELEMENTS, CachePair
from kvserve.ipc.messages import CarryReport, CopiedAhead, Paused

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a worker copies ahead of its pause: nothing yet, where it was only `asked`.

    `descriptors` are this process's, for each sequence those of its beginning in order;
    `by_worker` has them by the worker's own.
    """

    asked: bool = True
    descriptors: tuple[tuple[int, ...], ...] = ()
    by_worker: dict[int, int] = field(default_factory=dict)
    n_bytes: int = 0

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Where another process of this user opens them."""
        return _paths(self.descriptors)

    def close(self) -> None:
        """Let the memory go."""
        _close(self.by_worker.values())


@dataclass(frozen=True, slots=True)
class Carried:
    """Exported sequences. `descriptors` are this process's, for each sequence those of all its
    files; `n_bytes` is their size together. `refused` has the reason of each sequence that stayed
    behind; the export took `export_seconds`."""

    descriptors: tuple[tuple[int, ...], ...] = ()
    n_bytes: int = 0
    n_tokens: int = 0
    refused: tuple[str, ...] = ()
    export_seconds: float = 0.0

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Where another process of this user opens them, in the order of the export."""
        return _paths(self.descriptors)

    def reported(self, report: CarryReport | None) -> CarryReport | None:
        """What the next worker says of them, with what was known before."""
        if report is None and not self.refused:
            return None
        report = report or CarryReport()
        return msgspec.structs.replace(
            report,
            refused=(*self.refused, *report.refused),
            export_seconds=self.export_seconds,
        )

    def close(self) -> None:
        """Let the memory go; safe to call twice only on different copies."""
        _close(descriptor for files in self.descriptors for descriptor in files)


NOTHING = Carried()


def _paths(descriptors: tuple[tuple[int, ...], ...]) -> tuple[tuple[str, ...], ...]:
    folder = f"/proc/{os.getpid()}/fd"
    return tuple(tuple(f"{folder}/{one}" for one in files) for files in descriptors)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def export_limit(carry_bytes: int, source: CachePair, target: CachePair) -> int:
    """How many bytes may be exported where exported and transcoded files together may take
    `carry_bytes` of host memory."""
    if source == target:
        return carry_bytes
    taken, wanted = _bytes_of_two(source), _bytes_of_two(target)
    return int(carry_bytes * taken / (taken + wanted))


def _bytes_of_two(pair: CachePair) -> float:
    """Bytes of one element of K and one of V."""
    return (pair.k.block_bytes + pair.v.block_bytes) / BLOCK_ELEMENTS


def adopt_copies(pid: int, message: CopiedAhead) -> Copied:
    """Take hold of what the worker `pid` copied ahead. Of a sequence the pieces after one that
    cannot be opened are left out."""
    descriptors: list[tuple[int, ...]] = []
    by_worker: dict[int, int] = {}
    n_bytes = 0
    for pieces in message.sequences:
        opened: list[int] = []
        for piece in pieces:
            try:
                opened.append(_open(pid, piece.fd))
            except OSError as error:
                log.warning("a copied piece is lost", error=str(error))
                break
            by_worker[piece.fd] = opened[-1]
            n_bytes += piece.n_bytes
        if opened:
            descriptors.append(tuple(opened))
    return Copied(False, tuple(descriptors), by_worker, n_bytes)


def adopt(pid: int, paused: Paused, copied: Copied | None = None) -> Carried:
    """Take hold of what the worker `pid` exported, and of what it `copied` ahead and still is of
    use; the rest of that is closed. What cannot be opened is left out: its sequence is prefilled
    again."""
    by_worker = {} if copied is None else dict(copied.by_worker)
    descriptors: list[tuple[int, ...]] = []
    n_bytes = n_tokens = 0
    refused = list(paused.refused)
    for state in paused.states:
        try:
            rest = _open(pid, state.fd)
        except OSError as error:
            log.warning("an exported sequence is lost", error=str(error), n_tokens=state.n_tokens)
            refused.append(f"its memory file is gone: {error.strerror}")
            continue
        if any(fd not in by_worker for fd in state.ahead):
            os.close(rest)
            refused.append("a piece of it is gone")
            continue
        descriptors.append((*(by_worker.pop(fd) for fd in state.ahead), rest))
        n_bytes += state.n_bytes
        n_tokens += state.n_tokens
    _close(by_worker.values())
    if copied is not None:
        n_bytes += copied.n_bytes
    return Carried(tuple(descriptors), n_bytes, n_tokens, tuple(refused), paused.export_seconds)


def _open(pid: int, descriptor: int) -> int:
    return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
