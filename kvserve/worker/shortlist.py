"""The few tokens of a row of logits that a draw can fall on, found before llama.cpp sees any.

A sampler chain over a whole vocabulary of 262,144 tokens takes from 0.3 to 25 ms. Here the row is
read once or twice with NumPy, which drops the GIL, and the chain gets what is left. Results are
those of the whole row: no token that the chain could keep is left out.
"""

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.intp]

BLOCK = 512
"""Tokens to a block: about the root of a large vocabulary."""
_BUCKET_BITS = 19
"""Leaves sign, exponent and 4 bits of a float32: 16 buckets for each power of two."""
NEVER = -1e9
"""The logit of a token that must not be drawn; what a grammar rules out is at -inf."""


def most(n_vocab: int) -> int:
    """The largest `n` that `largest` takes."""
    return max(n_vocab // BLOCK // 2, 1)


def largest(row: Row, n: int) -> Ids:
    """The `n` tokens with the largest logits and some more, unsorted.

    Where that many blocks have a maximum of at least x, at least `n` logits are at least x.
    """
    whole = len(row) // BLOCK * BLOCK
    if whole < n * BLOCK:
        least = np.partition(row, len(row) - n)[len(row) - n] if n < len(row) else -np.inf
        return above(row, float(least))
    maxima = row[:whole].reshape(-1, BLOCK).max(axis=1)
    least = np.partition(maxima, len(maxima) - n)[len(maxima) - n]
    return _above(row, float(least), maxima)


def above(row: Row, least: float) -> Ids:
    """All tokens whose logit is at least `least`; unsorted, never none."""
    return _above(row, least, row[: len(row) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1))


def nucleus(row: Row, top_p: float) -> Ids:
    """The smallest set of likeliest tokens with a probability of `top_p` together; unsorted
    (Holtzman et al., 2020)."""
    below = row.max() - row
    weights = np.exp(-below)
    return _first(below, weights, top_p * float(weights.sum(dtype=np.float64)))


def typical(row: Row, typical_p: float) -> Ids:
    """The tokens whose surprise is nearest to the mean one, until they have a probability of
    `typical_p` together; unsorted (Meister et al., 2022)."""
    surprise = row.max() - row
    weights = np.exp(-surprise)
    total = float(weights.sum(dtype=np.float64))
    # The mean and each token's surprise lack the same log(total). What is at -inf weighs nothing.
    held = np.flatnonzero(weights)
    mean = float(np.dot(weights[held], surprise[held])) / total
    return _first(np.abs(surprise - np.float32(mean)), weights, typical_p * total)


def _first(keys: Row, weights: Row, wanted: float) -> Ids:
    """Those with the lowest `keys`, which are not negative, until their `weights` add up to
    `wanted`. Sorts only where the border runs: the upper bits of a positive float are a bucket."""
    buckets = keys.view(np.int32) >> _BUCKET_BITS
    mass = np.cumsum(np.bincount(buckets, weights))
    border = min(int(np.searchsorted(mass, wanted)), len(mass) - 1)
    inside = np.flatnonzero(buckets == border)
    inside = inside[np.argsort(keys[inside], kind="stable")]
    before = float(mass[border - 1]) if border else 0.0
    n = int(np.searchsorted(np.cumsum(weights[inside], dtype=np.float64), wanted - before)) + 1
    return np.concatenate((np.flatnonzero(buckets < border), inside[:n]))


def _above(row: Row, least: float, maxima: Row) -> Ids:
    least = max(least, np.nextafter(np.float32(NEVER), np.float32(0)))
    blocks = np.flatnonzero(maxima >= least)
    n_in_blocks = len(maxima) * BLOCK
    found = np.flatnonzero(row[:n_in_blocks].reshape(-1, BLOCK)[blocks] >= least)
    ids = blocks[found // BLOCK] * BLOCK + found % BLOCK
    if n_in_blocks < len(row):
        ids = np.concatenate((ids, np.flatnonzero(row[n_in_blocks:] >= least) + n_in_blocks))
    # Where everything is ruled out, the end token that a grammar asks for is only banned.
    return ids if len(ids) else np.array([row.argmax()])
