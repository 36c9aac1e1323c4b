"""Proposals by a small model that reads along (Leviathan et al., 2023).

Its cache follows the sequences: what it has read stays, what turned out otherwise is cut off, and
what is new is read before it goes on by itself, always with the likeliest token.
"""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Batch, CacheFull, Context, DecodeError  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve.worker.speculation.acceptance import DRAFT_KINDS
from kvserve.worker.speculation.proposal import Ask, Proposal, Tokens

_LEAST_LIKELY = 0.3
"""A token that the draft model itself finds less likely is not worth a place in the batch."""
_KIND_FROM = (0.0, 0.5, 0.7, 0.85, 0.95, 0.99)
"""The probabilities at which the kinds begin."""


@dataclass(slots=True)
class _Reader:
    """What the draft model's cache has of a sequence: `read[:n_read]`, under `slot`."""

    slot: int
    read: Tokens
    n_read: int = 0


@dataclass(slots=True)
class _Run:
    """A proposal in the making, after `n_tokens` known tokens."""

    ask: Ask
    reader: _Reader
    tokens: list[int]
    kinds: list[int]

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.ask.n_most


class DraftProposer:
    """Drafts with `context`, a context of its own with a place for each sequence. Not thread-safe.

    Sequences that it has not read to their end yet get no proposal; a call reads at most one batch.
    Tokens from `n_vocab` on, the size of the other model's vocabulary, are not proposed.
    """

    batched = True

    def __init__(self, context: Context, n_vocab: int) -> None:
        self._context = context
        self.least_likely = _LEAST_LIKELY
        self._n_vocab = min(n_vocab, context.vocab.n_tokens)
        self._batch = Batch(context.n_batch)
        self._readers: dict[int, _Reader] = {}
        self._free = list(range(context.n_seq_max))

    def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """See `Proposer`."""
        try:
            runs = self._propose(asks)
        except (CacheFull, DecodeError) as error:
            print(f"drafting failed: {error or 'cache full'}", file=sys.stderr, flush=True)
            for request in tuple(self._readers):
                self.forget(request)
            return [None] * len(asks)
        return [
            Proposal(tuple(run.tokens), tuple(run.kinds)) if run and run.tokens else None
            for run in (runs.get(ask.id) for ask in asks)
        ]

    def forget(self, request: int) -> None:
        """See `Proposer`."""
        reader = self._readers.pop(request, None)
        if reader is not None:
            self._context.clear_slot(reader.slot)
            self._free.append(reader.slot)

    def _propose(self, asks: Sequence[Ask]) -> dict[int, _Run]:
        runs = self._catch_up(asks)
        active = list(runs.values())
        n_outputs = len(active)
        while active:
            rows = self._context.logits(n_outputs)
            active = [run for run, row in zip(active, rows, strict=True) if self._extend(run, row)]
            if not active:
                break
            self._batch.clear()
            for run in active:
                reader = run.reader
                reader.read[reader.n_read] = run.tokens[-1]
                self._batch.add(
                    reader.read[reader.n_read : reader.n_read + 1],
                    reader.n_read,
                    reader.slot,
                    last=True,
                )
            self._context.decode(self._batch)
            for run in active:
                run.reader.n_read += 1
            n_outputs = len(active)
        return runs

    def _catch_up(self, asks: Sequence[Ask]) -> dict[int, _Run]:
        """Read what is new of the sequences; those read to their end can go on."""
        self._batch.clear()
        n_left = self._context.n_batch
        self._make_free({ask.id for ask in asks})
        runs: dict[int, _Run] = {}
        counts: list[tuple[_Reader, int]] = []
        for ask in asks:
            reader = self._reader_of(ask)
            if reader is None or n_left < 1 or ask.n_tokens + ask.n_most > self._context.n_ctx:
                continue
            self._cut(reader, ask)
            new = ask.tokens[reader.n_read : ask.n_tokens][:n_left]
            last = reader.n_read + len(new) == ask.n_tokens
            # What only the other model knows is read as any token at all.
            readable = np.where(new < self._n_vocab, new, 0).astype(np.int32)
            self._batch.add(readable, reader.n_read, reader.slot, last=last)
            reader.read[reader.n_read : reader.n_read + len(new)] = new
            counts.append((reader, len(new)))
            n_left -= len(new)
            if last:
                runs[ask.id] = _Run(ask, reader, [], [])
        if counts:
            self._context.decode(self._batch)
        for reader, count in counts:
            reader.n_read += count
        return runs

    def _cut(self, reader: _Reader, ask: Ask) -> None:
        """Forget what the sequence does not have; its last token is always read again or anew."""
        n_most = min(reader.n_read, ask.n_tokens - 1)
        differs = np.flatnonzero(reader.read[:n_most] != ask.tokens[:n_most])
        n_right = int(differs[0]) if len(differs) else n_most
        if n_right < reader.n_read:
            self._context.cut_slot(reader.slot, n_right)
            reader.n_read = n_right

    def _make_free(self, asked: set[int]) -> None:
        """Let go of sequences that wait, where others need their places."""
        n_new = len(asked - self._readers.keys())
        for request in self._readers.keys() - asked:
            if len(self._free) >= n_new:
                return
            self.forget(request)

    def _reader_of(self, ask: Ask) -> _Reader | None:
        reader = self._readers.get(ask.id)
        if reader is None and self._free:
            room = max(len(ask.tokens), ask.n_tokens + ask.n_most)
            reader = _Reader(self._free.pop(), np.zeros(room + 64, dtype=np.int32))
            self._readers[ask.id] = reader
        return reader

    def _extend(self, run: _Run, row: NDArray[np.float32]) -> bool:
        """Add the likeliest token to a proposal; False where it is not likely, or enough."""
        row = row[: self._n_vocab]
        token = int(row.argmax())
        probability = 1 / float(np.exp(row - row[token]).sum(dtype=np.float64))
        if probability < self.least_likely:
            return False
        run.tokens.append(token)
        run.kinds.append(DRAFT_KINDS + sum(probability >= least for least in _KIND_FROM) - 1)
        return not run.done
