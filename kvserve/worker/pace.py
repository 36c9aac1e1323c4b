"""How many prompt tokens a step may take on, so that a step stays short."""

from collections import deque
from statistics import median_low

_ALONE_S = 1.0
_STRETCH = 1.6
"""Beside streams, one waiting prompt may take so many times as long as the streams' own step: with
it the gap between two of their tokens stays below three times what it is without a prompt, where
nothing else holds a step up."""
_LEAST_BOUND_S, _MOST_BOUND_S = 0.05, 0.15
_BOUND_STEPS = 4
"""Where several wait, their prompts may take so many of the streams' steps, within those bounds."""
_FEWEST = 32
_FEWEST_BESIDE = 8
_FIRST = 128
_SMOOTHING = 0.3
_GROWTH = 2.0
"""Beside streams, the limit of one step is at most so many times that of the step before."""
_STEADY, _HEADROOM = 1.2, 1.1
"""The limit stays where it is while up to so many times as much could be afforded: llama.cpp keeps
its graph, and CUDA the captured one, while batches are of the same size."""
_ROWS = 4
"""llama.cpp multiplies so many rows at a time with weights that it repacked for a CPU, and the rest
one by one: 8 streams and 12 prompt tokens take less time than 8 and 11."""
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
        self._steps = _StreamSteps()
        self._granted = 0
        self._mixed = False

    def limit(self, n_decoding: int, n_waiting: int = 1) -> int:
        """The most prompt tokens for the next step, beside `n_decoding` running streams.

        `n_waiting` requests wait for their first token: each may have its time, up to the bound.
        """
        if self._seconds_per_token is None:
            return min(_FIRST, self._n_batch)
        if not n_decoding:
            return self._whole(0, max(int(_ALONE_S / self._seconds_per_token), _FEWEST))
        affordable = int(self._seconds_beside(n_decoding, n_waiting) / self._seconds_per_token)
        if self._mixed:
            if self._granted <= affordable < _STEADY * self._granted:
                return self._whole(n_decoding, self._granted)
            affordable = min(int(affordable / _HEADROOM), int(_GROWTH * self._granted) + 1)
        self._granted = min(max(affordable, _FEWEST_BESIDE), self._n_batch)
        return self._whole(n_decoding, self._granted)

    def _whole(self, n_decoding: int, n_prefill: int) -> int:
        """So many prompt tokens or a few more: no row of a batch without drafts is left over."""
        return min(n_prefill + -(n_decoding + n_prefill) % _ROWS, self._n_batch)

    def observe(self, n_prefilled: int, n_tokens: int, seconds: float) -> None:
        """Learn from a step of `n_tokens`, of which `n_prefilled` were prompt tokens.

        Steps with few prompt tokens say little about prefill and are left out.
        """
        n_others = n_tokens - n_prefilled
        if not n_prefilled:
            self._steps.observe(n_others, seconds)
            self._mixed = False
            return
        self._mixed = n_others > 0
        others_s = self._steps.estimate(n_others, self._seconds_per_token) if n_others else None
        if n_prefilled < (_FEWEST_BESIDE if others_s is not None else _FEWEST):
            return
        measured = seconds / n_tokens
        if others_s is not None:
            # Weights that are read anyway make a short chunk cheap: never less than half the mean.
            measured = max((seconds - others_s) / n_prefilled, measured / 2)
        measured = max(measured, 1e-9)
        known = self._seconds_per_token
        self._seconds_per_token = (
            measured if known is None else known + _SMOOTHING * (measured - known)
        )

    def _seconds_beside(self, n_decoding: int, n_waiting: int) -> float:
        step = self._steps.estimate(n_decoding, self._seconds_per_token)
        if step is None:
            return _MOST_BOUND_S
        bound = min(max(_BOUND_STEPS * step, _LEAST_BOUND_S), _MOST_BOUND_S)
        return min(_STRETCH * step * max(n_waiting, 1), max(bound, step))


class _StreamSteps:
    """What a step of so many streams takes, without prompts."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def observe(self, n: int, seconds: float) -> None:
        """Note a step. A single one that something held up will not count."""
        self._seen.setdefault(n, deque(maxlen=_N_STEPS)).append(seconds)

    def estimate(self, n: int, seconds_per_token: float | None) -> float | None:
        """Seconds for `n` streams: on the line between known numbers, above them by what a token
        takes, and never less than fewer streams take. None where nothing is known."""
        below = max((m for m in self._seen if m <= n), default=None)
        above = min((m for m in self._seen if m > n), default=None)
        if below is None:
            return None if above is None else median_low(self._seen[above])
        base = median_low(self._seen[below])
        if above is not None:
            share = (n - below) / (above - below)
            return max(base, base + share * (median_low(self._seen[above]) - base))
        return base + (n - below) * (seconds_per_token or 0.0)
