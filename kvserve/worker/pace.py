"""How many prompt tokens a step may take on, so that a step stays short."""

from collections import deque
from statistics import median

_BESIDE_STREAMS_S = 0.15
_ALONE_S = 1.0
_STRETCH = 1.75
"""Beside streams, prompt tokens may take so many times as long as the streams' own step: with it
the gap between two of their tokens stays below three times what it is without a prompt."""
_FEWEST = 32
_FEWEST_BESIDE = 8
_FIRST = 128
_SMOOTHING = 0.3
_GROWTH = 1.5
"""Beside streams, the limit of one step is at most so many times that of the step before."""
_N_STEPS = 9


class Pace:
    """Bounds prefill by time: a running stream never waits long for another's prompt, and a
    `Cancel` or `Pause` never waits long for a step.

    Learns from the steps themselves how long a step without prompts takes, and what each prompt
    token adds: both differ by 1,000 times between a laptop's CPU and a large GPU.
    """

    __slots__ = ("_granted", "_mixed", "_n_batch", "_seconds_per_token", "_steps")

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self._seconds_per_token: float | None = None
        self._steps: deque[float] = deque(maxlen=_N_STEPS)
        self._granted = 0
        self._mixed = False

    def limit(self, n_decoding: int, n_waiting: int = 1) -> int:
        """The most prompt tokens for the next step, beside `n_decoding` running streams.

        `n_waiting` requests wait for their first token: where they are more than those that run,
        the step may be as many times longer, up to the bound.
        """
        if self._seconds_per_token is None:
            return min(_FIRST, self._n_batch)
        if not n_decoding:
            affordable = int(_ALONE_S / self._seconds_per_token)
            return max(min(affordable, self._n_batch), min(_FEWEST, self._n_batch))
        affordable = int(self._seconds_beside(n_waiting / n_decoding) / self._seconds_per_token)
        if self._mixed:
            affordable = min(affordable, int(_GROWTH * self._granted) + 1)
        self._granted = max(min(affordable, self._n_batch), min(_FEWEST_BESIDE, self._n_batch))
        return self._granted

    def observe(self, n_prefilled: int, n_tokens: int, seconds: float) -> None:
        """Learn from a step of `n_tokens`, of which `n_prefilled` were prompt tokens.

        Steps with few prompt tokens say little about prefill and are left out.
        """
        n_others = n_tokens - n_prefilled
        if not n_prefilled:
            self._steps.append(seconds)
            self._mixed = False
            return
        self._mixed = n_others > 0
        if n_prefilled < (_FEWEST_BESIDE if n_others and self._steps else _FEWEST):
            return
        measured = seconds / n_tokens
        if n_others and self._steps:
            # Weights that are read anyway make a short chunk cheap: never less than half the mean.
            measured = max((seconds - median(self._steps)) / n_prefilled, measured / 2)
        measured = max(measured, 1e-9)
        known = self._seconds_per_token
        self._seconds_per_token = (
            measured if known is None else known + _SMOOTHING * (measured - known)
        )

    def _seconds_beside(self, n_waiting_each: float) -> float:
        if not self._steps:
            return _BESIDE_STREAMS_S
        step = median(self._steps)
        return min(_STRETCH * step * max(1.0, n_waiting_each), max(_BESIDE_STREAMS_S, step))
