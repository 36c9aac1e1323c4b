"""The draws of many sequences at once, where nothing but top-k, top-p and min-p shortens the list.

One after another, each row costs some thirty NumPy calls on short arrays, during which no other
thread can run: 0.45 ms a row beside an H100, with eight threads as with one. Here all rows share
those calls. What a row gives hangs on that row alone: the same token comes of it in any company.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvserve.worker import compiled
from kvserve.worker.shortlist import NEVER

Rows = NDArray[np.float32]
Ids = NDArray[np.intp]

_LEAST = float(np.nextafter(np.float32(NEVER), np.float32(0)))
_GROUP = 12
_WIDTH = 3000
"""Columns that a row is folded into. No power of two: the logits of a column would all fall into
the same few lines of the processor's cache."""
_LEAST_DEPTH = 8
_FEW = 2
"""Up to so many rows are drawn from without NumPy, whose calls take longer than so short lists."""
_MOST_CANDIDATES = 1024
"""Of a row with more logits that equal its k-th largest, the draw is left to others."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The `top_k` likeliest tokens, of those as many as have a probability of `top_p` together, and
    of those the ones whose logit is at most `depth` (not positive) below the highest.

    Greedy with a `top_k` of 1 and the number 0.
    """

    top_k: int
    top_p: float
    depth: float
    temperature: float

    def suits(self, n_vocab: int) -> bool:
        """Whether the list is short beside the vocabulary."""
        return 2 * self.top_k <= min(width(n_vocab), _MOST_CANDIDATES)


class Settings(NamedTuple):
    """The settings of several rows' draws: arrays with a number for each row. A `top_p` of 1 is
    infinite: it keeps all, whatever the sums round to."""

    top_k: Ids
    top_p: NDArray[np.float64]
    depth: NDArray[np.float64]
    temperature: NDArray[np.float64]

    @staticmethod
    def of(plain: Sequence[Plain]) -> "Settings":
        """The settings of some draws."""
        return Settings(
            np.array([one.top_k for one in plain], dtype=np.intp),
            np.array([one.top_p if one.top_p < 1 else np.inf for one in plain]),
            np.array([one.depth for one in plain], dtype=np.float64),
            np.array([one.temperature for one in plain], dtype=np.float64),
        )

    def some(self, rows: "slice | NDArray[np.bool_]") -> "Settings":
        """Those of some of the rows."""
        return Settings(
            self.top_k[rows], self.top_p[rows], self.depth[rows], self.temperature[rows]
        )


class Candidates(NamedTuple):
    """Row, token and logit of all that may be drawn, and some more; by row, then token."""

    rows: Ids
    ids: Ids
    logits: Rows


