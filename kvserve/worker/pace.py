"""How many prompt tokens a step may take on, so that a step stays short."""

_BESIDE_STREAMS_S = 0.15
_ALONE_S = 1.0
_FEWEST = 32
_FIRST = 128
_SMOOTHING = 0.3


class Pace:
    """Bounds prefill by time: a running stream never waits long for another's prompt, and a
    `Cancel` or `Pause` never waits long for a step.

    Learns the seconds for each token from the steps themselves: they differ by 1,000 times
    between a laptop's CPU and a large GPU.
    """

    __slots__ = ("_n_batch", "_seconds_per_token")

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self._seconds_per_token: float | None = None

    def limit(self, n_decoding: int) -> int:
        """The most prompt tokens for the next step, beside `n_decoding` running streams."""
        if self._seconds_per_token is None:
            return min(_FIRST, self._n_batch)
        seconds = _BESIDE_STREAMS_S if n_decoding else _ALONE_S
        affordable = int(seconds / self._seconds_per_token)
        return max(min(affordable, self._n_batch), min(_FEWEST, self._n_batch))

    def observe(self, n_prefilled: int, n_tokens: int, seconds: float) -> None:
        """Learn from a step of `n_tokens`, of which `n_prefilled` were prompt tokens.

        Steps with few prompt tokens say nothing about prefill and are left out.
        """
        if n_prefilled < _FEWEST:
            return
        measured = max(seconds / n_tokens, 1e-9)
        known = self._seconds_per_token
        self._seconds_per_token = (
            measured if known is None else known + _SMOOTHING * (measured - known)
        )
