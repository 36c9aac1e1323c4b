"""The first decodes of a context, before anyone waits for an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from kvserve.worker.llama.batch import Batch

if TYPE_CHECKING:
    from kvserve.worker.llama.context import Context

_CPU_TOKENS = 8
"""One token would miss the AMX kernels."""
_MOST_VECTORS = 8
"""llama.cpp multiplies up to so many rows by kernels that are compiled for each number, and more by
others (MMVQ_MAX_BATCH_SIZE in ggml-cuda/mmvq.cuh)."""
_N_CAPTURE, _N_TIMED = 2, 3
"""The second batch of a size is captured as a CUDA graph; those after it are what counts."""
_WORTH = 0.98


def warm_up(context: Context) -> dict[int, int]:
    """Decode a few tokens: a CPU build that does not suit the machine dies here. Returns the
    numbers of rows that take more time than a larger one, and that. Raises CacheFull or
    DecodeError.

    On a GPU a whole batch goes first: what CUDA allocates for it beside llama.cpp's buffers is
    then there when the daemon measures (99 MiB for a model with 8 of 128 experts in use). Then come
    as many rows as a step without prompts may have, up to 8: CUDA loads a kernel when it is first
    used, which takes up to 18 ms for each number of rows.
    """
    on_gpu, n_batch, n_ctx = context.model.on_gpu, context.n_batch, context.n_ctx
    n_most = min(_MOST_VECTORS + 1, n_batch, n_ctx - 1)
    n_rows = 1
    if on_gpu and context.cannot_take_back is None:
        n_rows = max(min(context.n_outputs, _MOST_VECTORS, n_most), 1)
    pads = (
        context.model.wholly_on_gpu
        and context.model.n_window is None
        and n_rows == _MOST_VECTORS <= context.n_seq_max
        and n_most > _MOST_VECTORS
    )
    n_first = n_batch if on_gpu else min(n_batch, _CPU_TOKENS)
    decodes = _Decodes(context, max(min(n_first, n_ctx - (n_most if pads else n_rows)), 1))
    for n in range(1, n_rows + 1):
        decodes.seconds(n)
    context.logits(1)
    slower: dict[int, int] = {}
    if pads:
        best = decodes.settled_seconds(n_most)
        while n_rows > 1 and best < decodes.settled_seconds(n_rows) * _WORTH:
            slower[n_rows] = n_most
            n_rows -= 1
    context.clear()
    return slower


class _Decodes:
    """Rows behind the first `n` tokens of a sequence."""

    def __init__(self, context: Context, n: int) -> None:
        self._context, self._n = context, n
        self._tokens = np.arange(max(n, _MOST_VECTORS + 1), dtype=np.int32)
        self._tokens %= context.vocab.n_tokens
        self._batch = Batch(max(n, _MOST_VECTORS + 1))
        self._batch.add(self._tokens[:n], 0, 0, last=True)
        context.decode(self._batch)

    def seconds(self, n_rows: int) -> float:
        """What so many rows take."""
        if n_rows > 1:
            self._context.cut_slot(0, self._n)
        self._batch.clear()
        n_wanted = min(n_rows, self._context.n_outputs)
        self._batch.add(self._tokens[:n_wanted], self._n, 0, scored=True)
        if n_wanted < n_rows:
            self._batch.add(self._tokens[n_wanted:n_rows], self._n + n_wanted, 0)
        began = time.perf_counter()
        self._context.decode(self._batch)
        return time.perf_counter() - began

    def settled_seconds(self, n_rows: int) -> float:
        """What they take again and again."""
        for _ in range(_N_CAPTURE):
            self.seconds(n_rows)
        return min(self.seconds(n_rows) for _ in range(_N_TIMED))
