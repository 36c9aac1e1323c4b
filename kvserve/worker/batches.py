"""What one decode call holds: values, no model."""

from dataclasses import dataclass, replace

from kvserve.worker.cell_rules import Operation


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of request `id`, for sequence slot `slot`.

    `last` says that these are the last tokens known, so the model's output is wanted. Of a chunk
    that is `scored` the output of every token is wanted. After the one token of a generating
    request comes `draft`: tokens that may follow, to be checked, whose outputs are wanted too.
    """

    id: int
    slot: int
    start: int
    count: int
    last: bool
    scored: bool = False
    draft: tuple[int, ...] = ()

    @property
    def n_outputs(self) -> int:
        """Rows of logits that the chunk makes."""
        return self.count if self.scored else int(self.last) + len(self.draft)


@dataclass(frozen=True, slots=True)
class Batch:
    """One decode call, `n_prefill` of its tokens from prompts, after `operations` on the memory.

    `n_pad` rows more are decoded for nothing, since so many take less time, or the outputs of the
    last `n_idle` tokens are computed. `admitted` are the requests that have their place from now
    on, in the order of their arrival, those that come back after they were `preempted` included.
    """

    chunks: tuple[Chunk, ...]
    n_prefill: int = 0
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    operations: tuple[Operation, ...] = ()
    n_pad: int = 0
    n_idle: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens in the batch."""
        return sum(chunk.count + len(chunk.draft) for chunk in self.chunks)

    @property
    def n_drafted(self) -> int:
        """Those of them that are drafts."""
        return sum(len(chunk.draft) for chunk in self.chunks)

    def advanced(self) -> "Batch":
        """The batch with the next token of each chunk, all of which have a single one."""
        chunks = tuple(replace(chunk, start=chunk.start + 1) for chunk in self.chunks)
        return Batch(chunks, n_pad=self.n_pad)


def shortened(chunks: list[Chunk], n_fewer: int) -> list[Chunk]:
    """The chunks without `n_fewer` of their drafted tokens, each taken from the end of the longest
    draft."""
    kept = {chunk.id: len(chunk.draft) for chunk in chunks}
    for _ in range(n_fewer):
        longest = max(kept, key=lambda request: kept[request])
        kept[longest] -= 1
    return [replace(chunk, draft=chunk.draft[: kept[chunk.id]]) for chunk in chunks]
