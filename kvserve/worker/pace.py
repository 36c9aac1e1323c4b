"""How many prompt tokens a step may take on, so that a step stays short."""

from collections import deque
from statistics import median_low

from kvserve.worker.step_rows import CPU_ROWS, CPU_TILE

_ALONE_S = 1.0
_LONGEST_GAP = 2.8
"""In all but one of a hundred steps that read one prompt, the gap between two tokens of a stream
shall be at most so many times what it is without (three, as a client sees it)."""
_STRETCH, _LEAST_STRETCH, _MOST_STRETCH = 1.2, 0.8, 1.4
"""For that, a waiting prompt may take so many times as long as the streams' own step: at first, at
least and at most. How much there must be to spare for what holds the process up now and then is
learned:"""
_TOO_LONG, _SHORT = 0.94, 1.0004
"""the stretch after a longer gap and after any other one, in stretches before. It stands still
where 0.6 % of the gaps are longer."""
_SHARED_STRETCH = 2.2
"""Each of several prompts may take so many of the streams' steps: fewer and larger pieces are read
sooner, and their requests are the next streams."""
_LEAST_BOUND_S, _MOST_BOUND_S = 0.05, 0.15
_BOUND_STEPS = 4
"""Where several wait, their prompts may take so many steps of all that will then run, within those
bounds."""
_FEWEST = 32
_FEWEST_BESIDE = 8
_FIRST = 128
_SMOOTHING = 0.3
_GROWTH = 2.0
"""Beside streams, the limit of one step is at most so many times that of the step before."""
_STEADY, _HEADROOM = 1.2, 1.1
"""The limit stays where it is while up to so many times as much could be afforded: llama.cpp keeps
its graph while batches are of the same size."""
_GPU_ROWS = 8
"""llama.cpp multiplies so many rows at a time with quantized weights on a GPU, where those that
fill a tile up cost nothing (mmq.cuh)."""
_N_STEPS = 9
_MOST_LEFT_OUT = 64
"""Steps that follow a prompt's, one after another, before they are all there is to learn from."""


