"""Bench results as a table for a terminal or a Markdown page, and as an SVG plot. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from kvserve import svg
from kvserve.bench.load import Result

Series = Mapping[str, Sequence[Result]]
"""The results of each server, by number of streams."""

Measured = TypeVar("Measured")

OURS = "kvserve"
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 56
_COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8d6a9f", "#b8860b")
_DASHES = ("", ' stroke-dasharray="6 4"')


def rivals(series: Mapping[str, Sequence[Measured]]) -> list[Measured]:
    """What was measured of all servers but kvserve."""
    return [one for name, results in series.items() if name != OURS for one in results]


def table(series: Series) -> str:
    """One row for each server and load; the last column is kvserve's throughput against the best
    of the others at the same load."""
    lines = [
        "| server | streams | tokens/s | one stream | TTFT p50 / p99, s | gap p50 / p99, ms "
        "| cached | failed | kvserve / best other |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in series.items():
        for result in results:
            cached = result.n_cached_tokens / max(1, result.n_prompt_tokens)
            lines.append(
                f"| {name} | {result.load.streams} | {result.tokens_per_second:.0f} "
                f"| {result.stream_tps:.0f} | {result.ttft_p50:.3f} / {result.ttft_p99:.3f} "
                f"| {1e3 * result.gap_p50:.1f} / {1e3 * result.gap_p99:.1f} | {cached:.0%} "
                f"| {result.n_failed} | {_ratio(series, name, result)} |"
            )
    return "\n".join(lines)


def _ratio(series: Series, name: str, result: Result) -> str:
    if name != OURS:
        return ""
    best = [one.tokens_per_second for one in rivals(series) if one.load == result.load]
    return f"{result.tokens_per_second / max(best):.2f}" if best else ""


def plot(series: Series) -> str:
    """Throughput over streams as SVG: one line for each server, from zero."""
    streams = sorted({r.load.streams for results in series.values() for r in results})
    top = max(r.tokens_per_second for results in series.values() for r in results)
    tick = _tick(top)
    n_ticks = max(1, math.ceil(top / tick))
    highest = n_ticks * tick
    left, right, bottom, ceiling = _MARGIN, _WIDTH - 24, _HEIGHT - _MARGIN, 24
    parts = [
        svg.rect(0, 0, _WIDTH, _HEIGHT, "white"),
        svg.text((left + right) / 2, _HEIGHT - 8, "streams", "middle"),
    ]

    def x(count: int) -> float:
        return left + (right - left) * streams.index(count) / max(1, len(streams) - 1)

    def y(tps: float) -> float:
        return bottom - (bottom - ceiling) * tps / highest

    for count in streams:
        parts.append(svg.text(x(count), bottom + 18, str(count), "middle"))
    for number in range(n_ticks + 1):
        level = y(number * tick)
        parts.append(svg.line(left, level, right, level))
        parts.append(svg.text(left - 6, level + 4, f"{number * tick:g}", "end"))
    parts.append(svg.text(left + 12, ceiling + 16, "tokens/s"))
    for place, (name, results) in enumerate(series.items()):
        colour, line = _COLOURS[place % len(_COLOURS)], ceiling + 36 + 18 * place
        points = [(x(r.load.streams), y(r.tokens_per_second)) for r in results]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        style = f'stroke="{colour}" stroke-width="2"{_DASHES[place // len(_COLOURS) % 2]}'
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points
        ]
        parts.append(f'<path d="M{left + 12} {line}h24" {style}/>')
        parts.append(svg.text(left + 42, line + 4, name))
    return svg.document(_WIDTH, _HEIGHT, "tokens/s by number of streams", parts)


def _tick(top: float) -> float:
    """A round number that is four to eight times in `top`."""
    rough = max(top, 1e-6) / 4
    unit: float = 10.0 ** math.floor(math.log10(rough))
    return max((unit * n for n in (1, 2, 2.5, 5) if unit * n <= rough), default=unit)
