"""The tokens of one step, drawn on a few threads: a row of logits for each sequence."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import TokenLogprobs
from kvserve.worker.logprobs import token_logprobs
from kvserve.worker.sampling import Sampler

Row = NDArray[np.float32]
Drawn = tuple[int, TokenLogprobs | None]

_FEWEST = 2
"""Rows for each thread below which handing them over costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A row of logits to draw from, for request `id`. The row is changed."""

    id: int
    row: Row
    sampler: Sampler
    n_logprobs: int | None = None


class Drawer:
    """Draws with `n_threads` threads, the caller's among them; `piece` gives a token's bytes."""

    def __init__(self, n_threads: int, piece: Callable[[int], bytes]) -> None:
        self._n_threads = n_threads
        self._piece = piece
        self._pool = ThreadPoolExecutor(n_threads - 1, "draw") if n_threads > 1 else None

    def draw(self, wishes: list[Wish]) -> list[Drawn]:
        """A token for each wish, in order, with its likelihoods where they are wanted."""
        n_shares = min(self._n_threads, len(wishes) // _FEWEST)
        if self._pool is None or n_shares < 2:
            return [self._one(wish) for wish in wishes]
        shares = [wishes[start::n_shares] for start in range(n_shares)]
        others = [self._pool.submit(self._some, share) for share in shares[1:]]
        drawn = [self._some(shares[0]), *(other.result() for other in others)]
        return [one for row in itertools.zip_longest(*drawn) for one in row if one is not None]

    def _some(self, wishes: list[Wish]) -> list[Drawn]:
        return [self._one(wish) for wish in wishes]

    def _one(self, wish: Wish) -> Drawn:
        if wish.n_logprobs is None:
            return wish.sampler.sample(wish.row), None
        untouched = wish.row.copy()
        token = wish.sampler.sample(wish.row)
        return token, token_logprobs(wish.id, untouched, token, wish.n_logprobs, self._piece)
