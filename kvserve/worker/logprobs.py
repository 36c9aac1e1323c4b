"""Log probabilities out of one row of logits."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Likelihood, TokenLogprobs

_BLOCK = 512
"""Tokens to a block: about the root of a large vocabulary."""

Row = NDArray[np.float32]


def token_logprobs(
    request: int, row: Row, token: int, n_top: int, piece: Callable[[int], bytes]
) -> TokenLogprobs:
    """The likelihoods of the drawn `token` and of the `n_top` likeliest ones.

    `row` holds the logits as the model left them; `piece` gives a token's bytes.
    """
    normalizer = log_sum_exp(row)

    def likelihood(which: int) -> Likelihood:
        return Likelihood(which, piece(which), float(row[which]) - normalizer)

    return TokenLogprobs(request, likelihood(token), tuple(map(likelihood, largest(row, n_top))))


def log_sum_exp(row: Row) -> float:
    """log(sum(exp(row))), shifted by the maximum, so that nothing overflows."""
    highest = float(row.max())
    return highest + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))


def largest(row: Row, n: int) -> list[int]:
    """Indices of the `n` largest values, in falling order; equal ones by index.

    The n largest lie in the n blocks with the largest maxima, so that only those are sorted.
    """
    n = min(n, len(row))
    if n <= 0:
        return []
    n_blocks = len(row) // _BLOCK
    if n_blocks <= n:
        return _largest_of(row, np.arange(len(row)), n)
    maxima = row[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
    blocks = np.argsort(-maxima, kind="stable")[:n]
    inside = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
    candidates = np.concatenate([inside, np.arange(n_blocks * _BLOCK, len(row))])
    return _largest_of(row, np.sort(candidates), n)


def _largest_of(row: Row, indices: NDArray[np.intp], n: int) -> list[int]:
    values = row[indices]
    least = np.partition(values, len(values) - n)[len(values) - n]
    chosen = indices[values >= least]
    order: list[int] = chosen[np.argsort(-row[chosen], kind="stable")].tolist()
    return order[:n]
