"""How many rows a step is best given: some numbers take longer than larger ones.

llama.cpp multiplies several rows at a time, and what is left over by other kernels, for which all
weights are read once more. Gemma 3 270M on two cores decodes 1 to 8 sequences in 15, 29, 48, 36,
55, 45, 63 and 45 ms. Which numbers those are depends on the weights' types, the kernels and the
depth; so on a CPU it is tried while streams run.
"""

from collections import deque
from collections.abc import Mapping
from statistics import median_low

_FEWEST = 3
"""Below, reading the weights takes most of the time, and a row more is no gain."""
CPU_ROWS = 4
"""Rows that llama.cpp multiplies at a time on a CPU, and what is left over one by one: 8 streams
and 12 prompt tokens take less time than 8 and 11."""
CPU_TILE = 64
"""From so many rows on a CPU's flash attention computes tiles of so many, with all cells that any
of their sequences has: 80 ms more for the same batch with 1,300 cells in use, which less than two
tiles do not make up for (ggml_compute_forward_flash_attn_ext_f16 in ggml-cpu/ops.cpp)."""
_N_TRIALS = 4
_N_KEPT = 5
_AGAIN = 64
"""Each so many steps of a number, another number of rows is tried once more."""
_WORTH = 0.97


def whole_rows(n: int) -> int:
    """The rows of whole groups on a CPU that `n` rows are at most made."""
    return n if n < _FEWEST else n + -n % CPU_ROWS


def left_over(n: int) -> int:
    """The rows that are in no whole group on a CPU; 0 where there is none."""
    return n % CPU_ROWS if n > CPU_ROWS else 0


class StepRows:
    """Learns from steps without prompts where it `learns`; else the numbers in `known` are all
    there is. What it learns is at most `n_most` rows, and begins no tile of attention."""

    def __init__(
        self, known: Mapping[int, int] | None = None, *, learns: bool = False, n_most: int = 0
    ) -> None:
        self._known = dict(known or {})
        self._learns = learns
        self._n_most = n_most
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._n_seen: dict[int, int] = {}

    @property
    def learns(self) -> bool:
        """Whether other numbers are tried."""
        return self._learns

    def wanted(self, n: int) -> int:
        """Rows for the next step with `n` tokens, each with an output. The same until it was
        observed."""
        if not self._learns or n < _FEWEST:
            return self._known.get(n, n)
        candidates = self._candidates(n)
        fewest = min(candidates, key=lambda rows: len(self._of(n, rows)))
        if len(self._of(n, fewest)) < _N_TRIALS:
            return fewest
        turn, rest = divmod(self._n_seen[n], _AGAIN)
        if rest == 0:
            return candidates[turn % len(candidates)]
        best = min(candidates, key=lambda rows: median_low(self._of(n, rows)))
        gain = median_low(self._of(n, best)) / median_low(self._of(n, n))
        return best if gain < _WORTH else n

    def outputs(self, n: int) -> int:
        """Outputs for a step with prompts in which `n` are asked for."""
        if not self._learns or n < _FEWEST:
            return n
        return self._candidates(n)[-1]

    def observe(self, n: int, n_rows: int, seconds: float) -> None:
        """Note a step with `n` tokens that had so many rows."""
        if self._learns and n >= _FEWEST:
            self._of(n, n_rows).append(seconds)
            self._n_seen[n] = self._n_seen.get(n, 0) + 1

    def _candidates(self, n: int) -> list[int]:
        numbers = {n, n + n % 2, whole_rows(n)}
        return sorted(
            rows
            for rows in numbers
            if rows == n or (rows <= self._n_most and not n < CPU_TILE <= rows)
        )

    def _of(self, n: int, n_rows: int) -> deque[float]:
        return self._samples.setdefault((n, n_rows), deque(maxlen=_N_KEPT))
