"""The tokens of one step, drawn on a few threads: a row of logits for each sequence, and one more
for each of its drafted tokens."""

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
Rows = NDArray[np.float32]
Drawn = list[tuple[int, TokenLogprobs | None]]

_FEWEST = 2
"""Rows for each thread below which handing them over costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Rows of logits to draw from in order, for request `id`: one, and after it one for each token
    of `draft`, which counts only where all draws before it gave the drafted tokens.

    The rows are changed. `accept` takes every drawn token before the next is drawn, and tells
    whether there is to be another one; for different requests it may be called on different
    threads.
    """

    id: int
    rows: Rows
    sampler: Sampler
    accept: Callable[[int], bool]
    n_logprobs: int | None = None
    draft: tuple[int, ...] = ()


class Drawer:
    """Draws with `n_threads` threads, the caller's among them; `piece` gives a token's bytes."""

    def __init__(self, n_threads: int, piece: Callable[[int], bytes]) -> None:
        self._n_threads = n_threads
        self._piece = piece
        self._pool = ThreadPoolExecutor(n_threads - 1, "draw") if n_threads > 1 else None

    def draw(self, wishes: list[Wish]) -> list[Drawn]:
        """At least a token for each wish, in order, with likelihoods where they are wanted."""
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
        drawn: Drawn = []
        for row, drafted in itertools.zip_longest(wish.rows, wish.draft):
            token, likelihoods = self._token(wish, row)
            drawn.append((token, likelihoods))
            if not wish.accept(token) or token != drafted:
                break
        return drawn

    def _token(self, wish: Wish, row: Row) -> tuple[int, TokenLogprobs | None]:
        if wish.n_logprobs is None:
            return wish.sampler.sample(row), None
        untouched = row.copy()
        token = wish.sampler.sample(row)
        return token, token_logprobs(wish.id, untouched, token, wish.n_logprobs, self._piece)
