"""A progress bar with the time left, for a terminal or a log."""

import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24


class Progress:
    """Tells how far an evaluation is: one line rewritten on a terminal, a line for each tenth
    elsewhere. `total` and the steps are in tokens."""

    def __init__(
        self, total: int, out: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = max(1, total)
        self._out = out
        self._clock = clock
        self._begun = clock()
        self._n_done = 0
        self._tenth = -1
        self._live = out.isatty()

    def step(self, n_tokens: int, what: str) -> None:
        """`what` is over, which was `n_tokens` of the work."""
        self._n_done += n_tokens
        share = min(1.0, self._n_done / self._total)
        text = f"{share:4.0%}  {left(self._clock() - self._begun, share)} left  {what}"
        if self._live:
            bar = ("#" * round(_WIDTH * share)).ljust(_WIDTH, ".")
            self._out.write(f"\r\033[K{bar} {text}")
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            self._out.write(f"{text}\n")
        self._out.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        if self._live:
            self._out.write("\r\033[K")
            self._out.flush()


def left(elapsed: float, share: float) -> str:
    """The time left as `4:05` or `1:04:05`, at the pace so far; `?` before there is one."""
    if share <= 0:
        return "?"
    minutes, seconds = divmod(round(elapsed / share * (1 - share)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
