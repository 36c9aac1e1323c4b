"""What is asked of a proposer, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A sequence that generates: `tokens[:n_tokens]` are known, and it can use at most `n_most`
    proposed tokens."""

    id: int
    tokens: Tokens
    n_tokens: int
    n_most: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """The tokens that may follow, and how much speaks for each (`acceptance.N_KINDS`)."""

    tokens: tuple[int, ...]
    kinds: tuple[int, ...]


class Proposer(Protocol):
    """Guesses how sequences go on. One that is `batched` answers for many in hardly more time than
    for one, and takes long."""

    @property
    def batched(self) -> bool:
        """See above."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """A proposal for each sequence, None where there is nothing to go by."""
        ...

    def forget(self, request: int) -> None:
        """A sequence will not be asked about any more."""
        ...
