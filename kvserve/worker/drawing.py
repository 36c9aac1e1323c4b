"""The tokens of one step: a row of logits for each sequence, and one more for each of its drafted
tokens. Those that can be are drawn together, the others on a few threads."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import TokenLogprobs
from kvserve.worker import together
from kvserve.worker.logprobs import token_logprobs
from kvserve.worker.sampling import Sampler
from kvserve.worker.together import Candidates, Plain

Rows = NDArray[np.float32]
Drawn = list[tuple[int, TokenLogprobs | None]]

_FEWEST = 2
"""Rows for each thread below which handing them over costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Rows of logits to draw from in order, for request `id`: the one with the index `first`, and
    after it one for each token of `draft`, which counts only where all draws before it gave the
    drafted tokens.

    The rows are changed. `accept` takes every drawn token before the next is drawn, and tells
    whether there is to be another one; for different requests it may be called on different
    threads.
    """

    id: int
    first: int
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

    def draw(self, logits: Rows, wishes: list[Wish]) -> list[Drawn]:
        """At least a token for each wish, in order, with likelihoods where they are wanted."""
        drawn: list[Drawn] = [[] for _ in wishes]
        plain: dict[int, Plain] = {}
        for place, wish in enumerate(wishes):
            settings = wish.sampler.plain(logits.shape[1])
            if settings is not None and wish.n_logprobs is None:
                plain[place] = settings
        alone = [place for place in range(len(wishes)) if place not in plain]
        if plain:
            alone += self._draw_together(logits, wishes, plain, drawn)

        def draw_alone(_start: int, places: list[int]) -> None:
            for place in places:
                self._draw_alone(logits, wishes[place], drawn[place])

        self._share(draw_alone, alone)
        return drawn

    def _draw_together(
        self, logits: Rows, wishes: list[Wish], plain: dict[int, Plain], drawn: list[Drawn]
    ) -> list[int]:
        """Draw the first token of all `plain` wishes; returns those whose draft goes on."""
        places, settings = list(plain), list(plain.values())
        index = np.array([wishes[place].first for place in places])
        parts: dict[int, Candidates] = {}

        def find(start: int, mine: list[int]) -> None:
            for place in mine:
                wishes[place].sampler.edit(logits[wishes[place].first])
            end = start + len(mine)
            parts[start] = together.candidates(logits, index[start:end], settings[start:end])

        self._share(find, places)
        numbers = [wishes[place].sampler.number() for place in places]
        starts = sorted(parts)
        found = together.joined([parts[start] for start in starts], starts)
        tokens = together.draw(found, settings, np.array(numbers))
        unfinished = []
        for place, number, token in zip(places, numbers, tokens.tolist(), strict=True):
            wish = wishes[place]
            took = wish.sampler.settle(logits[wish.first], number, token)
            drawn[place].append((took, None))
            if wish.accept(took) and wish.draft and took == wish.draft[0]:
                unfinished.append(place)
        return unfinished

    def _draw_alone(self, logits: Rows, wish: Wish, drawn: Drawn) -> None:
        """Draw what is left to draw of a wish."""
        rows = logits[wish.first + len(drawn) : wish.first + len(wish.draft) + 1]
        for row, drafted in itertools.zip_longest(rows, wish.draft[len(drawn) :]):
            token, likelihoods = self._token(wish, row)
            drawn.append((token, likelihoods))
            if not wish.accept(token) or token != drafted:
                return

    def _token(self, wish: Wish, row: NDArray[np.float32]) -> tuple[int, TokenLogprobs | None]:
        if wish.n_logprobs is None:
            return wish.sampler.sample(row), None
        untouched = row.copy()
        token = wish.sampler.sample(row)
        return token, token_logprobs(wish.id, untouched, token, wish.n_logprobs, self._piece)

    def _share(self, work: Callable[[int, list[int]], None], places: list[int]) -> None:
        """Let the threads do the `work` of all places, which is told where its part begins."""
        n_shares = min(self._n_threads, len(places) // _FEWEST)
        if self._pool is None or n_shares < 2:
            if places:
                work(0, places)
            return
        size, more = divmod(len(places), n_shares)
        borders = [share * size + min(share, more) for share in range(n_shares + 1)]
        parts = [(start, places[start:end]) for start, end in itertools.pairwise(borders)]
        others = [self._pool.submit(work, *part) for part in parts[1:]]
        work(*parts[0])
        for other in others:
            other.result()
