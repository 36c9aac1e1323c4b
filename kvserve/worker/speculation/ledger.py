"""What speculation has cost and won, so that it never costs more than a small share."""

SHARE = 0.008
"""Of all the time that decoding takes, so much may be lost on trials that win nothing."""
_MOST_STEPS = 2.0
"""What was won earlier, or is given at the beginning, pays for no more than so many steps' time."""
_MOST_OWED = 5.0
"""Steps' time that losses may add up to."""


class Ledger:
    """A balance in seconds: it grows by a share of all steps and by what speculation wins, and
    falls by what it costs. While it is negative, nothing should be tried."""

    __slots__ = ("_begun", "balance_seconds")

    def __init__(self) -> None:
        self.balance_seconds = 0.0
        self._begun = False

    @property
    def solvent(self) -> bool:
        """Whether anything may be tried."""
        return self.balance_seconds >= 0

    def observe(self, step_seconds: float, won_seconds: float, spent_seconds: float = 0.0) -> None:
        """Note a step which would take `step_seconds` without speculation, what it won (negative:
        lost), and the time that was spent to propose."""
        before = self.balance_seconds if self._begun else _MOST_STEPS * step_seconds
        self._begun = True
        balance = before + SHARE * step_seconds + won_seconds
        balance = max(balance, min(before, -_MOST_OWED * step_seconds))
        self.balance_seconds = min(balance, _MOST_STEPS * step_seconds) - spent_seconds
