"""Rows of logits against rows of logits: KLD, likeliest tokens, the text's own tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]


def log_probs(logits: Row) -> Row:
    """Natural log probabilities of one row of logits, shape (n_vocab,), in float32.

    The sum is taken in float64: errors stay near 1e-7, far below any KLD that matters.
    """
    shifted: Row = logits - logits.max()
    shifted -= np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted


@dataclass(slots=True)
class Tally:
    """One candidate's divergences from a reference, position by position."""

    klds: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)

    def add(self, reference: Row, logits: Row, token: int) -> None:
        """Compare log probabilities of the reference with logits of the candidate; `token` is what
        the text goes on with."""
        found = log_probs(logits)
        # exp(-inf) is 0, and 0 times an infinite difference must count as 0.
        weight = np.exp(reference)
        with np.errstate(invalid="ignore"):
            terms = np.where(weight > 0, weight * (reference - found), np.float32(0))
        self.klds.append(max(0.0, float(terms.sum(dtype=np.float64))))
        self.same_top.append(bool(reference.argmax() == found.argmax()))
        self.reference.append(float(reference[token]))
        self.candidate.append(float(found[token]))


def compare(references: Iterable[Row], rows: Iterable[Row], following: Iterable[int]) -> Tally:
    """Tally a whole stretch of text: all three are by position and of one length."""
    tally = Tally()
    for reference, logits, token in zip(references, rows, following, strict=True):
        tally.add(reference, logits, int(token))
    return tally
