"""An evaluation as one HTML page that needs nothing else: tables, and plots as SVG. Pure."""

from collections.abc import Mapping, Sequence
from html import escape

from kvserve.core.dtypes import CachePair
from kvserve.core.loss import REFERENCE_PAIR, Quality
from kvserve.eval.plots import bars, pareto
from kvserve.eval.tables import (
    LOSS_COLUMNS,
    SPEED_COLUMNS,
    TASK_COLUMNS,
    loss_cells,
    ordered,
    ordered_speeds,
    speed_cells,
    task_cells,
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #dfe4ea;
  white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.bad td { background: #fdecea; } tr.void td { color: #7b8794; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; margin: 0; }
dt { color: #52606d; } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; margin: .5rem 0; }
p.note { color: #52606d; max-width: 46rem; }
"""


def report(
    quality: Quality, about: Mapping[str, str], kv_bytes: Mapping[CachePair, int], n_ctx: int
) -> str:
    """The page. `about` heads it; `kv_bytes` are the cache's bytes of each pair at `n_ctx` tokens,
    for the plot of loss against memory."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>KV-cache quality: {escape(about.get('model', ''))}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>KV-cache quality: {escape(about.get('model', ''))}</h1>",
        _about(about),
    ]
    if quality.losses:
        parts += _text_part(quality, kv_bytes, n_ctx)
    if quality.tasks:
        parts += _task_part(quality)
    if quality.speeds:
        rows = [speed_cells(row, quality.speeds) for row in ordered_speeds(quality.speeds)]
        parts += ["<h2>Speed</h2>", _table(SPEED_COLUMNS, rows)]
    return "\n".join([*parts, "</body></html>", ""])


def _text_part(quality: Quality, kv_bytes: Mapping[CachePair, int], n_ctx: int) -> list[str]:
    noise = quality.noise(n_ctx)
    points = {
        pair: (kv_bytes[pair], noise if pair == REFERENCE_PAIR else loss.mean_kld)
        for pair in dict.fromkeys(row.pair for row in quality.losses)
        if pair in kv_bytes and (loss := quality.loss(pair, n_ctx)) is not None
    }
    parts = [
        "<h2>Loss by pair</h2>",
        '<p class="note">KLD in nats from f16 to each pair. The control is f16 against f16 in '
        "smaller micro-batches: what is not above it is rounding.</p>",
        *(bars(rows, depth) for depth, rows in _by_depth(quality).items()),
        '<div class="scroll">',
        _table(LOSS_COLUMNS, [loss_cells(row) for row in ordered(quality.losses)]),
        "</div>",
    ]
    if points:
        parts += [
            "<h2>Loss against memory</h2>",
            f'<p class="note">The cache of {n_ctx} tokens. Pairs on the line lose less than every '
            "smaller one.</p>",
            pareto(points),
        ]
    return parts


def _by_depth(quality: Quality) -> dict[int, list[tuple[str, dict[str, tuple[float, float]]]]]:
    """For each depth, each pair's mean KLD and its standard error by mode."""
    found: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}
    for row in ordered(quality.losses):
        name = "f16 (control)" if row.pair == REFERENCE_PAIR else str(row.pair)
        by_mode = found.setdefault(row.depth, {}).setdefault(name, {})
        by_mode[row.mode] = row.mean_kld, row.sem_kld
    return {depth: list(pairs.items()) for depth, pairs in found.items()}


def _task_part(quality: Quality) -> list[str]:
    marks = []
    for row in quality.tasks:
        worse = row.measurable and row.p_value < 0.05 and row.n_lost > row.n_won
        marks.append("" if row.measurable and not worse else "bad" if worse else "void")
    return [
        "<h2>Tasks</h2>",
        '<p class="note">Each item is answered by f16 and by the pair; <em>lost</em> are those '
        "that only f16 got right. p is the exact McNemar test.</p>",
        '<div class="scroll">',
        _table(TASK_COLUMNS, [task_cells(row) for row in quality.tasks], marks),
        "</div>",
    ]


def _about(about: Mapping[str, str]) -> str:
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items()]
    return f"<dl>{''.join(rows)}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for index, row in enumerate(rows):
        mark = f' class="{marks[index]}"' if index < len(marks) and marks[index] else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
