"""A stand-in for llama.cpp's memory that keeps the token of every cell, and checks every use."""

import random
from dataclasses import dataclass, field

from kvserve.worker.batches import Batch
from kvserve.worker.cell_rules import Clear, Copy, Cut, Operation, Rules, Store
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.step_rows import StepRows

PLAIN = Rules(n_spare=3)
WINDOW = Rules(n_window=4, shares=False)
RECURRENT = Rules(recurrent=True)
RECURRENT_ALONE = Rules(recurrent=True, shares=False)
ALL_RULES = (PLAIN, Rules(), WINDOW, RECURRENT, RECURRENT_ALONE)


@dataclass(eq=False)
class Cell:
    token: int


@dataclass
class FakeMemory:
    """`n_cells` may be less than the scheduler believes: then decodes fail as llama.cpp's do."""

    n_cells: int
    n_slots: int
    rules: Rules
    seed: int = 0
    sequences: dict[int, list[Cell]] = field(default_factory=dict)
    lowest: dict[int, int] = field(default_factory=dict)
    stored: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def n_used(self) -> int:
        return len({id(cell) for cells in self.sequences.values() for cell in cells})

    def tokens(self, slot: int) -> list[int]:
        return [cell.token for cell in self.sequences.get(slot, [])]

    def first_position(self, slot: int) -> int:
        return self.lowest.get(slot, -1)

    def change(self, operations: tuple[Operation, ...]) -> None:
        for operation in operations:
            match operation:
                case Copy(source, target, n_tokens):
                    self._copy(source, target, n_tokens)
                case Cut(slot, n_tokens):
                    assert not self.rules.recurrent
                    assert 0 < n_tokens < len(self.sequences[slot])
                    del self.sequences[slot][n_tokens:]
                case Clear(slot):
                    self.sequences.pop(slot, None)
                    self.lowest.pop(slot, None)
                case Store(slot, tokens, _, _):
                    assert self.tokens(slot) == tokens.tolist()
                    self.stored.append(tokens.tolist())

    def _copy(self, source: int, target: int, n_tokens: int) -> None:
        assert self.rules.shares
        assert target not in self.sequences
        assert 0 <= target < self.n_slots + self.rules.n_spare
        assert 0 < n_tokens <= len(self.sequences[source])
        assert not self.rules.recurrent or n_tokens == len(self.sequences[source])
        self.sequences[target] = self.sequences[source][:n_tokens]
        self.lowest[target] = self.lowest[source]

    def decode(self, batch: Batch, known: dict[int, list[int]]) -> bool:
        """Carry a batch out; False where there is no room, which changes nothing."""
        self.change(batch.operations)
        if self.n_used + batch.n_tokens + batch.n_pad > self.n_cells:
            return False
        for chunk in batch.chunks:
            end = chunk.start + chunk.count
            assert 0 <= chunk.slot < self.n_slots
            assert self.tokens(chunk.slot) == known[chunk.id][: chunk.start], "a wrong prefix"
            assert not (chunk.draft and self.rules.recurrent)
            if chunk.start and self.rules.n_window is not None:
                needed = max(0, chunk.start - self.rules.n_window + 1)
                assert self.lowest[chunk.slot] <= needed, "the window is not whole"
            cells = self.sequences.setdefault(chunk.slot, [])
            self.lowest.setdefault(chunk.slot, 0)
            cells += [Cell(token) for token in known[chunk.id][chunk.start : end]]
            cells += [Cell(token) for token in chunk.draft]
        self._overwrite({chunk.slot: len(chunk.draft) for chunk in batch.chunks})
        return True

    def _overwrite(self, n_drafted: dict[int, int]) -> None:
        """Sliding windows lose cells that nothing looks back to any more, at any time; in one
        micro-batch, none that the first of its tokens looks back to."""
        if self.rules.n_window is None:
            return
        for slot, cells in self.sequences.items():
            n_sure = len(cells) - n_drafted.get(slot, 0)
            highest = max(0, n_sure - self.rules.n_window + 1)
            if highest > self.lowest[slot]:
                self.lowest[slot] = self.random.randint(self.lowest[slot], highest)


def fake_scheduler(
    n_cells: int,
    n_slots: int,
    n_batch: int,
    rules: Rules = PLAIN,
    *,
    n_really: int | None = None,
    shortest: int = 1,
    n_draft: int = 0,
    rows: dict[int, int] | None = None,
    learns: bool = False,
    stores: bool = False,
) -> tuple[Scheduler, FakeMemory]:
    """A scheduler, and the memory that its batches are meant for."""
    memory = FakeMemory(n_cells if n_really is None else n_really, n_slots, rules)
    cache = PrefixCache(n_cells, n_slots, rules, memory.first_position, shortest, stores=stores)
    step_rows = StepRows(rows, learns=learns, n_most=n_slots + n_draft)
    scheduler = Scheduler(n_cells, n_slots, n_batch, cache, n_draft, n_batch, step_rows)
    return scheduler, memory
