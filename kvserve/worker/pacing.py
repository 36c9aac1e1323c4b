"""Measures prefill and decode speed of each pair at several depths."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Batch, Context, LoadError  # isort: skip

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from kvserve.ipc.evaluating import N_WARM_UP, EvalAnswer, Finished, Pacing, Skipped, Timed
from kvserve.worker.contexts import Weights, read_tokens

Emit = Callable[[EvalAnswer], None]


class Timing:
    """A unit is one pair; its depths share one context, filled further and further, so that no
    token is read twice."""

    def __init__(self, weights: Weights, pacing: Pacing, pairs: tuple[str, ...]) -> None:
        self._weights = weights
        self._pacing = pacing
        self._pairs = pairs

    @property
    def costs(self) -> dict[str, int]:
        """Units in order, with their tokens."""
        each = self._pacing.n_prefill + 4 * self._pacing.n_decode
        depths = {pair: self._depths(pair) for pair in self._pairs}
        return {f"speed/{p}": max(d, default=0) + len(d) * each for p, d in depths.items()}

    def run(self, done: frozenset[str], emit: Emit) -> None:
        """Measure what is not done. A depth for which a pair has no room is skipped."""
        for pair in self._pairs:
            unit = f"speed/{pair}"
            if unit in done:
                continue
            depths = self._depths(pair)
            for depth in sorted(set(self._pacing.depths) - set(depths)):
                emit(Skipped(unit, f"depth {depth}", "there is no room for it on the device"))
            while depths and not self._time(pair, depths, emit):
                depths = depths[:-1]
            emit(Finished(unit))

    def _depths(self, pair: str) -> list[int]:
        """A pair's depths, rising."""
        deepest = self._pacing.deepest.get(pair, max(self._pacing.depths))
        return sorted(depth for depth in self._pacing.depths if depth <= deepest)

    def _time(self, pair: str, depths: list[int], emit: Emit) -> bool:
        """Measure all depths; False where llama.cpp gives no context for the deepest."""
        unit, n_ctx = f"speed/{pair}", depths[-1] + self._pacing.n_beside
        try:
            with self._weights.context(pair, n_ctx) as context:
                self._warm_up(context)
                for depth in depths:
                    prefill, decode = self._measure(context, depth)
                    emit(Timed(unit, pair, depth, prefill, decode))
        except LoadError as error:
            emit(Skipped(unit, f"depth {depths[-1]}", error.message))
            return False
        return True

    def _warm_up(self, context: Context) -> None:
        """One batch and one step: kernels are loaded, buffers made and threads started at first
        use, which is no part of either speed."""
        self._read(context, self._pacing.n_prefill, 0)
        self._read(context, 1, self._pacing.n_prefill)
        context.clear_slot(0)

    def _measure(self, context: Context, depth: int) -> tuple[float, float]:
        """Prefill and decode, tokens/s; a step's time is the median, which a moment of other work
        on the machine does not move. The cache is filled up to `depth` first, and for the decode
        cut back to it where the model's memory can be cut."""
        n_read = context.n_cached(0)
        if n_read > depth:
            n_read = self._cut(context, depth)
        self._read(context, depth - n_read, n_read)
        n_prefill, n_decode = self._pacing.n_prefill, self._pacing.n_decode
        begun = time.perf_counter()
        self._read(context, n_prefill, depth)
        prefill = n_prefill / (time.perf_counter() - begun)
        start = depth + n_prefill
        if not depth or context.reuse_rules.cuts_anywhere:
            start = self._cut(context, depth)
        batch, steps = Batch(1), []
        for step in range(N_WARM_UP + n_decode):
            begun = time.perf_counter()
            batch.clear()
            batch.add(self._tokens(1, step), start + step, 0, last=True)
            context.decode(batch)
            context.logits(1)
            steps.append(time.perf_counter() - begun)
        return prefill, 1 / median(steps[N_WARM_UP:])

    def _cut(self, context: Context, n_tokens: int) -> int:
        """Go back to the first `n_tokens`, or to none; returns those that are left."""
        if not context.reuse_rules.cuts_anywhere or not n_tokens:
            context.clear_slot(0)
            return 0
        context.cut_slot(0, n_tokens)
        return n_tokens

    def _read(self, context: Context, n_tokens: int, start: int) -> None:
        if n_tokens > 0:
            read_tokens(context, self._tokens(n_tokens, start), start)

    def _tokens(self, n_tokens: int, start: int) -> "np.typing.NDArray[np.int32]":
        n_vocab = self._weights.vocab.n_tokens
        return (np.arange(start, start + n_tokens, dtype=np.int64) * 7919 % n_vocab).astype(
            np.int32
        )
