"""Sequences on their way from one worker to the next, held by the daemon as memory files.

The old worker exports into memory files (memfd) of its own; the daemon opens them through /proc
before that worker leaves, and the next worker opens the daemon's. Nothing touches a disk, and what
nobody holds any more is gone.
"""

import contextlib
import os
from dataclasses import dataclass

import msgspec
import structlog

from kvserve.core.dtypes import BLOCK_ELEMENTS, CachePair
from kvserve.ipc.messages import CarryReport, Paused

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """Exported sequences. `descriptors` are this process's; `n_bytes` is their size together.
    `refused` has the reason of each sequence that stayed behind."""

    descriptors: tuple[int, ...] = ()
    n_bytes: int = 0
    n_tokens: int = 0
    refused: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Where another process of this user opens them, in the order of the export."""
        return tuple(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self.descriptors)

    def reported(self, report: CarryReport | None) -> CarryReport | None:
        """What the next worker says of them, with what had stayed behind before."""
        if not self.refused:
            return report
        report = report or CarryReport()
        return msgspec.structs.replace(report, refused=(*self.refused, *report.refused))

    def close(self) -> None:
        """Let the memory go; safe to call twice only on different copies."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


NOTHING = Carried()


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


def adopt(pid: int, paused: Paused) -> Carried:
    """Take hold of what the worker `pid` exported. What cannot be opened is left out: its
    sequence is prefilled again."""
    descriptors, n_bytes, n_tokens = [], 0, 0
    refused = list(paused.refused)
    for state in paused.states:
        try:
            descriptors.append(os.open(f"/proc/{pid}/fd/{state.fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            log.warning("an exported sequence is lost", error=str(error), n_tokens=state.n_tokens)
            refused.append(f"its memory file is gone: {error.strerror}")
            continue
        n_bytes += state.n_bytes
        n_tokens += state.n_tokens
    return Carried(tuple(descriptors), n_bytes, n_tokens, tuple(refused))
