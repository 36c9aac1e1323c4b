"""Two plots as SVG: KLD by pair, and KLD against memory. Pure."""

import math
from collections.abc import Mapping, Sequence

from kvserve import svg
from kvserve.core.dtypes import CachePair
from kvserve.units import format_bytes

_COLOURS = {"prefill": "#3d5a80", "decode": "#c8553d", "carried": "#0b6e4f"}
_WIDTH = 760
_LABEL_WIDTH, _VALUE_WIDTH = 130, 70
_BAR, _GAP = 13, 12
_LEAST = 1e-5
"""KLD that the logarithmic axes begin at; less is drawn there."""

Bars = Sequence[tuple[str, Mapping[str, tuple[float, float]]]]


def bars(rows: Bars, depth: int) -> str:
    """Mean KLD of each pair by mode, on a logarithmic axis, with its standard error."""
    modes = [mode for mode in _COLOURS if any(mode in by_mode for _, by_mode in rows)]
    group = len(modes) * _BAR + _GAP
    height = 58 + len(rows) * group
    axis = _Axis([kld for _, by_mode in rows for kld, _ in by_mode.values()])
    room = _WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    parts = [svg.text(0, 14, f"Mean KLD at {depth} tokens (logarithmic)", bold=True)]
    x = _LABEL_WIDTH
    for mode in modes:
        parts += [svg.rect(x, 24, 10, 10, _COLOURS[mode]), svg.text(x + 14, 33, mode)]
        x += 90
    for tick in axis.ticks:
        at = _LABEL_WIDTH + axis.place(tick) * room
        parts += [
            svg.line(at, 42, at, height - 14),
            svg.text(at, height - 2, f"{tick:g}", "middle"),
        ]
    for index, (name, by_mode) in enumerate(rows):
        top = 46 + index * group
        parts.append(svg.text(_LABEL_WIDTH - 8, top + group / 2 - 2, name, "end"))
        for number, mode in enumerate(m for m in modes if m in by_mode):
            kld, error = by_mode[mode]
            y = top + number * _BAR
            length = max(1.0, axis.place(kld) * room)
            low, high = (axis.place(kld + sign * error) * room for sign in (-1, 1))
            middle = y + _BAR / 2 - 1
            parts += [
                svg.rect(_LABEL_WIDTH, y, length, _BAR - 2, _COLOURS[mode]),
                svg.line(_LABEL_WIDTH + low, middle, _LABEL_WIDTH + high, middle, "#1c2733"),
                svg.text(_LABEL_WIDTH + max(length, high) + 5, y + _BAR - 3, f"{kld:.4f}"),
            ]
    return svg.document(_WIDTH, height, f"Mean KLD by pair at {depth} tokens", parts)


def pareto(points: Mapping[CachePair, tuple[int, float]]) -> str:
    """KLD (logarithmic) over the cache's bytes; the front is what no other pair beats in both."""
    height, left, bottom = 360, 90, 310
    axis = _Axis([kld for _, kld in points.values()])
    most = max(n_bytes for n_bytes, _ in points.values()) * 1.12
    front = pareto_front(points)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        return (
            left + point[0] / most * (_WIDTH - left - 20),
            bottom - axis.place(point[1]) * (bottom - 30),
        )

    parts = [svg.text(0, 14, "Mean KLD (logarithmic) by size of the cache", bold=True)]
    for tick in axis.ticks:
        y = place((0, tick))[1]
        parts += [svg.line(left, y, _WIDTH - 20, y), svg.text(left - 8, y + 4, f"{tick:g}", "end")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        n_bytes = round(most / 1.12 * share)
        x = place((n_bytes, 1.0))[0]
        parts.append(svg.text(x, bottom + 20, format_bytes(n_bytes), "middle"))
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(points[pair]) for pair in front))
    parts.append(f'<polyline points="{corners}" fill="none" stroke="#0b6e4f" stroke-width="2"/>')
    for pair, point in points.items():
        x, y = place(point)
        colour = "#0b6e4f" if pair in front else "#c8553d"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(svg.text(x + 8, y - 8, str(pair)))
    return svg.document(_WIDTH, height, "Mean KLD against the cache's size", parts)


def pareto_front(points: Mapping[CachePair, tuple[int, float]]) -> list[CachePair]:
    """The pairs that no other is both as small and as good as, from the smallest on."""
    front: list[CachePair] = []
    least = math.inf
    for pair in sorted(points, key=lambda pair: points[pair]):
        if points[pair][1] < least:
            front.append(pair)
            least = points[pair][1]
    return front


class _Axis:
    """A logarithmic axis from a power of ten below the values to one above."""

    def __init__(self, values: Sequence[float]) -> None:
        shown = [max(value, _LEAST) for value in values]
        self._low = math.floor(math.log10(min(shown)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(shown))))

    @property
    def ticks(self) -> list[float]:
        """Powers of ten."""
        return [10.0**power for power in range(self._low, self._high + 1)]

    def place(self, value: float) -> float:
        """From 0 to 1 along the axis."""
        share = (math.log10(max(value, _LEAST)) - self._low) / (self._high - self._low)
        return min(1.0, max(0.0, share))
