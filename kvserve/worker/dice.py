"""Weighted draws by llama.cpp's `dist` sampler, over arrays rather than over a context."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve.worker import llama

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data` (include/llama.h)."""
_STREAM = 0x9E3779B9


class _Choice(ctypes.Structure):
    """`llama_token_data_array` (include/llama.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)((f"llama_sampler_{name}", llama.library()))


_apply = _function("apply", None, ctypes.c_void_p, ctypes.POINTER(_Choice))
_free = _function("free", None, ctypes.c_void_p)
_init = _function("init_dist", ctypes.c_void_p, ctypes.c_uint32)


class Dice:
    """A generator of random numbers with a seed of 32 bits, from which `n_drawn` draws were made
    before. Each `stream` of one seed is another generator.

    For one thread at a time; draws drop the GIL.
    """

    def __init__(self, seed: int, n_drawn: int = 0, stream: int = 0) -> None:
        self._dist = _init((seed ^ (stream * _STREAM)) & 0xFFFFFFFF)
        # It takes one number for each draw, also where there is no choice
        # (llama_sampler_dist_apply in llama.cpp's src/llama-sampler.cpp).
        for _ in range(n_drawn):
            self.draw(np.zeros(1, dtype=np.float32))

    def draw(self, logits: NDArray[np.float32]) -> int:
        """An index into `logits`, not empty, as often as their softmax says.

        It is found along the sum of probabilities in the order given: where the order does not
        hang on the values, a value that is rounded otherwise moves a border a little, and hardly
        ever changes a draw.
        """
        tokens = np.empty(len(logits), dtype=_TOKEN)
        tokens["logit"] = logits
        choice = _Choice(tokens.ctypes.data, len(tokens), -1, False)
        _apply(self._dist, ctypes.byref(choice))
        return int(choice.selected)

    def happens(self, probability: float) -> bool:
        """Whether something with this probability, above 0, comes true."""
        logits = np.log(np.array([probability, max(1 - probability, 1e-30)], dtype=np.float32))
        return self.draw(logits) == 0

    def __del__(self) -> None:
        _free(self._dist)
