"""Draws in machine code, where `draws.c` could be compiled when kvserve was installed.

Eight rows of 128,256 logits take it 0.5 ms in one thread and 0.3 in eight, where NumPy takes 1.0
(docs/performance.md), and its threads are awake sooner than Python's. Without it `together` draws
the same tokens with NumPy.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SOURCE = Path(__file__).with_name("draws.c")
_KINDS = (np.int64, np.int64, np.float64, np.float64, np.float64)


def load(source: Path) -> Any:
    """The function of the library beside `source`. Raises OSError where there is none that was
    made of it for this machine."""
    library = ctypes.CDLL(str(source.with_suffix(".so")))
    try:
        made_of = ctypes.string_at(
            ctypes.addressof(ctypes.c_char.in_dll(library, "kvserve_source"))
        )
        function = library.kvserve_draw
    except (AttributeError, ValueError) as error:
        raise OSError(f"{source.with_suffix('.so')} is something else: {error}") from error
    if made_of.decode() != hashlib.sha256(source.read_bytes()).hexdigest():
        raise OSError(f"{source.with_suffix('.so')} was made of another {source.name}")
    array = ctypes.c_void_p
    sizes, settings = [ctypes.c_int64] * 2, [array] * 6
    function.argtypes = [array, *sizes, *settings, ctypes.c_float, ctypes.c_int, array]
    function.restype = None
    return function


_draw: Any = None
MISSING: str | None = None
"""Why there is no machine code."""
try:
    _draw = load(_SOURCE)
except OSError as error:
    MISSING = str(error)
AVAILABLE = MISSING is None


class Draws:
    """Draws of one token each from the rows `index` of a table of logits, with a `top_k`, `top_p`,
    `depth` and `temperature` for each row (see `together.Settings`). Logits below `least` are not
    drawn. For one caller at a time; only where `AVAILABLE`.
    """

    def __init__(
        self,
        index: NDArray[np.intp],
        settings: tuple[
            NDArray[np.intp],
            NDArray[np.float64],
            NDArray[np.float64],
            NDArray[np.float64],
        ],
        least: float,
    ) -> None:
        self._numbers = np.empty(len(index), dtype=np.float64)
        self._tokens = np.empty(len(index), dtype=np.int64)
        self._n_rows = int(index.max(initial=-1)) + 1
        columns = [
            np.ascontiguousarray(column, dtype=kind)
            for column, kind in zip((index, *settings), _KINDS, strict=True)
        ]
        # Looking an address up takes as long as a small draw.
        self._kept = (*columns, self._numbers)
        self._addresses = [column.ctypes.data for column in self._kept]
        self._least = least
        self._result = self._tokens.ctypes.data

    def __call__(
        self, logits: NDArray[np.float32], numbers: Sequence[float], n_threads: int
    ) -> list[int]:
        """A token of each row for its number in [0, 1); -1 where none could be drawn. Without the
        GIL. Raises ValueError where a row or a number is missing."""
        if len(logits) < self._n_rows or len(numbers) != len(self._numbers):
            raise ValueError(f"{len(logits)} rows and {len(numbers)} numbers are too few")
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        self._numbers[:] = numbers
        _draw(
            logits.ctypes.data,
            logits.shape[1],
            len(self._tokens),
            *self._addresses,
            self._least,
            n_threads,
            self._result,
        )
        tokens: list[int] = self._tokens.tolist()
        return tokens
