"""Random numbers with a seed, and weighted draws by them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Dice:
    """A generator of random numbers with a seed of 32 bits, of which `n_drawn` were taken before.
    Each `stream` of one seed is another generator. For one thread at a time.
    """

    __slots__ = ("_random", "_returned")

    def __init__(self, seed: int, n_drawn: int = 0, stream: int = 0) -> None:
        key = np.array([seed, stream], dtype=np.uint64)
        self._random = np.random.Generator(np.random.Philox(key=key))
        self._random.random(n_drawn)
        self._returned: list[float] = []

    def uniform(self) -> float:
        """The next number, from 0 up to but not 1."""
        return self._returned.pop() if self._returned else self._random.random()

    def give_back(self, numbers: Sequence[float]) -> None:
        """The last `numbers` that were taken, in their order, are the next ones again."""
        self._returned += reversed(numbers)

    def happens(self, probability: float) -> bool:
        """Whether something with this probability comes true. Takes one number."""
        return self.uniform() < probability


def weighted(logits: NDArray[np.float32], number: float) -> int:
    """An index into `logits`, not empty, for a number in [0, 1): as often as their softmax says.

    It is found along the sum of probabilities in the order given: where the order does not hang on
    the values, a value that is rounded otherwise moves a border a little, and hardly ever changes a
    draw.
    """
    highest = logits.max()
    if not np.isfinite(highest):
        return int(logits.argmax())
    sums = np.cumsum(np.exp(logits - highest, dtype=np.float64))
    return min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(sums) - 1)
