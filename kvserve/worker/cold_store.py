"""Sequences that had to leave the KV cache, kept in host memory until they are asked for again.

The least recently used go when the bytes run out. Restoring one is a copy; prefilling it again is
the whole model.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvserve.worker.cell_tree import Tokens, n_common

SHORTEST = 256
"""Fewer tokens are as soon prefilled again."""
MOST = 256
"""Sequences in all: each is an open file, of which a process often may have no more than 1,024, and
at a reload the daemon holds them too."""


class State(Protocol):
    """What is kept of a sequence: `worker.carry`'s exported state."""

    @property
    def n_bytes(self) -> int:
        """Host memory that it takes."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A sequence: `tokens` are those in its cells."""

    state: State
    tokens: Tokens
    salt: str


class ColdStore:
    """Up to `limit_bytes` of sequences, `MOST` at most. With `whole` one is of use only to a
    request that begins with all of it: what a sliding window or a recurrent state allows. What
    goes is given to `close`."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        whole: bool,
        close: Callable[[State], object] = lambda state: state.close(),
    ) -> None:
        self.limit_bytes = limit_bytes
        self.n_bytes = 0
        self.reserved_bytes = 0
        self._whole = whole
        self._close = close
        self._stored: OrderedDict[Stored, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def latest(self) -> tuple[Stored, ...]:
        """All of them, the most recently used first."""
        return tuple(reversed(self._stored))

    def put(self, stored: Stored) -> bool:
        """Keep a sequence. What it makes superfluous goes, and the oldest if there is no room.
        False where there is none at all."""
        if stored.state.n_bytes > self.limit_bytes - self.reserved_bytes:
            self._close(stored.state)
            return False
        for other in list(self._stored):
            begins = n_common(other.tokens, stored.tokens) == len(other.tokens)
            replaced = begins and (not self._whole or len(other.tokens) == len(stored.tokens))
            if other.salt == stored.salt and replaced:
                self._drop(other)
        self._make_room(stored.state.n_bytes)
        self._stored[stored] = None
        self.n_bytes += stored.state.n_bytes
        return True

    def find(self, tokens: Tokens, salt: str) -> tuple[Stored, int] | None:
        """The sequence that `tokens` begins with the most of, and how much that is. At least one
        token is left to be decoded."""
        best: tuple[Stored, int] | None = None
        for stored in self._stored:
            if stored.salt != salt:
                continue
            n_both = min(n_common(stored.tokens, tokens), len(tokens) - 1)
            if self._whole and n_both < len(stored.tokens):
                continue
            if n_both >= max(SHORTEST, (best[1] if best else 0) + 1):
                best = stored, n_both
        return best

    def reserve(self, n_bytes: int) -> bool:
        """Set memory aside for what is to be put; the oldest go. False where there is too little.
        The caller gives it back by `reserved_bytes`."""
        if self.reserved_bytes + n_bytes > self.limit_bytes:
            return False
        self._make_room(n_bytes)
        self.reserved_bytes += n_bytes
        return True

    def covers(self, tokens: Tokens, salt: str) -> bool:
        """Whether all that a sequence of `tokens` holds is here."""
        return any(
            stored.salt == salt
            and n_common(stored.tokens, tokens) == len(tokens)
            and (not self._whole or len(stored.tokens) == len(tokens))
            for stored in self._stored
        )

    def take(self, stored: Stored) -> None:
        """Hand one over: it is the caller's to `put` back or to close."""
        del self._stored[stored]
        self.n_bytes -= stored.state.n_bytes

    def _make_room(self, n_bytes: int) -> None:
        limit_bytes = self.limit_bytes - self.reserved_bytes
        while self._stored and (self.n_bytes + n_bytes > limit_bytes or len(self) >= MOST):
            self._drop(next(iter(self._stored)))

    def _drop(self, stored: Stored) -> None:
        self.take(stored)
        self._close(stored.state)