def width(n_vocab: int) -> int:
    """Columns that a row is folded into, a multiple of the group of columns; 0 for few tokens."""
    return min(_WIDTH, n_vocab // _LEAST_DEPTH // _GROUP * _GROUP)


def candidates(logits: Rows, index: Ids, top_k: Ids) -> Candidates:
    """The `top_k[i]` likeliest tokens, and some more, of each of the rows `logits[index[i]]`, which
    is called row i. Mostly without the GIL.

    Where the maxima of `top_k` columns are at least x, at least as many logits are at least x: only
    those columns are looked at.
    """
    n_vocab = logits.shape[1]
    n_columns = width(n_vocab)
    depth, n_rest = divmod(n_vocab, n_columns)
    maxima = _maxima(logits, index, n_columns)
    least = _least(maxima, top_k)
    # Of two-dimensional arrays `nonzero` takes ten times as long as of flat ones.
    hits = np.flatnonzero(maxima >= least[:, None])
    rows = hits // n_columns
    columns = hits - rows * n_columns
    n_deep = depth + (n_rest > 0)
    places = (index[rows] * n_vocab + columns)[:, None] + np.arange(n_deep) * n_columns
    values = logits.reshape(-1).take(places, mode="clip")
    if n_rest:
        values[columns >= n_rest, -1] = -np.inf
    found = np.flatnonzero(values >= least[rows, None])
    hit = found // n_deep
    rows, ids = rows[hit], columns[hit] + (found - hit * n_deep) * n_columns
    order = np.argsort(rows * n_vocab + ids)
    return Candidates(rows[order], ids[order], values.ravel()[found[order]])


def joined(parts: Sequence[Candidates], starts: Sequence[int]) -> Candidates:
    """The candidates of several parts, whose rows begin at `starts`, as those of one."""
    if len(parts) == 1:
        return parts[0]
    rows = [part.rows + start for part, start in zip(parts, starts, strict=True)]
    ids, logits = [part.ids for part in parts], [part.logits for part in parts]
    return Candidates(np.concatenate(rows), np.concatenate(ids), np.concatenate(logits))


def draw(found: Candidates, settings: Settings, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """A token of each row by its settings and the random number `numbers[i]` in [0, 1); -1 where a
    row has no finite logit or an infinite one, or far more of its likeliest than are asked for.

    The draw goes along the tokens in the vocabulary's order: rounding hardly ever changes it.
    """
    n_rows = len(numbers)
    infinite = np.unique(found.rows[np.isposinf(found.logits)])
    if len(infinite):
        finite = ~np.isin(found.rows, infinite)
        found = Candidates(found.rows[finite], found.ids[finite], found.logits[finite])
    if n_rows <= _FEW:
        return np.array([_draw_row(found, settings, row, numbers[row]) for row in range(n_rows)])
    counts = np.bincount(found.rows, minlength=n_rows)
    if counts.min() == 0 or counts.max() > _MOST_CANDIDATES:
        return _draw_some(found, counts, settings, numbers)
    starts = np.cumsum(counts) - counts
    # A table with a row for each sequence: its candidates, then nothing.
    table = np.full((n_rows, counts.max()), -np.inf)
    table[found.rows, np.arange(len(found.rows)) - starts[found.rows]] = found.logits
    falling = np.sort(table, axis=1)[:, ::-1]
    highest = falling[:, :1]
    n_kept = _n_kept(falling - highest, settings)
    lowest = falling[np.arange(n_rows), n_kept - 1]
    weights = np.exp((table - highest) / settings.temperature[:, None])
    weights[table < lowest[:, None]] = 0
    sums = np.cumsum(weights, axis=1)
    totals = sums[:, -1]
    borders = np.minimum(numbers * totals, np.nextafter(totals, 0))
    drawn = (sums > borders[:, None]).argmax(axis=1)
    tokens: NDArray[np.int64] = found.ids[starts + drawn]
    return tokens


def _draw_row(found: Candidates, settings: Settings, row: int, number: float) -> int:
    """The same for one of few rows."""
    mine = slice(None)
    if len(settings.top_k) > 1:
        start, end = np.searchsorted(found.rows, (row, row + 1))
        mine = slice(start, end)
    logits = found.logits[mine].tolist()
    if not 0 < len(logits) <= _MOST_CANDIDATES:
        return -1
    top_k, top_p, depth, temperature = (column[row].item() for column in settings)
    falling = sorted(logits, reverse=True)
    highest = falling[0]
    n_kept = min(top_k, len(falling))
    if top_p < 1:
        sums = list(itertools.accumulate(math.exp(one - highest) for one in falling[:n_kept]))
        n_kept = min(n_kept, bisect.bisect_left(sums, top_p * sums[-1]) + 1)
    if depth > -math.inf:
        n_kept = min(n_kept, sum(one - highest >= depth for one in falling))
    lowest = falling[n_kept - 1]
    sums = list(
        itertools.accumulate(
            math.exp((one - highest) / temperature) if one >= lowest else 0.0 for one in logits
        )
    )
    border = min(number * sums[-1], math.nextafter(sums[-1], 0))
    return int(found.ids[mine][bisect.bisect_right(sums, border)])


def compiled_draws(index: Ids, settings: Settings) -> compiled.Draws | None:
    """What draws the same from the rows `index` in machine code, where there is some."""
    return compiled.Draws(index, settings, _LEAST) if compiled.AVAILABLE else None


def draw_one(row: NDArray[np.float32], plain: Plain, number: float) -> int:
    """The same for one row."""
    index, settings = np.zeros(1, dtype=np.intp), Settings.of([plain])
    quick = compiled_draws(index, settings)
    if quick is not None:
        return quick(row[None, :], [number], 1)[0]
    found = candidates(row[None, :], index, settings.top_k)
    return int(draw(found, settings, np.array([number]))[0])


def _draw_some(
    found: Candidates, counts: Ids, settings: Settings, numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The tokens of those rows that have enough candidates and not too many."""
    tokens = np.full(len(numbers), -1, dtype=np.int64)
    usable = (counts > 0) & (counts <= _MOST_CANDIDATES)
    if usable.any():
        kept = usable[found.rows]
        rows = (np.cumsum(usable) - 1)[found.rows[kept]]
        some = Candidates(rows, found.ids[kept], found.logits[kept])
        tokens[usable] = draw(some, settings.some(usable), numbers[usable])
    return tokens


def _maxima(logits: Rows, index: Ids, n_columns: int) -> Rows:
    """The largest logit of each column, shape (rows, columns)."""
    depth, n_rest = divmod(logits.shape[1], n_columns)
    maxima = np.empty((len(index), n_columns), dtype=np.float32)
    first = int(index[0])
    if (index == np.arange(first, first + len(index))).all():
        spans = [(logits[first : first + len(index)], maxima)]
    else:
        spans = [(logits[i : i + 1], maxima[n : n + 1]) for n, i in enumerate(index.tolist())]
    for rows, found in spans:
        n_whole = depth * n_columns
        rows[:, :n_whole].reshape(len(rows), depth, n_columns).max(axis=1, out=found)
        if n_rest:
            np.maximum(found[:, :n_rest], rows[:, n_whole:], out=found[:, :n_rest])
    return maxima


def _least(maxima: Rows, top_k: Ids) -> Rows:
    """Of each row a logit that at least `top_k` reach, above what is banned."""
    groups = maxima.reshape(len(maxima), _GROUP, -1).max(axis=1)
    least = np.empty(len(maxima), dtype=np.float32)
    for k in set(top_k.tolist()):
        those = top_k == k
        bests = (groups if 2 * k <= groups.shape[1] else maxima)[those]
        border = bests.shape[1] - k
        least[those] = np.partition(bests, border, axis=1)[:, border]
    return np.maximum(least, np.float32(_LEAST))


def _n_kept(below: NDArray[np.float64], settings: Settings) -> NDArray[np.int64]:
    """How many of each row's candidates are left, which are `below` the highest and falling."""
    top_k, top_p, depth, _ = settings
    n_kept: NDArray[np.int64] = np.minimum(top_k, (below > -np.inf).sum(axis=1))
    if top_p.min() < 1:
        weights = np.exp(below)
        weights[np.arange(below.shape[1]) >= n_kept[:, None]] = 0
        sums = np.cumsum(weights, axis=1)
        n_in = (sums < top_p[:, None] * sums[:, -1:]).sum(axis=1) + 1
        n_kept = np.minimum(n_kept, n_in)
    if depth.max() > -np.inf:
        n_kept = np.minimum(n_kept, (below >= depth[:, None]).sum(axis=1))
    return n_kept
