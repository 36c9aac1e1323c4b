"""What one decode computes."""

import ctypes
from collections.abc import Sequence

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray


class Batch:
    """Tokens for one decode, in arrays that llama.cpp reads in place.

    Capacity `n_batch` tokens, each in one sequence. The last `n_pad` of them are only there since
    so many take less time.
    """

    def __init__(self, n_batch: int) -> None:
        self.n_tokens = self.n_pad = 0
        self.outputs: list[int] = []
        self._token = np.zeros(n_batch, dtype=np.int32)
        self._pos = np.zeros(n_batch, dtype=np.int32)
        self._slot = np.zeros(n_batch, dtype=np.int32)
        self._n_slots = np.ones(n_batch, dtype=np.int32)
        self._wanted = np.zeros(n_batch, dtype=np.int8)
        starts = self._slot.ctypes.data + self._slot.itemsize * np.arange(n_batch)
        self._slot_pointers = starts.astype(np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.raw = ll.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._n_slots.ctypes.data_as(int32),
            seq_id=self._slot_pointers.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Empty the batch."""
        self._wanted[: self.n_tokens] = 0
        self.n_tokens = self.n_pad = self.raw.n_tokens = 0
        self.outputs.clear()

    def add(
        self,
        tokens: NDArray[np.int32] | Sequence[int],
        start: int,
        slot: int,
        *,
        last: bool = False,
        scored: bool = False,
    ) -> None:
        """Append `tokens` at positions `start` and on of sequence `slot`; `last` asks for the
        logits of the final one, `scored` for those of all. Whose logits are wanted is appended to
        `outputs`, as an index into the batch."""
        begin, end = self.n_tokens, self.n_tokens + len(tokens)
        self._token[begin:end] = tokens
        self._pos[begin:end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self._slot[begin:end] = slot
        if last or scored:
            first = begin if scored else end - 1
            self._wanted[first:end] = 1
            self.outputs.extend(range(first, end))
        self.n_tokens = self.raw.n_tokens = end

    def pad(self, n: int, *, wanted: bool) -> None:
        """Append `n` rows behind the last token, which must be the last of its sequence. What they
        leave in the cache goes as soon as they are decoded (`Context.submit`). Logits are computed
        for them too where `wanted`, after those of the `outputs`."""
        begin = self.n_tokens
        last = begin - 1
        self.add(self._token[last:begin].repeat(n), int(self._pos[last]) + 1, int(self._slot[last]))
        self._wanted[begin : self.n_tokens] = wanted
        self.n_pad = n

    def want_more(self, n: int) -> None:
        """Have the logits of the last `n` tokens computed too, which were added without: they come
        after those of the `outputs`."""
        assert not self.outputs or self.outputs[-1] < self.n_tokens - n
        self._wanted[self.n_tokens - n : self.n_tokens] = 1

    @property
    def padded(self) -> tuple[int, int]:
        """The sequence that has the padding, and at which position that begins."""
        first = self.n_tokens - self.n_pad
        return int(self._slot[first]), int(self._pos[first])

    def advance(self, tokens: Sequence[int]) -> None:
        """Put the next token of every sequence in the place of the last one: of a batch with one
        token each, apart from padding."""
        self._token[: self.n_tokens - self.n_pad] = tokens
        self._pos[: self.n_tokens] += 1

    def want_all(self) -> None:
        """Ask for the logits of every token that was added."""
        self._wanted[: self.n_tokens] = 1
        self.outputs[:] = range(self.n_tokens)
