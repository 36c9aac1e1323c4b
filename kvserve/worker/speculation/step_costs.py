"""What a decode step takes, by the tokens in its batch.

Steps get longer with the depth of the caches and with whatever else the machine does, those of all
widths alike. So each is measured against the level of the steps around it.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

_N_KEPT = 7
_EXPIRES = 50
"""A width counts no more when its last measurement is so many steps old for each one that there is:
a single step may have been held up by anything."""
_PLAIN_EXPIRES = 150
_GUESSED_SHARE = 0.1
"""Beyond the widest step that is known, each further token is guessed to take so much of one of its
tokens' time."""
_LEVEL_SMOOTHING = 0.2
_PLAIN_SMOOTHING = 0.02
"""What plain steps take changes first the level, and only slowly their relation to other widths."""


@dataclass(slots=True)
class _Width:
    """Steps of one width: when the last one was, and what they took, in units of the level."""

    seen: int = 0
    plain: float | None = None
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=_N_KEPT))

    @property
    def typical(self) -> float:
        return self.plain if self.plain is not None else median_low(self.samples)

    @property
    def expires(self) -> int:
        return _EXPIRES * (_N_KEPT if self.plain is not None else len(self.samples))


class StepCosts:
    """Of plain steps a slow mean, of those with drafted tokens the median of the latest (of an even
    number, the lower one)."""

    def __init__(self) -> None:
        self._n_steps = 0
        self._level_seconds = 0.0
        self._widths: dict[int, _Width] = {}

    def observe(self, width: int, seconds: float, *, plain: bool = True) -> None:
        """Note a step with `width` tokens and no prefill among them; a `plain` one has no drafted
        tokens."""
        self._n_steps += 1
        seconds = max(seconds, 1e-9)
        self._level_seconds = self._level_seconds or seconds
        known = self._widths.setdefault(width, _Width())
        known.seen = self._n_steps
        if not plain:
            known.samples.append(seconds / self._level_seconds)
            return
        if known.plain is None:
            known.plain = seconds / self._level_seconds
            return
        # One step that was held up moves the level only so far.
        level_seconds = min(seconds / known.plain, 2 * self._level_seconds)
        self._level_seconds += _LEVEL_SMOOTHING * (level_seconds - self._level_seconds)
        known.plain += _PLAIN_SMOOTHING * (seconds / self._level_seconds - known.plain)

    def lacks(self, width: int) -> bool:
        """Whether there was no plain step of this width for a while."""
        known = self._widths.get(width)
        stale = known is None or self._n_steps - known.seen > _PLAIN_EXPIRES
        return stale or known is None or known.plain is None

    def curve(self, first: int, last: int) -> list[float]:
        """Seconds for each width from `first` to `last`, never falling.

        Between measured widths they lie on a line. Beyond the widest a further token is guessed to
        be cheap, so that it is tried where enough speaks for it: a wide step is often no dearer
        than one half as wide.
        """
        points = self._points() or [(first, self._level_seconds or 1.0)]
        seconds = []
        index = 0
        for width in range(first, last + 1):
            while index < len(points) and points[index][0] < width:
                index += 1
            if index == len(points):
                w0, s0 = points[-1]
                seconds.append(s0 * (1 + _GUESSED_SHARE * (width - w0) / max(w0, 1)))
            elif index == 0 or points[index][0] == width:
                seconds.append(points[index][1])
            else:
                (w0, s0), (w1, s1) = points[index - 1], points[index]
                seconds.append(s0 + (s1 - s0) * (width - w0) / (w1 - w0))
        return seconds

    def _points(self) -> list[tuple[int, float]]:
        """The widths that are known, in order, with seconds that never fall."""
        points: list[tuple[int, float]] = []
        for width in sorted(self._widths):
            known = self._widths[width]
            if self._n_steps - known.seen <= known.expires:
                seconds = self._level_seconds * known.typical
                points.append((width, max(seconds, points[-1][1]) if points else seconds))
        return points
