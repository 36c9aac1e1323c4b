"""The tree of cells against a list of cells for each sequence."""

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvserve.worker.cell_tree import CachedSequence, CellTree, n_common

SALTS = st.sampled_from(("", "pepper"))
TEXTS = st.lists(st.integers(0, 2), min_size=8, max_size=8).map(
    lambda values: np.array(values, dtype=np.int32)
)


@dataclass
class Model:
    """What the tree should say, by brute force."""

    cells: dict[CachedSequence, list[int]] = field(default_factory=dict)

    def distinct(self, *, running: bool = False) -> set[int]:
        return {
            cell
            for sequence, cells in self.cells.items()
            for cell in cells
            if sequence.running or not running
        }

    def longest(self, tokens: np.ndarray, salt: str) -> int:
        return max(
            (
                n_common(sequence.tokens[: len(cells)], tokens)
                for sequence, cells in self.cells.items()
                if sequence.salt == salt
            ),
            default=0,
        )


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = CellTree()
        self.model = Model()
        self.slots = itertools.count()
        self.new_cells = itertools.count()

    @rule(tokens=TEXTS, salt=SALTS, data=st.data())
    def open(self, tokens: np.ndarray, salt: str, data: st.DataObject) -> None:
        matches = self.tree.match(tokens, salt)
        shared = data.draw(st.sampled_from([None, *matches]))
        cells: list[int] = []
        if shared is not None:
            n = data.draw(st.integers(1, shared.n_tokens))
            shared = self.tree.shorten(shared, n)
            cells = self.model.cells[min(shared.branch.sequences, key=lambda s: s.slot)][:n]
            pinned = self.model.distinct(running=True)
            assert self.tree.n_pinned_in(shared) == len(pinned & set(cells))
        sequence = self.tree.open(next(self.slots), tokens, salt, shared)
        self.model.cells[sequence] = cells[:]

    @precondition(lambda self: any(one.running and one.n_cells < 8 for one in self.model.cells))
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        growing = [one for one in self.model.cells if one.running and one.n_cells < 8]
        sequence = data.draw(st.sampled_from(growing))
        count = data.draw(st.integers(1, 8 - sequence.n_cells))
        self.tree.append(sequence, count)
        self.model.cells[sequence] += itertools.islice(self.new_cells, count)

    @precondition(lambda self: self.model.cells)
    @rule(data=st.data(), ending=TEXTS)
    def stop_or_resume(self, data: st.DataObject, ending: np.ndarray) -> None:
        sequence = data.draw(st.sampled_from(list(self.model.cells)))
        if sequence.running:
            self.tree.stop(sequence)
            return
        ending[: sequence.n_cells] = sequence.tokens[: sequence.n_cells]
        self.tree.resume(sequence, ending)

    @precondition(lambda self: any(one.n_cells > 1 for one in self.model.cells))
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        long = [one for one in self.model.cells if one.n_cells > 1]
        sequence = data.draw(st.sampled_from(long))
        n_tokens = data.draw(st.integers(1, sequence.n_cells))
        self.tree.cut(sequence, n_tokens)
        del self.model.cells[sequence][n_tokens:]

    @precondition(lambda self: self.model.cells)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.model.cells)))
        self.tree.remove(sequence)
        del self.model.cells[sequence]

    @rule(tokens=TEXTS, salt=SALTS)
    def match(self, tokens: np.ndarray, salt: str) -> None:
        matches = self.tree.match(tokens, salt)
        lengths = [match.n_tokens for match in matches]
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths, default=0) == self.model.longest(tokens, salt)
        for match in matches:
            assert match.branch.sequences
            for sequence in match.branch.sequences:
                assert n_common(sequence.tokens, tokens) >= match.n_tokens
                assert sequence.salt == salt

    @invariant()
    def counts_are_those_of_the_cells(self) -> None:
        pinned = self.model.distinct(running=True)
        assert self.tree.n_cells == len(self.model.distinct())
        assert self.tree.n_pinned == len(pinned)
        for sequence, cells in self.model.cells.items():
            assert sequence.n_cells == len(cells)
            assert self.tree.n_freeable(sequence) == len(set(cells) - pinned)


TestTree = TreeMachine.TestCase
TestTree.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)


def test_n_common() -> None:
    some = np.array([1, 2, 3])
    assert n_common(some, np.array([1, 2, 4, 5])) == 2
    assert n_common(some, np.array([1, 2, 3, 4])) == 3
    assert n_common(some, np.array([2])) == 0
    assert n_common(some, some[:0]) == 0


def test_a_branch_that_parts_nothing_any_more_is_joined_again() -> None:
    """Else a long prefix would fall into single tokens over time."""
    tree = CellTree()
    tokens = np.arange(100)
    first = tree.open(0, tokens, "")
    tree.append(first, 100)
    for n in range(1, 99):
        other = np.concatenate([tokens[:n], [500, 501]])
        (match,) = tree.match(other, "")
        second = tree.open(1, other, "", match)
        tree.append(second, 2)
        tree.remove(second)
    assert (first.tail.start, first.tail.end) == (0, 100)
