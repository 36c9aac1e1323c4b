"""Which tokens of a row of logits a draw can fall on: top-k, typical, top-p, min-p and XTC.

llama.cpp's own steps take from 0.3 to 25 ms over a vocabulary of 262,144 tokens, and sort it. Here
the row is read once or twice with NumPy, which drops the GIL. All functions return ascending
indices: a draw goes along the tokens in an order that does not hang on their logits, lest two that
are nearly equal change places with the size of the batch. Of a row without finite logits there is
one index.
"""

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.intp]

BLOCK = 512
"""Tokens to a block: about the root of a large vocabulary."""
_LEAST_MASS = float(np.finfo(np.float64).tiny)
_BUCKET_BITS = 19
"""Leaves sign, exponent and 4 bits of a float32: 16 buckets for each power of two."""
NEVER = -1e9
"""The logit of a token that must not be drawn; what a grammar rules out is at -inf."""


def largest(row: Row, n: int) -> Ids:
    """The `n` largest logits, of equal ones the first.

    Where that many blocks have a maximum of at least x, at least `n` logits are at least x: only
    those blocks are looked at.
    """
    whole = len(row) // BLOCK * BLOCK
    if n >= len(row):
        return above(row, -np.inf)
    if whole < n * BLOCK:
        ids = above(row, float(np.partition(row, len(row) - n)[len(row) - n]))
    else:
        maxima = row[:whole].reshape(-1, BLOCK).max(axis=1)
        ids = _above(row, float(np.partition(maxima, len(maxima) - n)[len(maxima) - n]), maxima)
    if len(ids) <= n:
        return ids
    return np.sort(ids[np.argsort(-row[ids], kind="stable")[:n]])


def above(row: Row, least: float) -> Ids:
    """All logits that are at least `least`; never none."""
    return _above(row, least, row[: len(row) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1))


def nucleus(logits: Row, top_p: float) -> Ids:
    """The smallest set of likeliest tokens with a probability of `top_p` together (Holtzman et
    al., 2020)."""
    highest = logits.max()
    if not np.isfinite(highest):
        return np.array([logits.argmax()])
    # Of zeros with different signs the difference is a negative zero, which is no bucket.
    below = np.abs(highest - logits)
    weights = np.exp(-below)
    return _first(below, weights, top_p * float(weights.sum(dtype=np.float64)))


def typical(logits: Row, typical_p: float) -> Ids:
    """The tokens whose surprise is nearest to the mean one, until they have a probability of
    `typical_p` together (Meister et al., 2022)."""
    highest = logits.max()
    if not np.isfinite(highest):
        return np.array([logits.argmax()])
    surprise = highest - logits
    weights = np.exp(-surprise)
    total = float(weights.sum(dtype=np.float64))
    # The mean and each token's surprise lack the same log(total). What is at -inf weighs nothing.
    held = np.flatnonzero(weights)
    mean = float(np.dot(weights[held], surprise[held])) / total
    return _first(np.abs(surprise - np.float32(mean)), weights, typical_p * total)


def without_top_choices(logits: Row, threshold: float) -> Ids:
    """XTC where it takes place: all but the tokens with a probability of at least `threshold`, of
    which the least likely one stays (p-e-w, text-generation-webui pull request 6335)."""
    highest = logits.max()
    if not np.isfinite(highest):
        return np.array([logits.argmax()])
    weights = np.exp(logits - highest)
    top = np.flatnonzero(weights >= threshold * weights.sum(dtype=np.float64))
    if len(top) < 2:
        return np.arange(len(logits))
    return np.delete(np.arange(len(logits)), np.delete(top, weights[top].argmin()))


def _first(keys: Row, weights: Row, wanted: float) -> Ids:
    """Those with the lowest `keys`, which are not negative, until their `weights` add up to
    `wanted`; never none. Sorts only where the border runs: the upper bits of a positive float are a
    bucket."""
    buckets = keys.view(np.int32) >> _BUCKET_BITS
    mass = np.cumsum(np.bincount(buckets, weights))
    border = min(int(np.searchsorted(mass, max(wanted, _LEAST_MASS))), len(mass) - 1)
    inside = np.flatnonzero(buckets == border)
    inside = inside[np.argsort(keys[inside], kind="stable")]
    before = float(mass[border - 1]) if border else 0.0
    n = int(np.searchsorted(np.cumsum(weights[inside], dtype=np.float64), wanted - before)) + 1
    taken = buckets < border
    taken[inside[:n]] = True
    return np.flatnonzero(taken)


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
