"""Measurements for tests of the choice."""

from kvserve.core.dtypes import parse_pair
from kvserve.core.loss import Quality, TextLoss

NOISE = 0.004


def measured(pair: str, kld: float, *, depth: int = 4096, mode: str = "prefill") -> TextLoss:
    figures = (100, kld, 0.0, kld, kld, kld, 1 - kld, 0.0, 0.0, 9.0, 1.0, 1.0, 1.0)
    return TextLoss(parse_pair(pair), mode, depth, *figures)  # type: ignore[arg-type]


def measured_alike(*pairs: str) -> Quality:
    """Pairs that lose no more than rounding does."""
    return Quality(tuple(measured(pair, NOISE) for pair in pairs))
