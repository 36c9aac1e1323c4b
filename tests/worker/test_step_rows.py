"""Which numbers of rows a step gets, on machines of known speed."""

import random

import pytest

from kvserve.worker.step_rows import StepRows, left_over

GEMMA = {1: 15, 2: 29, 3: 48, 4: 36, 5: 55, 6: 45, 7: 63, 8: 45, 9: 62, 10: 58, 11: 79, 12: 67}
"""Milliseconds: Gemma 3 270M Q4_K_M on two cores."""
EVEN = {n: 10 + n for n in range(1, 17)}
"""Where every row takes as long as the one before."""


def run(
    rows: StepRows, n: int, machine: dict[int, int], n_steps: int, noise: random.Random
) -> list[int]:
    chosen = []
    for _ in range(n_steps):
        chosen.append(rows.wanted(n))
        assert rows.wanted(n) == chosen[-1], "it changes only with what was observed"
        rows.observe(n, chosen[-1], machine[chosen[-1]] * noise.uniform(0.9, 1.1))
    return chosen


@pytest.mark.parametrize(
    ("n", "best"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (9, 10), (11, 12)]
)
def test_the_number_that_takes_the_least_is_found_and_kept(n: int, best: int) -> None:
    chosen = run(StepRows(learns=True, n_most=16), n, GEMMA, 640, random.Random(n))
    assert chosen[100:].count(best) >= 0.9 * 540


@pytest.mark.parametrize("n", range(1, 13))
def test_where_every_row_costs_alike_none_is_added(n: int) -> None:
    chosen = run(StepRows(learns=True, n_most=16), n, EVEN, 640, random.Random(n))
    assert chosen[100:].count(n) >= 0.9 * 540


def test_what_is_best_may_change() -> None:
    rows, noise = StepRows(learns=True, n_most=16), random.Random(1)
    assert run(rows, 7, GEMMA, 300, noise)[-1] == 8
    assert run(rows, 7, EVEN, 1500, noise)[-1] == 7
    assert run(rows, 7, GEMMA, 1500, noise)[-1] == 8


def test_no_step_has_more_rows_than_there_may_be_outputs() -> None:
    rows = StepRows(learns=True, n_most=7)
    for n in range(1, 8):
        assert max(run(rows, n, GEMMA, 50, random.Random(n))) <= 7
        assert rows.outputs(n) <= 7
    assert set(run(rows, 9, GEMMA, 50, random.Random(0))) == {9}


def test_what_was_timed_at_the_start_is_kept_where_nothing_is_learned() -> None:
    rows = StepRows({7: 9, 8: 9})
    assert [rows.wanted(n) for n in range(1, 11)] == [1, 2, 3, 4, 5, 6, 9, 9, 9, 10]
    rows.observe(8, 9, 1000.0)
    rows.observe(8, 8, 0.001)
    assert rows.wanted(8) == 9
    assert [rows.outputs(n) for n in range(10)] == list(range(10))


def test_with_prompts_outputs_come_in_fours() -> None:
    rows = StepRows(learns=True, n_most=16)
    assert [rows.outputs(n) for n in range(10)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 12]


def test_what_is_left_over_of_whole_groups() -> None:
    assert [left_over(n) for n in range(1, 14)] == [0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
