"""Which of the pairs that fit is taken: the best, or one measured to be as good that is faster or
smaller."""

from dataclasses import replace

from kvserve.core.loss import Quality
from kvserve.core.machine import Backend
from kvserve.core.plan import Candidate

FASTER = 1.05
"""A measured speed must be so many times another to count as faster."""


def best_of(fitting: list[Candidate], quality: Quality) -> Candidate:
    """Choose among candidates that fit, given in the ladder's order, at least one.

    Pairs are compared by their KLD above the noise floor, and those within the noise floor of the
    least are equal. Of equal ones the one that was measured to decode fastest wins, then the
    smallest; on the CPU, where only f16 has a fast path, a smaller one that was not timed does not.
    Where the ladder's best was not measured the ladder stands. The choice carries its reason.
    """
    first = fitting[0]
    excess = {c: quality.excess(c.launch.pair, c.launch.n_ctx) for c in fitting}
    measured = {c: value for c, value in excess.items() if value is not None}
    if first not in measured:
        return first
    limit = min(measured.values()) + quality.noise(first.launch.n_ctx)
    equals = [c for c, value in measured.items() if value <= limit]
    best = equals[0]
    for rival in equals[1:]:
        if _wins(rival, best, quality):
            best = rival
    if best == equals[0]:
        if best == first:
            return first
        return replace(best, reason="chosen: the least measured loss that fits")
    how = "smaller" if _speed_ratio(best, equals[0], quality) < FASTER else "faster"
    return replace(
        best,
        reason=f"chosen: within the measured noise of {equals[0].launch.pair}, and {how}",
    )


def _wins(rival: Candidate, best: Candidate, quality: Quality) -> bool:
    known = quality.decode_tps(rival.launch.pair, rival.launch.n_ctx) is not None
    ratio = _speed_ratio(rival, best, quality)
    if ratio >= FASTER or ratio <= 1 / FASTER:
        return ratio >= FASTER
    if not known and rival.launch.backend is Backend.CPU:
        return False
    return rival.memory.total_bytes < best.memory.total_bytes


def _speed_ratio(one: Candidate, other: Candidate, quality: Quality) -> float:
    """Measured decode speeds; 1 where either is not known."""
    speeds = [quality.decode_tps(c.launch.pair, c.launch.n_ctx) for c in (one, other)]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else 1.0
