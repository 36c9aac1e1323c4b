"""What speculation has cost and won, so that it never costs more than a small share."""

SHARE = 0.01
"""Of all the time that decoding takes, so much may be lost on trials that win nothing."""
_MOST_STEPS = 2.0
"""What was won earlier pays for no more than so many steps' time."""


class Ledger:
    """A balance in seconds: it grows by a share of all steps and by what speculation wins, and
    falls by what it costs. While it is negative, nothing should be tried."""

    __slots__ = ("balance_seconds",)

    def __init__(self) -> None:
        self.balance_seconds = 0.0

    @property
    def solvent(self) -> bool:
        """Whether anything may be tried."""
        return self.balance_seconds >= 0

    def observe(self, step_seconds: float, won_seconds: float) -> None:
        """Note a step which would take `step_seconds` without speculation, and what it won
        (negative: lost)."""
        balance = self.balance_seconds + SHARE * step_seconds + won_seconds
        # A debt is bounded too: one step that something else held up must not end it for long.
        self.balance_seconds = min(max(balance, -step_seconds), _MOST_STEPS * step_seconds)
