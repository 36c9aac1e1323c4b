"""Positions and answers boiled down to figures. Pure; NumPy in, plain numbers out."""

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from kvserve.core.dtypes import CachePair, parse_pair
from kvserve.core.loss import TaskResult, TextLoss
from kvserve.ipc.evaluating import Scored

Z_95 = 1.959964
"""Half the width of a 95 % interval, in standard errors."""
CHANCE_LEVEL = 0.05
"""The reference must beat chance at this level for a task to say anything."""


def text_losses(answers: Sequence[Scored]) -> list[TextLoss]:
    """One row for each pair, mode and depth, over all pieces of text."""

    def key(answer: Scored) -> tuple[int, str, str]:
        return answer.depth, answer.pair, answer.mode

    found = []
    for (depth, pair, mode), group in groupby(sorted(answers, key=key), key):
        parts = sorted(group, key=lambda part: part.unit)
        found.append(
            summarize(
                parse_pair(pair),
                mode,
                depth,
                klds=[kld for part in parts for kld in part.klds],
                same_top=[same for part in parts for same in part.same_top],
                reference=[lp for part in parts for lp in part.reference],
                candidate=[lp for part in parts for lp in part.candidate],
            )
        )
    return found


def summarize(
    pair: CachePair,
    mode: str,
    depth: int,
    *,
    klds: Sequence[float],
    same_top: Sequence[bool],
    reference: Sequence[float],
    candidate: Sequence[float],
) -> TextLoss:
    """The figures of at least one position; `reference` and `candidate` are natural log
    probabilities of the text's own tokens. Standard errors take positions as independent."""
    n = len(klds)
    kld = np.asarray(klds, dtype=np.float64)
    before, after = np.asarray(reference), np.asarray(candidate)
    delta = np.exp(after) - np.exp(before)
    change = before - after
    middle, half = float(change.mean()), Z_95 * standard_error(change)
    return TextLoss(
        pair=pair,
        mode=mode,
        depth=depth,
        n_positions=n,
        mean_kld=float(kld.mean()),
        sem_kld=standard_error(kld),
        median_kld=float(np.median(kld)),
        p99_kld=float(np.quantile(kld, 0.99)),
        p999_kld=float(np.quantile(kld, 0.999)),
        same_top=float(np.mean(same_top)),
        mean_delta_p=float(delta.mean()),
        rms_delta_p=float(np.sqrt((delta**2).mean())),
        ppl_reference=math.exp(-float(before.mean())),
        ppl_ratio=math.exp(middle),
        ppl_ratio_low=math.exp(middle - half),
        ppl_ratio_high=math.exp(middle + half),
    )


def standard_error(values: "np.typing.NDArray[np.float64]") -> float:
    """Of the mean of `values`; 0 for a single one."""
    n = len(values)
    return float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def compare_tasks(
    task: str, pair: CachePair, reference: Sequence[bool], candidate: Sequence[bool], chance: float
) -> TaskResult:
    """Right or wrong, item by item, as one row. Raises ValueError for unequal lengths."""
    pairs = list(zip(reference, candidate, strict=True))
    n_lost = sum(was and not now for was, now in pairs)
    n_won = sum(now and not was for was, now in pairs)
    n_right = sum(reference)
    return TaskResult(
        task=task,
        pair=pair,
        n=len(pairs),
        n_reference=n_right,
        n_candidate=sum(candidate),
        n_lost=n_lost,
        n_won=n_won,
        p_value=mcnemar(n_lost, n_won),
        chance=chance,
        measurable=upper_tail(n_right, len(pairs), chance) < CHANCE_LEVEL,
    )


def mcnemar(n_lost: int, n_won: int) -> float:
    """Exact two-sided p value that items change in one direction as often as in the other
    (McNemar 1947, in its binomial form); 1 where nothing changed."""
    n = n_lost + n_won
    if n == 0:
        return 1.0
    return min(1.0, 2 * upper_tail(max(n_lost, n_won), n, 0.5))


def upper_tail(k: int, n: int, p: float) -> float:
    """Probability of `k` or more successes in `n` trials with probability `p` each."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
