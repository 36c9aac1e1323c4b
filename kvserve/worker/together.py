"""The draws of many sequences at once, where nothing but top-k, top-p and min-p shortens the list.

One after another, each row costs some thirty NumPy calls on short arrays, during which no other
thread can run: 0.45 ms a row beside an H100, with eight threads as with one. Here all rows share
those calls. What a row gives hangs on that row alone: the same token comes of it in any company.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvserve.worker.shortlist import NEVER

Rows = NDArray[np.float32]
Ids = NDArray[np.intp]

_LEAST = float(np.nextafter(np.float32(NEVER), np.float32(0)))
_LARGEST_BLOCK = 512
_FEWEST_BLOCKS = 128
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
        return 2 * self.top_k <= n_vocab // block_size(n_vocab)


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


def block_size(n_vocab: int) -> int:
    """Tokens to a block: of a large vocabulary about its root."""
    size = _LARGEST_BLOCK
    while size > 1 and n_vocab // size < _FEWEST_BLOCKS:
        size //= 2
    return size


def candidates(logits: Rows, index: Ids, top_k: Ids) -> Candidates:
    """The `top_k[i]` likeliest tokens, and some more, of each of the rows `logits[index[i]]`, which
    is called row i. Mostly without the GIL.

    Where `top_k` blocks have a maximum of at least x, at least as many logits are at least x: only
    those blocks are looked at.
    """
    n_vocab = logits.shape[1]
    size = block_size(n_vocab)
    n_whole = n_vocab // size
    maxima = _maxima(logits, index, size)
    least = _least(maxima, top_k)
    whole = logits[:, : n_whole * size].reshape(len(logits), n_whole, size)
    # Of two-dimensional arrays `nonzero` takes ten times as long as of flat ones.
    hits = np.flatnonzero(maxima[:, :n_whole] >= least[:, None])
    rows = hits // n_whole
    blocks = hits - rows * n_whole
    values = whole[index[rows], blocks]
    found = np.flatnonzero(values >= least[rows, None])
    hit = found // size
    rows, ids = rows[hit], blocks[hit] * size + (found - hit * size)
    values = values.ravel()[found]
    last = np.flatnonzero(maxima[:, -1] >= least) if n_whole < maxima.shape[1] else ()
    if len(last):
        rest = logits[index[last], n_whole * size :]
        more, within = np.nonzero(rest >= least[last, None])
        rows = np.concatenate((rows, last[more]))
        by_row = np.argsort(rows, kind="stable")
        rows = rows[by_row]
        ids = np.concatenate((ids, n_whole * size + within))[by_row]
        values = np.concatenate((values, rest[more, within]))[by_row]
    return Candidates(rows, ids, values)


def joined(parts: Sequence[Candidates], starts: Sequence[int]) -> Candidates:
    """The candidates of several parts, whose rows begin at `starts`, as those of one."""
    if len(parts) == 1:
        return parts[0]
    rows = [part.rows + start for part, start in zip(parts, starts, strict=True)]
    ids, logits = [part.ids for part in parts], [part.logits for part in parts]
    return Candidates(np.concatenate(rows), np.concatenate(ids), np.concatenate(logits))


def draw(found: Candidates, settings: Settings, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """A token of each row by its settings and the random number `numbers[i]` in [0, 1); -1 where a
    row has no finite logit, or far more of its likeliest than are asked for.

    The draw goes along the tokens in the vocabulary's order: rounding hardly ever changes it.
    """
    n_rows = len(numbers)
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


def draw_one(row: NDArray[np.float32], plain: Plain, number: float) -> int:
    """The same for one row."""
    settings = Settings.of([plain])
    found = candidates(row[None, :], np.zeros(1, dtype=np.intp), settings.top_k)
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


def _maxima(logits: Rows, index: Ids, size: int) -> Rows:
    """The largest logit of each block, shape (rows, blocks); a shorter block may be the last."""
    n_vocab = logits.shape[1]
    n_whole = n_vocab // size
    maxima = np.empty((len(index), -(-n_vocab // size)), dtype=np.float32)
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1:
        spans = [(logits[first : last + 1], maxima)]
    else:
        spans = [(logits[i : i + 1], maxima[n : n + 1]) for n, i in enumerate(index.tolist())]
    for rows, found in spans:
        whole = rows[:, : n_whole * size].reshape(len(rows), n_whole, size)
        whole.max(axis=2, out=found[:, :n_whole])
        if n_whole < maxima.shape[1]:
            rows[:, n_whole * size :].max(axis=1, out=found[:, -1])
    return maxima


def _least(maxima: Rows, top_k: Ids) -> Rows:
    """Of each row a logit that at least `top_k` reach, above what is banned."""
    n_blocks = maxima.shape[1]
    least = np.empty(len(maxima), dtype=np.float32)
    for k in set(top_k.tolist()):
        those = top_k == k
        least[those] = np.partition(maxima[those], n_blocks - k, axis=1)[:, n_blocks - k]
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
