"""What a decode step takes, by the tokens in its batch."""

from collections import deque
from statistics import median_low

_N_KEPT = 7
_EXPIRES = 50
"""A width counts no more when its last measurement is so many steps old for each one that there is:
the depth of the caches, and what else the machine does, change, and a single step may have been
held up by anything."""
_BASE_EXPIRES = 150
_GUESSED_SHARE = 0.1
"""Beyond the widest step that is known, each further token is guessed to take so much of one of its
tokens' time."""


class StepCosts:
    """Medians (of an even number, the lower one) of the latest steps of each width. Seconds."""

    def __init__(self) -> None:
        self._n_steps = 0
        self._samples: dict[int, deque[tuple[int, float]]] = {}

    def observe(self, width: int, seconds: float) -> None:
        """Note a step with `width` tokens and no prefill among them."""
        self._n_steps += 1
        samples = self._samples.setdefault(width, deque(maxlen=_N_KEPT))
        samples.append((self._n_steps, seconds))

    def lacks(self, width: int) -> bool:
        """Whether this width was not measured for a while."""
        samples = self._samples.get(width)
        return not samples or self._n_steps - samples[-1][0] > _BASE_EXPIRES

    def curve(self, first: int, last: int) -> list[float]:
        """Seconds for each width from `first` to `last`, never falling.

        Between measured widths they lie on a line. Beyond the widest a further token is guessed to
        be cheap, so that it is tried where enough speaks for it: a wide step is often no dearer
        than one half as wide.
        """
        points = self._points()
        if not points:
            points = [(first, 1.0)]
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
        for width in sorted(self._samples):
            samples = self._samples[width]
            if self._n_steps - samples[-1][0] <= _EXPIRES * len(samples):
                seconds = median_low([sample[1] for sample in samples])
                points.append((width, max(seconds, points[-1][1]) if points else seconds))
        return points
