"""An evaluation as text for a terminal. Pure: values in, lines out."""

from collections.abc import Sequence

from kvserve.core.loss import REFERENCE_PAIR, Quality, Speed, TaskResult, TextLoss
from kvserve.core.speed import ARTICLE_TPS

_MODES = ("prefill", "decode", "carried")


def quality_text(quality: Quality) -> str:
    """All tables that have rows, with a blank line between them."""
    tables = []
    if quality.losses:
        tables.append(_losses(quality.losses))
    if quality.tasks:
        tables.append(_tasks(quality.tasks))
    if quality.speeds:
        tables.append(_speeds(quality.speeds))
    return "\n\n".join(tables)


def loss_cells(row: TextLoss) -> tuple[str, ...]:
    """A row of `LOSS_COLUMNS`."""
    return (
        pair_name(row),
        row.mode,
        str(row.depth),
        str(row.n_positions),
        f"{row.mean_kld:.5f} ± {row.sem_kld:.5f}",
        f"{row.median_kld:.5f}",
        f"{row.p99_kld:.4f}",
        f"{row.p999_kld:.4f}",
        f"{row.same_top:.1%}",
        f"{row.mean_delta_p:+.2%} ({row.rms_delta_p:.2%})",
        f"{row.ppl_ratio:.4f} [{row.ppl_ratio_low:.4f}, {row.ppl_ratio_high:.4f}]",
    )


LOSS_COLUMNS = (
    "K:V",
    "mode",
    "ctx",
    "n",
    "mean KLD",
    "median",
    "p99",
    "p99.9",
    "same top",
    "Δp (rms)",
    "PPL ratio [95 %]",
)
TASK_COLUMNS = ("task", "K:V", "n", "f16 right", "right", "lost", "won", "p", "verdict")
SPEED_COLUMNS = ("K:V", "depth", "prefill tok/s", "decode tok/s", "decode, f16 = 1", "by bandwidth")


ARTICLE_NOTE = (
    "published estimate by bandwidth, Llama-3-8B Q4_K_M at 32K on 272 GB/s: "
    + ", ".join(f"{pair} {tps}" for pair, tps in ARTICLE_TPS.items())
    + " tokens/s, f16 = 1: "
    + ", ".join(f"{tps / ARTICLE_TPS['f16']:.2f}" for tps in ARTICLE_TPS.values())
)


def task_cells(row: TaskResult) -> tuple[str, ...]:
    """A row of `TASK_COLUMNS`."""
    if not row.measurable:
        verdict = "not measurable on this model"
    elif row.p_value < 0.05:
        verdict = "worse" if row.n_lost > row.n_won else "better"
    else:
        verdict = "no difference seen"
    return (
        row.task,
        str(row.pair),
        str(row.n),
        f"{row.n_reference / row.n:.0%}",
        f"{row.n_candidate / row.n:.0%}",
        str(row.n_lost),
        str(row.n_won),
        f"{row.p_value:.3f}" if row.measurable else "-",
        verdict,
    )


def speed_cells(row: Speed, speeds: Sequence[Speed]) -> tuple[str, ...]:
    """A row of `SPEED_COLUMNS`; `speeds` are all rows, with the reference's among them."""
    base = [s.decode_tps for s in speeds if s.pair == REFERENCE_PAIR and s.depth == row.depth]
    ratio = f"{row.decode_tps / base[0]:.2f}" if base else "?"
    return (
        str(row.pair),
        str(row.depth),
        f"{row.prefill_tps:.0f}",
        f"{row.decode_tps:.1f}",
        ratio,
        "?" if row.predicted_ratio is None else f"{row.predicted_ratio:.2f}",
    )


def pair_name(row: TextLoss) -> str:
    """The pair, told apart from the reference where it is the control."""
    return f"{row.pair} (control)" if row.pair == REFERENCE_PAIR else str(row.pair)


def ordered(losses: Sequence[TextLoss]) -> list[TextLoss]:
    """By depth and mode; in each the control first, then the best pair of the ladder."""
    return sorted(
        losses,
        key=lambda row: (
            row.depth,
            _MODES.index(row.mode) if row.mode in _MODES else len(_MODES),
            -row.pair.k.precision,
            -row.pair.v.precision,
        ),
    )


def _losses(losses: Sequence[TextLoss]) -> str:
    return aligned(LOSS_COLUMNS, [loss_cells(row) for row in ordered(losses)], n_left=2)


def _tasks(tasks: Sequence[TaskResult]) -> str:
    return aligned(TASK_COLUMNS, [task_cells(row) for row in tasks], n_left=2)


def ordered_speeds(speeds: Sequence[Speed]) -> list[Speed]:
    """By depth; in each the best pair of the ladder first."""
    return sorted(speeds, key=lambda s: (s.depth, -s.pair.k.precision, -s.pair.v.precision))


def _speeds(speeds: Sequence[Speed]) -> str:
    rows = [speed_cells(row, speeds) for row in ordered_speeds(speeds)]
    return f"{aligned(SPEED_COLUMNS, rows, n_left=1)}\n{ARTICLE_NOTE}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_left: int) -> str:
    """Columns as wide as they must be: the first `n_left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < n_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (header, *rows)
    ]
    return "\n".join(lines)
