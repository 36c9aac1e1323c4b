"""Bench results as a table for a terminal or a Markdown page, and as an SVG plot. Pure."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from kvserve.bench.load import Result

Series = Mapping[str, Sequence[Result]]
"""The results of each server, by number of streams."""

Measured = TypeVar("Measured")

OURS = "kvserve"
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_COLOURS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8d6a9f", "#b8860b")


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
    """Throughput over streams as SVG: one line for each server, both axes from zero."""
    streams = sorted({r.load.streams for results in series.values() for r in results})
    top = max(r.tokens_per_second for results in series.values() for r in results)
    step = (_WIDTH - 2 * _MARGIN) / max(1, len(streams) - 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_MARGIN}" y="20">tokens/s by number of streams</text>',
    ]
    bottom = _HEIGHT - _MARGIN

    def x(count: int) -> float:
        return _MARGIN + step * streams.index(count)

    def y(tps: float) -> float:
        return bottom - (bottom - 40) * tps / top

    for count in streams:
        parts.append(f'<text x="{x(count):.0f}" y="{bottom + 18}">{count}</text>')
    for share in (0, 0.5, 1):
        level = y(share * top)
        parts.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{level:.0f}" y2="{level:.0f}" '
            'stroke="#ddd"/>'
        )
        parts.append(f'<text x="4" y="{level + 4:.0f}">{share * top:.0f}</text>')
    for colour, (name, results) in zip(_COLOURS, series.items(), strict=False):
        points = " ".join(f"{x(r.load.streams):.1f},{y(r.tokens_per_second):.1f}" for r in results)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        last = results[-1]
        parts.append(
            f'<text x="{x(last.load.streams) - 90:.0f}" y="{y(last.tokens_per_second) - 6:.0f}" '
            f'fill="{colour}">{name}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts)
