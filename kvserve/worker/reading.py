"""Scores K-V pairs on a text, piece by piece, against one reference context."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Context, LoadError  # isort: skip

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from kvserve.core.dtypes import parse_pair
from kvserve.errors import UsageError
from kvserve.ipc.evaluating import (
    MOST_STATE_BYTES,
    REFERENCE,
    EvalAnswer,
    Finished,
    Reading,
    Scored,
    Skipped,
)
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.contexts import (
    Tokens,
    Weights,
    read_tokens,
    score_batched,
    score_single,
)
from kvserve.worker.divergences import Row, Tally, compare, log_probs

Emit = Callable[[EvalAnswer], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text in one context: read, read and scored, decoded and scored; `following`
    are the tokens that come after each scored one, in the text."""

    prefix: Tokens
    batched: Tokens
    single: Tokens
    following: Tokens

    @property
    def n_tokens(self) -> int:
        """Cells that it takes."""
        return len(self.prefix) + len(self.batched) + len(self.single)

    @property
    def decode_start(self) -> int:
        """The position of the first token that is decoded by itself."""
        return len(self.prefix) + len(self.batched)


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the reference says: log probabilities of both scored parts, and its cache between."""

    batched: list[Row]
    single: list[Row]
    state: ExportedState | None


class TextScores:
    """KLD and the like of each pair, at each depth, on each piece of a text.

    Raises UsageError where the text has fewer tokens than a depth needs.
    """

    def __init__(self, weights: Weights, reading: Reading, pairs: tuple[str, ...]) -> None:
        self._weights = weights
        self._reading = reading
        self._pairs = pairs
        self._tokens = weights.vocab.tokenize(reading.text, add_special=False, parse_special=False)
        self._pieces = {
            depth: [self._piece(depth, start) for start in self._starts(depth)]
            for depth in reading.depths
        }

    @property
    def costs(self) -> dict[str, int]:
        """Units in order, with their tokens; the reference's part is shared out."""
        share = 1 + 1 / len(self._pairs)
        return {
            _unit(depth, index, pair): int(piece.n_tokens * share)
            for depth, pieces in self._pieces.items()
            for index, piece in enumerate(pieces)
            for pair in self._pairs
        }

    def run(self, done: frozenset[str], emit: Emit) -> None:
        """Score what is not done. A pair that the context refuses is skipped with the reason."""
        for depth, pieces in self._pieces.items():
            with self._weights.context(REFERENCE, depth) as context:
                for index, piece in enumerate(pieces):
                    units = {_unit(depth, index, pair): pair for pair in self._pairs}
                    left = {unit: pair for unit, pair in units.items() if unit not in done}
                    if left:
                        self._score_piece(context, piece, depth, left, emit)

    def _score_piece(
        self, context: Context, piece: Piece, depth: int, units: dict[str, str], emit: Emit
    ) -> None:
        with self._refer(context, piece) as reference:
            for unit, pair in units.items():
                try:
                    with self._weights.context(pair, depth, control=pair == REFERENCE) as candidate:
                        for mode, tally in self._modes(candidate, piece, reference):
                            emit(_scored(unit, pair, mode, depth, tally))
                        if self._reading.carried and self._reading.n_decode:
                            self._carry(candidate, piece, reference, unit, pair, depth, emit)
                except LoadError as error:
                    emit(Skipped(unit, pair, error.message))
                emit(Finished(unit))

    @contextmanager
    def _refer(self, context: Context, piece: Piece) -> Iterator[_Reference]:
        context.clear_slot(0)
        read_tokens(context, piece.prefix, 0)
        batched = [log_probs(r) for r in score_batched(context, piece.batched, len(piece.prefix))]
        state = self._export(context, piece)
        try:
            rows = score_single(context, piece.single, piece.decode_start)
            yield _Reference(batched, [log_probs(row) for row in rows], state)
        finally:
            if state is not None:
                state.close()

    def _export(self, context: Context, piece: Piece) -> ExportedState | None:
        if not self._reading.carried or context.state_bytes(0) > MOST_STATE_BYTES:
            return None
        with suppress(CannotCarry, OSError):
            return export_sequence(context, 0, np.concatenate([piece.prefix, piece.batched]))
        return None

    def _modes(
        self, candidate: Context, piece: Piece, reference: _Reference
    ) -> Iterator[tuple[str, Tally]]:
        read_tokens(candidate, piece.prefix, 0)
        n = len(piece.batched)
        rows = score_batched(candidate, piece.batched, len(piece.prefix))
        yield "prefill", compare(reference.batched, rows, piece.following[:n])
        if len(piece.single):
            rows = score_single(candidate, piece.single, piece.decode_start)
            yield "decode", compare(reference.single, rows, piece.following[n:])

    def _carry(
        self,
        candidate: Context,
        piece: Piece,
        reference: _Reference,
        unit: str,
        pair: str,
        depth: int,
        emit: Emit,
    ) -> None:
        if reference.state is None:
            emit(Skipped(unit, "carried", "the reference's cache cannot be copied, or is too big"))
            return
        try:
            target = candidate.state_layout or forecast(reference.state.layout, parse_pair(pair))
            with transcode(reference.state, target, self._weights.n_threads) as carried:
                import_sequence(candidate, 0, carried)
        except (CannotCarry, OSError) as error:
            emit(Skipped(unit, "carried", str(error)))
            return
        rows = score_single(candidate, piece.single, piece.decode_start)
        following = piece.following[len(piece.batched) :]
        emit(_scored(unit, pair, "carried", depth, compare(reference.single, rows, following)))

    def _starts(self, depth: int) -> list[int]:
        """Where the pieces begin: spread over the text, each moved at random within its share."""
        n, room = self._reading.n_chunks, len(self._tokens) - depth
        if self._reading.in_order:
            n = min(n, len(self._tokens) // depth)
            return [index * depth for index in range(n) if (index + 1) * depth < len(self._tokens)]
        if room < 1:
            raise UsageError(
                f"the text has {len(self._tokens)} tokens, too few for a context of {depth}: "
                "give a longer --corpus or a smaller --ctx",
                param="corpus",
            )
        random = np.random.default_rng((self._reading.seed, depth))
        edges = np.linspace(0, room, n + 1)
        places = edges[:-1] + random.random(n) * np.diff(edges)
        return [int(place) for place in places]

    def _piece(self, depth: int, start: int) -> Piece:
        tokens = self._tokens[start : start + depth + 1].copy()
        if self._weights.vocab.adds_bos and self._weights.vocab.bos is not None:
            tokens[0] = self._weights.vocab.bos
        single = depth - self._reading.n_decode
        batched = single - self._reading.n_prefill
        return Piece(
            tokens[:batched], tokens[batched:single], tokens[single:depth], tokens[batched + 1 :]
        )


def _scored(unit: str, pair: str, mode: str, depth: int, tally: Tally) -> Scored:
    return Scored(
        unit,
        pair,
        mode,
        depth,
        tuple(tally.klds),
        tuple(tally.same_top),
        tuple(tally.reference),
        tuple(tally.candidate),
    )


def _unit(depth: int, index: int, pair: str) -> str:
    return f"text/{depth}/{index}/{pair}"
