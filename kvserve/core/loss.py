"""What KV types were measured to cost one model on one device, and how the choice reads it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from kvserve.core.dtypes import LADDER, CachePair

Row = TypeVar("Row")

REFERENCE_PAIR = LADDER[0]


@dataclass(frozen=True, slots=True)
class TextLoss:
    """A pair against the f16 reference on a text.

    `mode` is `prefill` (read in batches), `decode` (token by token) or `carried` (token by token
    on a cache transcoded from f16); `depth` is the context in tokens. KLD is in nats. `same_top`
    is the share of positions with the same likeliest token. Δp is the candidate's probability of
    the text's own token less the reference's. `ppl_ratio` is the candidate's perplexity over the
    reference's, with the bounds of its 95 % interval.
    """

    pair: CachePair
    mode: str
    depth: int
    n_positions: int
    mean_kld: float
    sem_kld: float
    median_kld: float
    p99_kld: float
    p999_kld: float
    same_top: float
    mean_delta_p: float
    rms_delta_p: float
    ppl_reference: float
    ppl_ratio: float
    ppl_ratio_low: float
    ppl_ratio_high: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A pair against the reference on `n` items of a task, each answered by both.

    `n_lost` items only the reference got right, `n_won` only the candidate; `p_value` is the exact
    McNemar test of these. Where the reference is no better than `chance` the task is not
    `measurable` on this model, and the rest says nothing.
    """

    task: str
    pair: CachePair
    n: int
    n_reference: int
    n_candidate: int
    n_lost: int
    n_won: int
    p_value: float
    chance: float
    measurable: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s of one stream with `depth` tokens in the cache. `predicted_ratio` is the decode
    speed over f16's that memory bandwidth alone would give (`speed.bandwidth_ratio`)."""

    pair: CachePair
    depth: int
    prefill_tps: float
    decode_tps: float
    predicted_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """What counts in the choice: the worse of prefill and decode at the depth that counts."""

    mean_kld: float
    same_top: float


@dataclass(frozen=True, slots=True)
class ExpectedLoss:
    """What a candidate is thought to lose: measured on this model, or a prior."""

    mean_kld: float
    same_top: float | None
    measured: bool


@dataclass(frozen=True, slots=True)
class Quality:
    """All that was measured of one model, build and device."""

    losses: tuple[TextLoss, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    speeds: tuple[Speed, ...] = ()

    def loss(self, pair: CachePair, n_ctx: int) -> Loss | None:
        """The loss of `pair` in a context of `n_ctx`; None where it was not measured.

        The deepest measurement within `n_ctx` counts, or the least deep one where all are deeper.
        The reference loses nothing by definition, once anything was measured.
        """
        if pair == REFERENCE_PAIR and self.losses:
            return Loss(0.0, 1.0)
        rows = self._rows(pair, n_ctx)
        if not rows:
            return None
        return Loss(max(r.mean_kld for r in rows), min(r.same_top for r in rows))

    def noise(self, n_ctx: int) -> float:
        """The KLD that rounding alone makes: the control's, f16 against f16 in other
        micro-batches; 0 where it was not measured."""
        return max((row.mean_kld for row in self._rows(REFERENCE_PAIR, n_ctx)), default=0.0)

    def excess(self, pair: CachePair, n_ctx: int) -> float | None:
        """The KLD above the noise, at least 0; None where the pair was not measured."""
        loss = self.loss(pair, n_ctx)
        return None if loss is None else max(0.0, loss.mean_kld - self.noise(n_ctx))

    def decode_tps(self, pair: CachePair, n_ctx: int) -> float | None:
        """Measured decode speed at the depth that counts for `n_ctx`; None where unknown."""
        rows = [speed for speed in self.speeds if speed.pair == pair]
        depth = _counting({row.depth for row in rows}, n_ctx)
        return next((row.decode_tps for row in rows if row.depth == depth), None)

    def joined(self, other: "Quality") -> "Quality":
        """Both; where they measured the same thing, the other's row replaces this one's."""
        return Quality(
            _joined(self.losses, other.losses, lambda row: (row.pair, row.mode, row.depth)),
            _joined(self.tasks, other.tasks, lambda row: (row.pair, row.task)),
            _joined(self.speeds, other.speeds, lambda row: (row.pair, row.depth)),
        )

    def _rows(self, pair: CachePair, n_ctx: int) -> list[TextLoss]:
        rows = [row for row in self.losses if row.pair == pair and row.mode != "carried"]
        depth = _counting({row.depth for row in rows}, n_ctx)
        return [row for row in rows if row.depth == depth]


NOTHING_MEASURED = Quality()


def _counting(depths: set[int], n_ctx: int) -> int | None:
    within = [depth for depth in depths if depth <= n_ctx]
    return max(within) if within else min(depths, default=None)


def _joined(
    old: Iterable[Row], new: Iterable[Row], key: Callable[[Row], object]
) -> tuple[Row, ...]:
    rows = {key(row): row for row in old}
    rows.update({key(row): row for row in new})
    return tuple(rows.values())
