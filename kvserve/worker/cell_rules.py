"""What may be done to the cells of llama.cpp's memory, and what is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Copy:
    """Sequence `target`, which is empty, shares the first `n_tokens` cells of `source`."""

    source: int
    target: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Sequence `slot` keeps its first `n_tokens` tokens."""

    slot: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Sequence `slot` gives up all it holds."""

    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """Sequence `slot`, with cells for `tokens`, is about to lose those after its first `n_left`:
    copy them elsewhere. What one sequence loses bit by bit has the same `key`."""

    slot: int
    tokens: NDArray[np.int32]
    salt: str
    n_left: int
    key: int


Operation = Copy | Cut | Clear | Store


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model's memory allows.

    `n_window` is the sliding window of some of its layers: their older cells are overwritten, so a
    sequence can be cut only where the window before the cut is still there, and its cells are not
    shared, since llama.cpp overwrites none that two sequences hold (find_slot in
    src/llama-kv-cache.cpp). `recurrent` memory holds one state for all tokens and cannot be cut at
    all (src/llama-memory-recurrent.cpp). `shares` says whether two sequences may hold the same
    cells. `n_spare` are sequence ids beside those that a batch may use: only plain attention has
    any, and there they cost nothing.
    """

    n_window: int | None = None
    recurrent: bool = False
    shares: bool = True
    n_spare: int = 0

    @property
    def cuts_anywhere(self) -> bool:
        """Whether any beginning of a sequence is as good as the whole."""
        return self.n_window is None and not self.recurrent
