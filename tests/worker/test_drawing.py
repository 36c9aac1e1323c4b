"""Rows are drawn from on several threads and come back in order."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvserve.ipc.messages import Sampling
from kvserve.worker import compiled
from kvserve.worker.drawing import Drawer, Round, Wish
from kvserve.worker.sampling import Sampler
from kvserve.worker.sequences import Generation, Limits


@pytest.fixture(params=["machine code", "NumPy"])
def _means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "NumPy":
        monkeypatch.setattr(compiled, "AVAILABLE", False)


@dataclass
class Highest:
    """Takes the highest token and ruins the row; notes its thread."""

    threads: set[int] = field(default_factory=set)

    def plain(self, n_vocab: int) -> None:
        return None

    def sample(self, row: np.ndarray) -> int:
        self.threads.add(threading.get_ident())
        token = int(row.argmax())
        row[:] = 0
        return token


def some_rows(n: int, n_vocab: int = 2000) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, size=(n, n_vocab)).astype(np.float32)


def wishes(n: int, sampler: object, n_logprobs: int | None) -> list[Wish]:
    return [Wish(100 + i, i, sampler, lambda token: True, n_logprobs) for i in range(n)]


def sampler_of(
    forbidden: tuple[int, ...] = (), ends: tuple[int, ...] = (), **fields: object
) -> Sampler:
    return Sampler(
        Sampling(**fields),
        Generation(np.array([1], dtype=np.int32), Limits(max_tokens=400, ignore_eos=bool(ends))),
        forbidden=np.array(forbidden, dtype=np.int64),
        end_tokens=np.array(ends, dtype=np.int64),
        piece=lambda token: b"x",
    )


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 17])
def test_order_and_likelihoods(n: int, n_threads: int) -> None:
    asked, rows = wishes(n, Highest(), 2), some_rows(n)
    expected = rows.argmax(axis=1).tolist()
    drawn = Drawer(n_threads, lambda token: b"x").draw(rows, Round(asked, rows.shape[1]))
    assert [token for [(token, _)] in drawn] == expected
    assert [found.id for [(_, found)] in drawn] == [wish.id for wish in asked]
    # Read before the sampler changed the row.
    assert all(found.drawn == found.top[0] for [(_, found)] in drawn)


def test_no_likelihoods_unless_wanted() -> None:
    drawn = Drawer(2, lambda token: b"x").draw(
        some_rows(6), Round(wishes(6, Highest(), None), 2000)
    )
    assert all(found is None for [(_, found)] in drawn)


def test_a_failure_on_a_thread_is_not_lost() -> None:
    class Broken(Highest):
        def sample(self, row: np.ndarray) -> int:
            raise ValueError("bad row")

    asked = wishes(8, Highest(), None)
    asked[1] = Wish(1, 1, Broken(), lambda token: True)
    with pytest.raises(ValueError, match="bad row"):
        Drawer(4, lambda token: b"x").draw(some_rows(8), Round(asked, 2000))


@pytest.mark.parametrize("together", [False, True])
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
    draft: tuple[int, ...], n_wanted: int, drawn: list[int], together: bool
) -> None:
    sampler = sampler_of(temperature=0.0) if together else Highest()
    taken: list[int] = []

    def accept(token: int) -> bool:
        taken.append(token)
        return len(taken) < n_wanted

    rows = np.eye(300, dtype=np.float32)[[4, 7, 2, 5][: len(draft) + 1]]
    wish = Wish(1, 0, sampler, accept, None, draft)
    [found] = Drawer(1, lambda token: b"x").draw(rows, Round([wish], 300))
    assert [token for token, _ in found] == taken == drawn


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("n_vocab", [2000, 70_001])
@pytest.mark.parametrize("n_right", [0, 1, 3])
def test_drafts_are_drawn_as_their_tokens_would_be_one_by_one(n_right: int, n_vocab: int) -> None:
    """By each kind of sampler, and what is drawn after them too."""
    n_draft, n_later = 3, 4
    drafting = [sampler_of(seed=i, **fields) for i, fields in enumerate(MIXED)]
    lone = [sampler_of(seed=i, **fields) for i, fields in enumerate(MIXED)]
    rows = some_rows(len(MIXED) * (n_draft + 1), n_vocab)
    asked, expected = [], []
    for i, sampler in enumerate(lone):
        first = i * (n_draft + 1)
        drawn = [sampler.sample(row) for row in rows[first : first + n_right + 1].copy()]
        expected.append(drawn)
        wrong = [(drawn[-1] + 1) % n_vocab] * (n_draft - n_right)
        draft = (*drawn[:n_right], *wrong)
        asked.append(Wish(i, first, drafting[i], lambda token: True, None, draft))
    found = Drawer(2, lambda token: b"x", 2).draw(rows, Round(asked, n_vocab))
    assert [[token for token, _ in one] for one in found] == expected
    for row in some_rows(n_later, n_vocab):
        later = [one.sample(row.copy()) for one in drafting]
        assert later == [one.sample(row.copy()) for one in lone]


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("banned", [{"forbidden": (7,)}, {"forbidden": (7, 8)}, {"ends": (9, 7)}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_must_not_be_drawn_is_not_drawn_from_a_draft(
    banned: dict[str, tuple[int, ...]], temperature: float
) -> None:
    rows = some_rows(8, 5000)
    rows[:, [7, 8, 9]] = 50.0
    drafting, lone = (
        [sampler_of(**banned, seed=i, temperature=temperature) for i in range(2)] for _ in "ab"
    )
    expected = [
        [one.sample(row) for row in rows[4 * i : 4 * i + 4].copy()] for i, one in enumerate(lone)
    ]
    asked = [
        Wish(i, 4 * i, drafting[i], lambda token: True, None, tuple(expected[i][:3]))
        for i in range(2)
    ]
    found = Drawer(1, lambda token: b"x").draw(rows, Round(asked, 5000))
    assert [[token for token, _ in one] for one in found] == expected
    assert not set(next(iter(banned.values()))) & {token for one in expected for token in one}


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, 1e30])
@pytest.mark.parametrize("where", [slice(None), 1234])
@pytest.mark.parametrize("n_draft", [1, 3])
@pytest.mark.parametrize("n", [1, 4])
def test_a_row_without_a_choice_within_a_draft(
    value: float, where: slice | int, n_draft: int, n: int
) -> None:
    n_rows = n_draft + 1
    for place in range(n_rows):
        rows = some_rows(n_rows * n, 5000)
        rows[place, where] = value
        expected, asked = [], []
        for i in range(n):
            lone, first = sampler_of(seed=i), n_rows * i
            drawn = [lone.sample(row) for row in rows[first : first + n_rows].copy()]
            expected.append(drawn)
            draft = tuple(drawn[:-1])
            asked.append(Wish(i, first, sampler_of(seed=i), lambda token: True, None, draft))
        found = Drawer(2, lambda token: b"x", 2).draw(rows, Round(asked, 5000))
        assert [[token for token, _ in one] for one in found] == expected
        assert not (where == 1234 and value > 0) or expected[0][place] == 1234


@pytest.mark.parametrize("n_threads", [1, 3])
def test_numpy_draws_from_all_rows_of_drafts(
    monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    monkeypatch.setattr(compiled, "AVAILABLE", False)
    monkeypatch.setattr(Sampler, "settle", lambda self, row, number, token: token)
    rows, wishes = some_rows(60, 5000), []
    for i in range(10):
        draft = tuple(rows[6 * i : 6 * i + 5].argmax(axis=1).tolist())
        sampler = sampler_of(temperature=0.0)
        wishes.append(Wish(i, 6 * i, sampler, lambda token: True, None, draft))
    found = Drawer(n_threads, lambda token: b"x").draw(rows, Round(wishes, 5000))
    assert [token for one in found for token, _ in one] == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("n_drawn", [0, 1, 4])
def test_a_step_draws_together_all_rows_that_hang_on_no_other(n_drawn: int) -> None:
    """What a draw changes the next row of cannot be drawn with it."""
    draft = tuple(range(n_drawn))
    fields = [{}, {"presence_penalty": 1.0}, {"typical_p": 0.5}]
    asked = [
        Wish(i, i * (n_drawn + 1), sampler_of(**one), lambda token: True, None, draft)
        for i, one in enumerate(fields)
    ]
    todo = Round(asked, 5000)
    assert todo.together == [(0, n_drawn + 1), (1, 1)]
    assert todo.index.tolist() == [*range(n_drawn + 1), n_drawn + 1]
    assert todo.alone == [2]


MIXED = (
    {},
    {"temperature": 0.0},
    {"top_k": 5, "top_p": 0.9},
    {"top_p": 0.5},
    {"min_p": 0.2, "temperature": 1.5},
    {"top_k": 300},
    {"top_k": 0},
    {"typical_p": 0.5},
    {"presence_penalty": 1.0, "repeat_penalty": 1.2},
    {"logit_bias": {7: 100.0}, "top_k": 2},
    {"xtc_probability": 0.5},
    {"mirostat": 2},
)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("n_vocab", [100, 2000, 70_001])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_token_hangs_on_its_own_row_alone(n_vocab: int, n_threads: int) -> None:
    """Drawn in a crowd, in another order and alone, over several steps."""
    drawer = Drawer(n_threads, lambda token: b"x", n_threads)
    crowd = [sampler_of(seed=i, **fields) for i, fields in enumerate(MIXED)]
    shuffled = [sampler_of(seed=i, **fields) for i, fields in enumerate(MIXED)]
    lone = [sampler_of(seed=i, **fields) for i, fields in enumerate(MIXED)]
    again = Round([Wish(i, i, one, lambda token: True) for i, one in enumerate(crowd)], n_vocab)
    for step in range(4):
        rows = some_rows(len(MIXED) + step, n_vocab)[step:]
        places = np.random.default_rng(step).permutation(len(MIXED))
        alone = [one.sample(row) for one, row in zip(lone, rows.copy(), strict=True)]
        others = [Wish(i, i, shuffled[i], lambda token: True) for i in places[:7].tolist()]
        drawn = drawer.draw(rows.copy(), again)
        assert [token for [(token, _)] in drawn] == alone
        mixed = drawer.draw(rows.copy(), Round(others, n_vocab))
        assert [token for [(token, _)] in mixed] == [alone[wish.id] for wish in others]
        for i in places[7:].tolist():
            shuffled[i].sample(rows[i].copy())


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("value", [-np.inf, np.nan, 0.0, -1e9])
def test_a_row_without_a_choice_does_not_spoil_its_neighbours(value: float) -> None:
    rows = some_rows(4, 5000)
    rows[1] = value
    asked = [Wish(i, i, sampler_of(seed=1), lambda token: True) for i in range(4)]
    expected = [sampler_of(seed=1).sample(row) for row in rows.copy()]
    drawn = Drawer(2, lambda token: b"x").draw(rows, Round(asked, rows.shape[1]))
    assert [token for [(token, _)] in drawn] == expected
    assert all(0 <= token < 5000 for token in expected)
