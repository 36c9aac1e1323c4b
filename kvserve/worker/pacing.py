"""Measures prefill and decode speed of each pair at several depths."""

# llama_cpp before numpy, see kvserve/worker/llama.py
from kvserve.worker.llama import Batch, Context, LoadError  # isort: skip

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from kvserve.ipc.evaluating import EvalAnswer, Finished, Pacing, Skipped, Timed
from kvserve.worker.contexts import Weights, read_tokens

Emit = Callable[[EvalAnswer], None]
_WARM_UP_STEPS = 2


class Timing:
    """A unit is one pair; its depths share one context, filled further and further."""

    def __init__(self, weights: Weights, pacing: Pacing, pairs: tuple[str, ...]) -> None:
        self._weights = weights
        self._pacing = pacing
        self._pairs = pairs
        self._n_ctx = max(pacing.depths) + pacing.n_prefill + pacing.n_decode + _WARM_UP_STEPS

    @property
    def costs(self) -> dict[str, int]:
        """Units in order, with their tokens."""
        each = self._pacing.n_prefill + 4 * self._pacing.n_decode
        n = max(self._pacing.depths) + len(self._pacing.depths) * each
        return {f"speed/{pair}": n for pair in self._pairs}

    def run(self, done: frozenset[str], emit: Emit) -> None:
        """Measure what is not done. A pair that the context refuses is skipped with the reason."""
        for pair in self._pairs:
            unit = f"speed/{pair}"
            if unit in done:
                continue
            try:
                with self._weights.context(pair, self._n_ctx) as context:
                    for depth in sorted(self._pacing.depths):
                        prefill, decode = self._measure(context, depth)
                        emit(Timed(unit, pair, depth, prefill, decode))
            except LoadError as error:
                emit(Skipped(unit, pair, error.message))
            emit(Finished(unit))

    def _measure(self, context: Context, depth: int) -> tuple[float, float]:
        """Prefill and decode, tokens/s; a step's time is the median, which a moment of other work
        on the machine does not move. The cache is filled up to `depth` first."""
        n_read = context.n_cached(0)
        if n_read > depth:
            context.clear_slot(0)
            n_read = 0
        self._read(context, depth - n_read, n_read)
        n_prefill, n_decode = self._pacing.n_prefill, self._pacing.n_decode
        begun = time.perf_counter()
        self._read(context, n_prefill, depth)
        prefill = n_prefill / (time.perf_counter() - begun)
        batch, steps = Batch(1), []
        for step in range(_WARM_UP_STEPS + n_decode):
            begun = time.perf_counter()
            batch.clear()
            batch.add(self._tokens(1, step), depth + n_prefill + step, 0, last=True)
            context.decode(batch)
            context.logits(1)
            steps.append(time.perf_counter() - begun)
        return prefill, 1 / median(steps[_WARM_UP_STEPS:])

    def _read(self, context: Context, n_tokens: int, start: int) -> None:
        if n_tokens > 0:
            read_tokens(context, self._tokens(n_tokens, start), start)

    def _tokens(self, n_tokens: int, start: int) -> "np.typing.NDArray[np.int32]":
        n_vocab = self._weights.vocab.n_tokens
        return (np.arange(start, start + n_tokens, dtype=np.int64) * 7919 % n_vocab).astype(
            np.int32
        )
