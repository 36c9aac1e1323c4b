"""How many of the proposed tokens are worth a place in the batch."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

_LEAST_GAIN = 0.04
"""What is measured is never exact: less than this much more speed is not worth the trouble."""


def allot(
    rates: Sequence[Sequence[float]],
    seconds: Sequence[float],
    whole: Callable[[int], int] = int,
) -> list[int]:
    """How many tokens each sequence may propose, so that the batch makes the most tokens a second.

    `rates[s][i]` is how likely the i-th proposed token of sequence `s` is accepted where those
    before it were; an empty row is a sequence without a proposal. `seconds[n]` is what a step with
    `n` proposed tokens takes, as far as there is room for them; one with drafts takes as long as
    one of `whole` rows. A token is worth the product of the rates up to it: the expected
    number of accepted tokens of a run is the sum of those (Leviathan et al., 2023, equation 1, with
    a rate for each place).
    """
    gains = sorted(
        (-gain, sequence) for sequence, run in enumerate(rates) for gain in accumulate(run, mul)
    )
    expected = float(len(rates))
    fastest, n_best = (1 + _LEAST_GAIN) * expected / seconds[0], 0
    for n, (gain, _) in enumerate(gains[: len(seconds) - 1], start=1):
        expected -= gain
        n_whole = whole(len(rates) + n) - len(rates)
        speed = expected / seconds[min(n_whole, len(seconds) - 1)]
        if speed > fastest:
            fastest, n_best = speed, n
    counts = [0] * len(rates)
    for _, sequence in gains[:n_best]:
        counts[sequence] += 1
    return counts
