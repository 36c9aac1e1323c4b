"""Sequences on their way from one worker to the next, held by the daemon as memory files.

The old worker exports into memory files (memfd) of its own; the daemon opens them through /proc
before that worker leaves, and the next worker opens the daemon's. Nothing touches a disk, and what
nobody holds any more is gone.
"""

import contextlib
import os
from dataclasses import dataclass

import structlog

from kvserve.ipc.messages import ExportedState

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """Exported sequences. `descriptors` are this process's; `n_bytes` is their size together."""

    descriptors: tuple[int, ...] = ()
    n_bytes: int = 0
    n_tokens: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """Where another process of this user opens them, in the order of the export."""
        return tuple(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self.descriptors)

    def close(self) -> None:
        """Let the memory go; safe to call twice only on different copies."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


NOTHING = Carried()


def adopt(pid: int, states: tuple[ExportedState, ...]) -> Carried:
    """Take hold of what the worker `pid` exported. What cannot be opened is left out: its
    sequence is prefilled again."""
    descriptors, n_bytes, n_tokens = [], 0, 0
    for state in states:
        try:
            descriptors.append(os.open(f"/proc/{pid}/fd/{state.fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            log.warning("an exported sequence is lost", error=str(error), n_tokens=state.n_tokens)
            continue
        n_bytes += state.n_bytes
        n_tokens += state.n_tokens
    return Carried(tuple(descriptors), n_bytes, n_tokens)
