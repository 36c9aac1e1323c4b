"""The tokens of one step: a row of logits for each sequence, and one more for each of its drafted
tokens. Those that can be are drawn together, the others on a few threads."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import TokenLogprobs
from kvserve.worker import together
from kvserve.worker.logprobs import token_logprobs
from kvserve.worker.sampling import Sampler
from kvserve.worker.shortlist import NEVER
from kvserve.worker.team import Team
from kvserve.worker.together import Candidates, Plain, Settings

Rows = NDArray[np.float32]
Drawn = list[tuple[int, TokenLogprobs | None]]

_FEWEST = 2
_FEWEST_TOGETHER = 16
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


class Round:
    """What is to be drawn in a step, and again in the next ones as long as the requests are the
    same and draft nothing."""

    def __init__(self, wishes: list[Wish], n_vocab: int) -> None:
        self.wishes = wishes
        plain: list[Plain] = []
        index: list[int] = []
        banned = []
        self.together: list[tuple[int, int]] = []
        """Places of wishes, and how many rows of each are drawn from with the others'."""
        self.alone: list[int] = []
        self.edited: list[Wish] = []
        for place, wish in enumerate(wishes):
            settings = wish.sampler.plain(n_vocab) if wish.n_logprobs is None else None
            if settings is None:
                self.alone.append(place)
                continue
            bans, n_rows = wish.sampler.bans(), 1
            if bans is None:
                self.edited.append(wish)
            else:
                # What is drawn from one row changes none of the next.
                n_rows += len(wish.draft)
            rows = range(wish.first, wish.first + n_rows)
            if bans is not None and len(bans):
                banned += [bans + row * n_vocab for row in rows]
            self.together.append((place, n_rows))
            plain += [settings] * n_rows
            index += rows
        self.settings = Settings.of(plain)
        self.index = np.array(index, dtype=np.intp)
        self.compiled = together.compiled_draws(self.index, self.settings)
        self.banned = np.concatenate(banned) if banned else None
        """Places in the logits of all rows, one after another."""


class Drawer:
    """Draws with `n_threads` threads, the caller's among them; `piece` gives a token's bytes.
    Machine code has `n_openmp` of its own."""

    def __init__(self, n_threads: int, piece: Callable[[int], bytes], n_openmp: int = 1) -> None:
        self._piece = piece
        self._n_openmp = n_openmp
        self._team = Team(n_threads, "draw")

    def draw(self, logits: Rows, todo: Round) -> list[Drawn]:
        """At least a token for each wish, in order, with likelihoods where they are wanted."""
        drawn: list[Drawn] = [[] for _ in todo.wishes]
        alone = todo.alone
        if todo.together:
            alone = alone + self._draw_together(logits, todo, drawn)

        def draw_alone(start: int, end: int) -> None:
            for place in alone[start:end]:
                self._draw_alone(logits, todo.wishes[place], drawn[place])

        self._share(draw_alone, len(alone), _FEWEST)
        return drawn

    def _draw_together(self, logits: Rows, todo: Round, drawn: list[Drawn]) -> list[int]:
        """Draw the tokens of all wishes that can share a draw, of those whose rows hang on what
        was drawn the first; returns those of them whose draft goes on."""
        if todo.banned is not None:
            logits.reshape(-1)[todo.banned] = NEVER
        if todo.edited:
            self._share(
                lambda start, end: _edit(logits, todo.edited[start:end]), len(todo.edited), _FEWEST
            )
        wishes = todo.wishes
        numbers = [
            wishes[place].sampler.number() for place, n_rows in todo.together for _ in range(n_rows)
        ]
        if todo.compiled is not None:
            tokens = todo.compiled(logits, numbers, self._n_openmp)
        else:
            tokens = self._draw_with_numpy(logits, todo, numbers)
        unfinished, start = [], 0
        for place, n_rows in todo.together:
            end = start + n_rows
            wish, found = wishes[place], drawn[place]
            if _settle(wish, logits, numbers[start:end], tokens[start:end], found):
                unfinished.append(place)
            start = end
        return unfinished

    def _draw_with_numpy(self, logits: Rows, todo: Round, numbers: list[float]) -> list[int]:
        parts: dict[int, Candidates] = {}

        def find(start: int, end: int) -> None:
            index, top_k = todo.index[start:end], todo.settings.top_k[start:end]
            parts[start] = together.candidates(logits, index, top_k)

        self._share(find, len(todo.index), _FEWEST_TOGETHER)
        starts = sorted(parts)
        found = together.joined([parts[start] for start in starts], starts)
        tokens: list[int] = together.draw(found, todo.settings, np.array(numbers)).tolist()
        return tokens

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

    def _share(self, work: Callable[[int, int], None], n: int, fewest: int) -> None:
        """Let the threads do the `work` of `n` rows, at least `fewest` each; it is told where its
        part begins and ends."""
        n_shares = max(1, min(self._team.n_threads, n // fewest))
        borders = [n * share // n_shares for share in range(n_shares + 1)]
        if n:
            self._team.share(work, list(itertools.pairwise(borders)))


def _settle(
    wish: Wish, logits: Rows, numbers: list[float], tokens: list[int], drawn: Drawn
) -> bool:
    """Take the `tokens` that were drawn from a wish's first rows as far as they count; returns
    whether the draft goes on after them."""
    for n_taken, (number, token) in enumerate(zip(numbers, tokens, strict=True), 1):
        took = wish.sampler.settle(logits[wish.first + n_taken - 1], number, token)
        drawn.append((took, None))
        if not wish.accept(took) or wish.draft[n_taken - 1 : n_taken] != (took,):
            wish.sampler.give_back(numbers[n_taken:])
            return False
    return True


def _edit(logits: Rows, wishes: list[Wish]) -> None:
    for wish in wishes:
        wish.sampler.edit(logits[wish.first])
