"""llama.cpp's sampler chains, over arrays of tokens and logits rather than over a context."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve.worker import llama

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_XTC_STREAM = 0x9E3779B9
"""Parts the generators of XTC and of the draw, which would give the same numbers from one seed."""


class _Choice(ctypes.Structure):
    """`llama_token_data_array` (include/llama.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class _ChainParams(ctypes.Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = (("no_perf", ctypes.c_bool),)


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)((f"llama_sampler_{name}", llama.library()))


_float, _uint, _size, _pointer = ctypes.c_float, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p
_apply = _function("apply", None, _pointer, ctypes.POINTER(_Choice))
_free = _function("free", None, _pointer)
_chain = _function("chain_init", _pointer, _ChainParams)
_add = _function("chain_add", None, _pointer, _pointer)
_top_k = _function("init_top_k", _pointer, ctypes.c_int32)
_typical = _function("init_typical", _pointer, _float, _size)
_top_p = _function("init_top_p", _pointer, _float, _size)
_min_p = _function("init_min_p", _pointer, _float, _size)
_xtc = _function("init_xtc", _pointer, _float, _float, _size, _uint)
_temp = _function("init_temp", _pointer, _float)
_dist = _function("init_dist", _pointer, _uint)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a chain does, in llama.cpp's order; values that switch a step off leave it out."""

    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    temperature: float = 1.0


class Chain:
    """`steps`, then a draw. `n_drawn` draws of the same seed came before.

    For one thread at a time; calls drop the GIL.
    """

    def __init__(self, steps: Steps, seed: int, n_drawn: int = 0) -> None:
        self._chain = _chain(_ChainParams(True))
        if steps.top_k > 0:
            _add(self._chain, _top_k(steps.top_k))
        if steps.typical_p < 1:
            _add(self._chain, _typical(steps.typical_p, 1))
        if steps.top_p < 1:
            _add(self._chain, _top_p(steps.top_p, 1))
        if steps.min_p > 0:
            _add(self._chain, _min_p(steps.min_p, 1))
        if steps.xtc_probability > 0:
            xtc = _xtc(steps.xtc_probability, steps.xtc_threshold, 1, seed ^ _XTC_STREAM)
            _skip(xtc, n_drawn, n_candidates=2)
            _add(self._chain, xtc)
        if steps.temperature != 1:
            _add(self._chain, _temp(steps.temperature))
        draw = _dist(seed)
        _skip(draw, n_drawn, n_candidates=1)
        _add(self._chain, draw)

    def draw(self, ids: NDArray[np.integer[Any]], logits: NDArray[np.float32]) -> int:
        """One of `ids`, not empty, by their `logits`."""
        tokens = np.empty(len(ids), dtype=_TOKEN)
        tokens["id"] = ids
        tokens["logit"] = logits
        choice = _Choice(tokens.ctypes.data, len(tokens), -1, False)
        _apply(self._chain, ctypes.byref(choice))
        # XTC takes tokens away from the front by moving the pointer.
        first = (choice.data - tokens.ctypes.data) // _TOKEN.itemsize
        return int(tokens["id"][first + choice.selected])

    def __del__(self) -> None:
        _free(self._chain)


def _skip(sampler: object, n_times: int, *, n_candidates: int) -> None:
    """Bring a fresh generator to where `n_times` steps leave it: `dist` takes one number for each,
    also where it has no choice, XTC one for each with two candidates (llama.cpp
    src/llama-sampler.cpp)."""
    tokens = np.zeros(n_candidates, dtype=_TOKEN)
    for _ in range(n_times):
        choice = _Choice(tokens.ctypes.data, n_candidates, -1, True)
        _apply(sampler, ctypes.byref(choice))
