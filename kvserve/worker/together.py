"""The draws of many sequences at once, where nothing but top-k, top-p and min-p shortens the list.

One after another, each row costs some thirty NumPy calls on short arrays, during which no other
thread can run: 0.45 ms a row beside an H100, with eight threads as with one. Here all rows share
those calls. What a row gives hangs on that row alone: the same token comes of it in any company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The `top_k` likeliest tokens, of those as many as have a probability of `top_p` together,
    and of those the ones whose logit is within `depth` of the highest. Greedy with a `top_k` of 1.
    """

    top_k: int
    top_p: float
    depth: float
    temperature: float

    def suits(self, n_vocab: int) -> bool:
        """Whether the list is short beside the vocabulary."""
        return 2 * self.top_k <= n_vocab // block_size(n_vocab)


def block_size(n_vocab: int) -> int:
    """Tokens to a block: of a large vocabulary about its root."""
    size = _LARGEST_BLOCK
    while size > 1 and n_vocab // size < _FEWEST_BLOCKS:
        size //= 2
    return size


def n_blocks(n_vocab: int) -> int:
    """Blocks that a row has, a shorter last one included."""
    return -(-n_vocab // block_size(n_vocab))


def block_maxima(rows: Rows, maxima: Rows) -> None:
    """Write the largest logit of each block into `maxima`, shape (rows, blocks); drops the GIL."""
    n_vocab = rows.shape[1]
    size = block_size(n_vocab)
    n_whole = n_vocab // size
    whole = rows[:, : n_whole * size].reshape(len(rows), n_whole, size)
    whole.max(axis=2, out=maxima[:, :n_whole])
    if n_whole < maxima.shape[1]:
        rows[:, n_whole * size :].max(axis=1, out=maxima[:, -1])


def draw(
    logits: Rows, index: Ids, maxima: Rows, plain: Sequence[Plain], numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A token of each row `logits[index[i]]`, whose `block_maxima` are `maxima[i]`, by the settings
    `plain[i]` and the random number `numbers[i]` in [0, 1); -1 where a row has no finite logit, or
    far more of its likeliest than are asked for.

    The draw goes along the tokens in the vocabulary's order: rounding hardly ever changes it.
    """
    tokens = np.full(len(index), -1, dtype=np.int64)
    choices = []
    for place, one in enumerate(plain):
        if one.top_k == 1:
            tokens[place] = _highest(logits[index[place]], maxima[place])
        else:
            choices.append(place)
    if choices:
        mine = [plain[place] for place in choices]
        tokens[choices] = _choose(logits, index[choices], maxima[choices], mine, numbers[choices])
    return tokens


def draw_one(row: NDArray[np.float32], plain: Plain, number: float) -> int:
    """The same for one row."""
    rows = row[None, :]
    maxima = np.empty((1, n_blocks(len(row))), dtype=np.float32)
    block_maxima(rows, maxima)
    tokens = draw(rows, np.zeros(1, dtype=np.intp), maxima, [plain], np.array([number]))
    return int(tokens[0])


def _highest(row: NDArray[np.float32], maxima: NDArray[np.float32]) -> int:
    """The first of the likeliest tokens."""
    size = block_size(len(row))
    start = int(maxima.argmax()) * size
    return start + int(row[start : start + size].argmax())


def _choose(
    logits: Rows, index: Ids, maxima: Rows, plain: Sequence[Plain], numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The tokens where there is a choice."""
    top_k = np.array([one.top_k for one in plain])
    rows, ids, values = _candidates(logits, index, maxima, _least(maxima, top_k))
    counts = np.bincount(rows, minlength=len(index))
    tokens = np.full(len(index), -1, dtype=np.int64)
    usable = np.flatnonzero((counts > 0) & (counts <= _MOST_CANDIDATES))
    if len(usable) < len(index):
        if len(usable):
            mine = [plain[place] for place in usable.tolist()]
            tokens[usable] = _choose(logits, index[usable], maxima[usable], mine, numbers[usable])
        return tokens
    # A table with a row for each sequence: its candidates in the vocabulary's order.
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = len(index), int(counts.max())
    table = np.full(shape, -np.inf)
    table[rows, columns] = values
    order = np.argsort(-table, axis=1, kind="stable")
    sorted_ = np.take_along_axis(table, order, axis=1)
    highest = sorted_[:, :1]
    n_kept = _n_kept(sorted_, highest, plain, np.minimum(top_k, counts))
    ranks = np.empty(shape, dtype=np.intp)
    np.put_along_axis(ranks, order, np.arange(shape[1])[None, :], axis=1)
    temperatures = np.array([[one.temperature] for one in plain])
    weights = np.exp((table - highest) / temperatures)
    weights[ranks >= n_kept[:, None]] = 0
    sums = np.cumsum(weights, axis=1)
    borders = np.minimum(numbers * sums[:, -1], np.nextafter(sums[:, -1], 0))
    drawn = (sums > borders[:, None]).argmax(axis=1)
    starts = np.cumsum(counts) - counts
    tokens[:] = ids[starts + drawn]
    return tokens


def _least(maxima: Rows, top_k: NDArray[np.int64]) -> Rows:
    """A logit that at least `top_k` of each row reach: where that many blocks have a maximum of at
    least x, at least as many logits are at least x."""
    least = np.empty(len(maxima), dtype=np.float32)
    n_blocks = maxima.shape[1]
    for k in set(top_k.tolist()):
        those = top_k == k
        least[those] = np.partition(maxima[those], n_blocks - k, axis=1)[:, n_blocks - k]
    # What is banned is never drawn.
    return np.maximum(least, np.float32(_LEAST))


def _candidates(logits: Rows, index: Ids, maxima: Rows, least: Rows) -> tuple[Ids, Ids, Rows]:
    """Row, token and logit of all that are at least `least` in their row, by row, then token."""
    n_vocab = logits.shape[1]
    size = block_size(n_vocab)
    n_whole = n_vocab // size
    whole = logits[:, : n_whole * size].reshape(len(logits), n_whole, size)
    rows, blocks = np.nonzero(maxima[:, :n_whole] >= least[:, None])
    values = whole[index[rows], blocks]
    found, within = np.nonzero(values >= least[rows][:, None])
    rows, ids, values = rows[found], blocks[found] * size + within, values[found, within]
    last = np.flatnonzero(maxima[:, -1] >= least) if n_whole < maxima.shape[1] else ()
    if len(last):
        rest = logits[index[last], n_whole * size :]
        more, within = np.nonzero(rest >= least[last][:, None])
        rows = np.concatenate((rows, last[more]))
        ids = np.concatenate((ids, n_whole * size + within))
        values = np.concatenate((values, rest[more, within]))
        by_row = np.argsort(rows, kind="stable")
        rows, ids, values = rows[by_row], ids[by_row], values[by_row]
    return rows, ids, values


def _n_kept(
    sorted_: NDArray[np.float64],
    highest: NDArray[np.float64],
    plain: Sequence[Plain],
    n_kept: NDArray[np.int64],
) -> NDArray[np.int64]:
    """How many of each row's candidates, in falling order, the settings leave."""
    if any(one.top_p < 1 for one in plain):
        weights = np.exp(sorted_ - highest)
        weights[np.arange(sorted_.shape[1]) >= n_kept[:, None]] = 0
        sums = np.cumsum(weights, axis=1)
        top_p = np.array([[one.top_p] for one in plain])
        n_in = (sums < top_p * sums[:, -1:]).sum(axis=1) + 1
        n_kept = np.where(top_p[:, 0] < 1, np.minimum(n_kept, n_in), n_kept)
    if any(one.depth > -np.inf for one in plain):
        depth = np.array([[one.depth] for one in plain])
        n_kept = np.minimum(n_kept, (sorted_ >= highest + depth).sum(axis=1))
    return n_kept