class Pace:
    """Bounds prefill by time: a running stream never waits long for another's prompt, and a
    `Cancel` or `Pause` never waits long for a step.

    Learns from the steps themselves how long a step without prompts takes, and what each prompt
    token adds: both differ by 1,000 times between a laptop's CPU and a large GPU. `on_gpu` says
    that all is computed there, `tiles` that attention is on a CPU in tiles of many rows.
    """

    __slots__ = (
        "_granted",
        "_mixed",
        "_n_batch",
        "_n_last",
        "_on_gpu",
        "_rows",
        "_seconds_per_token",
        "_shared",
        "_steps",
        "_stretch",
        "_tiles",
    )

    def __init__(self, n_batch: int, *, on_gpu: bool = False, tiles: bool = False) -> None:
        self._n_batch = n_batch
        self._n_last = 0
        self._on_gpu = on_gpu
        self._tiles = tiles
        self._rows = _GPU_ROWS if on_gpu else CPU_ROWS
        self._seconds_per_token: float | None = None
        self._steps = _StreamSteps()
        self._granted = 0
        self._mixed = False
        self._shared = False
        self._stretch = _STRETCH

    def limit(
        self,
        n_decoding: int,
        n_waiting: int = 1,
        n_unread: int | None = None,
        n_drafted: int = 0,
    ) -> int:
        """The most prompt tokens for the next step, beside `n_decoding` running streams for which
        `n_drafted` tokens are checked.

        `n_waiting` requests wait for their first token: each may have its time, up to the bound.
        `n_unread` is how many prompt tokens there are at most. On a GPU two batches in a row are
        never of the same size: the second one would be captured as a CUDA graph, which takes 5 to
        8 ms, and each 256th cell makes the captured one useless (ggml_backend_cuda_graph_compute
        in ggml-cuda.cu).
        """
        self._shared = n_waiting > 1
        n_beside = n_decoding + n_drafted
        limit = self._whole(n_beside, self._affordable(n_decoding, n_waiting))
        if n_decoding:
            limit = min(limit, max(self._n_batch - n_beside, 1))
            if self._on_gpu and limit > 1 and n_beside + limit == self._n_last:
                return limit - 1
            if self._tiles:
                return self._below_tile(n_beside, limit if n_unread is None else n_unread, limit)
        return limit

    def _below_tile(self, n_beside: int, n_unread: int, limit: int) -> int:
        if not CPU_TILE <= n_beside + min(limit, n_unread) < 2 * CPU_TILE:
            return limit
        return max(CPU_TILE - self._rows - n_beside, _FEWEST_BESIDE)

    def _affordable(self, n_decoding: int, n_waiting: int) -> int:
        if self._seconds_per_token is None:
            return _FIRST
        if not n_decoding:
            return max(int(_ALONE_S / self._seconds_per_token), _FEWEST)
        affordable = int(self.seconds_beside(n_decoding, n_waiting) / self._seconds_per_token)
        if self._mixed:
            if self._granted <= affordable < _STEADY * self._granted:
                return self._granted
            affordable = min(int(affordable / _HEADROOM), int(_GROWTH * self._granted) + 1)
        self._granted = min(max(affordable, _FEWEST_BESIDE), self._n_batch)
        return self._granted

    def _whole(self, n_beside: int, n_prefill: int) -> int:
        """About so many prompt tokens: no row of the batch is left over."""
        n_rows = n_beside + n_prefill
        n_rows += -n_rows % self._rows
        return min(n_rows - n_beside, self._n_batch)

    def observe(
        self, n_prefilled: int, n_tokens: int, seconds: float, gap: float | None = None
    ) -> None:
        """Learn from a step of `n_tokens`, of which `n_prefilled` were prompt tokens. Its streams
        had their tokens `gap` seconds after those before.

        Steps with few prompt tokens say little about prefill and are left out.
        """
        n_others = n_tokens - n_prefilled
        self._n_last = n_tokens
        others_s = self._steps.estimate(n_others, self._seconds_per_token)
        beside = n_others and (n_prefilled or self._mixed)
        if beside and others_s is not None and gap is not None and not self._shared:
            self._learn_stretch(gap / others_s)
        if not n_prefilled:
            self._steps.observe(n_others, seconds, first=self._mixed)
            self._mixed = False
            return
        self._mixed = n_others > 0
        if n_prefilled < (_FEWEST_BESIDE if n_others and others_s is not None else _FEWEST):
            return
        measured = seconds / n_tokens
        if others_s is not None:
            # Weights that are read anyway make a short chunk cheap: never less than half the mean.
            measured = max((seconds - others_s) / n_prefilled, measured / 2)
        measured = max(measured, 1e-9)
        known = self._seconds_per_token
        self._seconds_per_token = (
            measured if known is None else known + _SMOOTHING * (measured - known)
        )

    def _learn_stretch(self, times_idle: float) -> None:
        changed = self._stretch * (_TOO_LONG if times_idle > _LONGEST_GAP else _SHORT)
        self._stretch = min(max(changed, _LEAST_STRETCH), _MOST_STRETCH)

    def seconds_beside(self, n_decoding: int, n_waiting: int = 1) -> float:
        """What `n_decoding` running streams can wait beside their own step for those that wait."""
        step = self._steps.estimate(n_decoding, self._seconds_per_token)
        if step is None:
            return _MOST_BOUND_S
        coming = self._steps.estimate(n_decoding + n_waiting, self._seconds_per_token) or step
        bound = min(max(_BOUND_STEPS * coming, _LEAST_BOUND_S), _MOST_BOUND_S)
        stretch = self._stretch if n_waiting < 2 else _SHARED_STRETCH * n_waiting
        return min(stretch * step, max(bound, step))


class _StreamSteps:
    """What a step of so many streams takes, without prompts."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._n_left_out = 0

    def observe(self, n: int, seconds: float, *, first: bool) -> None:
        """Note a step. A single one that something held up will not count. The `first` one after a
        prompt's has no graph yet, or copies beside it: it counts where there are no others."""
        if not first:
            self._n_left_out = 0
        elif n in self._seen and self._n_left_out < _MOST_LEFT_OUT:
            self._n_left_out += 1
            return
        self._seen.setdefault(n, deque(maxlen=_N_STEPS)).append(seconds)

    def estimate(self, n: int, seconds_per_token: float | None) -> float | None:
        """Seconds for `n` streams: on the line between known numbers, above them by what a token
        takes, below them what the fewest take, and never less than fewer streams take. None where
        nothing is known."""
        below = max((m for m in self._seen if m <= n), default=None)
        above = min((m for m in self._seen if m > n), default=None)
        if below is None:
            return None if above is None else median_low(self._seen[above])
        base = median_low(self._seen[below])
        if above is not None:
            share = (n - below) / (above - below)
            return max(base, base + share * (median_low(self._seen[above]) - base))
        return base + (n - below) * (seconds_per_token or 0.0)
