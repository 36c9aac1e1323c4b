"""Mirostat: draws whose mean surprise is steered to a target (Basu et al., 2021)."""

import numpy as np
from numpy.typing import NDArray

from kvserve.worker.dice import weighted
from kvserve.worker.shortlist import largest

Row = NDArray[np.float32]

_N_ESTIMATE = 100
"""The likeliest tokens that the slope of the distribution is estimated from (m in the paper)."""


class Mirostat:
    """Version 1 or 2, as in llama.cpp (src/llama-sampler.cpp), after the temperature.

    A generation that is resumed begins again with a surprise of twice `tau`: what its tokens cost
    is not known any more. For one thread at a time.
    """

    def __init__(self, version: int, tau: float, eta: float, temperature: float) -> None:
        self._version = version
        self._tau = tau
        self._eta = eta
        self._temperature = temperature
        self.max_surprise = 2 * tau

    def sample(self, row: Row, number: float) -> int:
        """Draw a token with a number in [0, 1), and let what it cost move the limit."""
        highest = row.max()
        if not np.isfinite(highest):
            return int(row.argmax())
        logits = (row - highest) / np.float32(self._temperature)
        log_total = np.log(np.exp(logits).sum(dtype=np.float64))
        logprobs = logits - np.float32(log_total)
        ids = self._by_slope(logprobs) if self._version == 1 else self._by_surprise(logprobs)
        kept = logprobs[ids]
        token = int(ids[weighted(kept, number)])
        mass = np.exp(kept).sum(dtype=np.float64)
        surprise = float((np.log(mass) - logprobs[token]) / np.log(2))
        self.max_surprise -= self._eta * (surprise - self._tau)
        return token

    def _by_surprise(self, logprobs: Row) -> NDArray[np.intp]:
        ids = np.flatnonzero(logprobs >= -self.max_surprise * np.log(2))
        return ids if len(ids) else np.array([logprobs.argmax()])

    def _by_slope(self, logprobs: Row) -> NDArray[np.intp]:
        """The k likeliest: k such that a Zipf distribution with the slope of the likeliest tokens
        has the wanted surprise."""
        n_vocab = len(logprobs)
        likeliest = np.sort(logprobs[largest(logprobs, min(_N_ESTIMATE, n_vocab))])[::-1]
        steps = -np.diff(likeliest.astype(np.float64))
        ranks = np.log(np.arange(2, len(likeliest) + 1) / np.arange(1, len(likeliest)))
        # NumPy's numbers: a target out of reach makes them infinite, where Python's would raise.
        slope = (ranks * steps).sum() / (ranks * ranks).sum() if len(steps) else np.float64(1)
        excess = slope - 1
        with np.errstate(all="ignore"):
            k = (
                (excess * np.exp2(np.float64(self.max_surprise)))
                / (1 - np.float64(n_vocab) ** -excess)
            ) ** (1 / slope)
        n_kept = int(min(max(k, 1), n_vocab)) if np.isfinite(k) else n_vocab
        return largest(logprobs, n_kept)
