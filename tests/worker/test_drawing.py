"""Rows are drawn from on several threads and come back in order."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvserve.worker.drawing import Drawer, Wish


@dataclass
class Highest:
    """Takes the highest token and ruins the row; notes its thread."""

    threads: set[int] = field(default_factory=set)

    def sample(self, row: np.ndarray) -> int:
        self.threads.add(threading.get_ident())
        token = int(row.argmax())
        row[:] = 0
        return token


def wishes(n: int, sampler: object, n_logprobs: int | None) -> list[Wish]:
    rows = np.random.default_rng(1).normal(size=(n, 2000)).astype(np.float32)
    return [
        Wish(100 + i, row[None], sampler, lambda token: True, n_logprobs)
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 17])
def test_order_and_likelihoods(n: int, n_threads: int) -> None:
    asked = wishes(n, Highest(), 2)
    expected = [int(wish.rows.argmax()) for wish in asked]
    drawn = Drawer(n_threads, lambda token: b"x").draw(asked)
    assert [token for [(token, _)] in drawn] == expected
    assert [found.id for [(_, found)] in drawn] == [wish.id for wish in asked]
    # Read before the sampler changed the row.
    assert all(found.drawn == found.top[0] for [(_, found)] in drawn)


def test_no_likelihoods_unless_wanted() -> None:
    drawn = Drawer(2, lambda token: b"x").draw(wishes(6, Highest(), None))
    assert all(found is None for [(_, found)] in drawn)


def test_a_failure_on_a_thread_is_not_lost() -> None:
    class Broken:
        def sample(self, row: np.ndarray) -> int:
            raise ValueError("bad row")

    asked = wishes(8, Highest(), None)
    asked[1] = Wish(1, asked[1].rows, Broken(), lambda token: True)
    with pytest.raises(ValueError, match="bad row"):
        Drawer(4, lambda token: b"x").draw(asked)


@pytest.mark.parametrize(
    ("draft", "n_wanted", "drawn"),
    [
        ((4, 7, 2), 9, [4, 7, 2, 5]),
        ((4, 7, 3), 9, [4, 7, 2]),
        ((1, 7, 2), 9, [4]),
        ((4, 7, 2), 2, [4, 7]),
        ((), 9, [4]),
    ],
)
def test_a_draft_counts_as_far_as_it_is_drawn_and_wanted(
    draft: tuple[int, ...], n_wanted: int, drawn: list[int]
) -> None:
    taken: list[int] = []

    def accept(token: int) -> bool:
        taken.append(token)
        return len(taken) < n_wanted

    rows = np.eye(10, dtype=np.float32)[[4, 7, 2, 5][: len(draft) + 1]]
    [found] = Drawer(1, lambda token: b"x").draw([Wish(1, rows, Highest(), accept, None, draft)])
    assert [token for token, _ in found] == taken == drawn
