"""Tasks: the same items from the same seed, answers that are true, judgements that are exact."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import parse_pair
from kvserve.core.loss import REFERENCE_PAIR
from kvserve.errors import UsageError
from kvserve.eval.tasks.documents import N_DEPTHS
from kvserve.eval.tasks.item import Item, Judge, is_right
from kvserve.eval.tasks.suite import TASKS, chosen, make_items, prompts, results

Q4 = parse_pair("q4_0")
ALL = tuple(TASKS)


def items(task: str, n: int = 20, n_lines: int = 40, seed: int = 1) -> list[Item]:
    return list(make_items([task], n, n_lines, seed)[task])


@pytest.mark.parametrize("task", ALL)
def test_a_seed_makes_the_same_items_however_many(task: str) -> None:
    assert items(task, 12)[:5] == items(task, 5)
    assert items(task, 5, seed=2) != items(task, 5)
    prompts_made = [item.prompt for item in items(task, 20)]
    assert len(set(prompts_made)) == 20


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 1000), st.integers(0, 200))
def test_the_answer_is_right_and_little_else_is(task: str, seed: int, n_lines: int) -> None:
    for item in items(task, 6, n_lines, seed):
        assert is_right(item, f" {item.answer}\n")
        assert not is_right(item, "")
        assert not is_right(item, "no idea")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_arithmetic_is_right_and_has_2_to_8_steps(seed: int) -> None:
    signs = {"Add": "+", "Subtract": "-", "Multiply by": "*"}
    for index, item in enumerate(items("arithmetic", 8, seed=seed)):
        question = item.prompt.rpartition("Question: ")[2]
        start = re.match(r"Start with (\d+)\.", question)
        assert start is not None
        value, steps = int(start[1]), re.findall(r"(Add|Subtract|Multiply by) (\d+)\.", question)
        for kind, operand in steps:
            value = eval(f"{value} {signs[kind]} {operand}")
        assert item.answer == str(value)
        assert len(steps) == 2 + index % 7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 120))
def test_variables_hold_what_python_says(seed: int, n_lines: int) -> None:
    for item in items("variables", 6, n_lines, seed):
        *lines, last = [x[4:] for x in item.prompt.splitlines() if x.startswith(">>> ")]
        scope: dict[str, int] = {}
        exec("\n".join(line for line in lines if "print" not in line), scope)
        assert item.answer == str(scope[last.removeprefix("print(").removesuffix(")")])


def test_needles_lie_at_ten_depths_and_several_lengths() -> None:
    made = items("needles", 30, 200)
    places = []
    for item in made:
        text = item.prompt.rpartition("\n\n")[0]
        places.append(text.index(f" is {item.answer.split()[0]}.") / len(text))
        assert all(text.count(value) == 1 for value in item.answer.split())
    first = places[0:30:6]
    assert len({round(place * N_DEPTHS - 0.5) for place in places}) >= 9
    assert max(places) > 0.9
    assert min(first) < 0.1
    assert len({len(item.prompt) // 2000 for item in made}) >= 3
    assert {len(item.answer.split()) for item in made} == {1, 2}


def test_tool_calls_are_json_of_four_tools() -> None:
    calls = [json.loads(item.answer) for item in items("tools", 8)]
    assert len({call["name"] for call in calls}) == 4


@pytest.mark.parametrize(
    ("judge", "answer", "right", "wrong"),
    [
        (Judge.FIRST_NUMBER, "48.25", " 48.25 m, not 3", " 3 or 48.25"),
        (Judge.FIRST_NUMBER, "1234", " 1,234.", " 12345"),
        (Judge.LAST_NUMBER, "-3", " 2 - 5 = -3. Answer: -3", " Answer: 3"),
        (Judge.NUMBERS, "1 2", " 2, 1", " 1, 1"),
        (Judge.NAME, "sort_x", " sort_x(items)", " sort_xy(items)"),
        (Judge.PHRASE, "William Shakespeare", " william shakespeare.", " William"),
        (Judge.PHRASE, "ice", " Ice", " iceland"),
        (Judge.JSON, '{"a": 1}', ' sure: {"a":1} done', ' {"a": 1, "b": 2}'),
        (Judge.JSON, '{"a": 1}', '{"a": 1}', '{"a": 1'),
    ],
)
def test_judges(judge: Judge, answer: str, right: str, wrong: str) -> None:
    item = Item("", answer, judge)
    assert is_right(item, right)
    assert not is_right(item, wrong)


def test_results_pair_the_items_and_leave_out_what_only_one_answered() -> None:
    made = make_items(["recall"], 10, 20, 0)
    right = {index: item.answer for index, item in enumerate(made["recall"])}
    poor = {index: answer if index < 4 else "?" for index, answer in right.items() if index < 9}
    [row] = results(made, {("recall", REFERENCE_PAIR): right, ("recall", Q4): poor})
    assert (row.n, row.n_reference, row.n_candidate, row.n_lost) == (9, 9, 4, 5)
    assert row.measurable
    [blind] = results(made, {("recall", REFERENCE_PAIR): poor, ("recall", Q4): right})
    assert blind.n_won == 5
    hopeless = dict.fromkeys(range(10), "?")
    [none] = results(made, {("recall", REFERENCE_PAIR): hopeless, ("recall", Q4): right})
    assert not none.measurable


def test_tasks_by_name() -> None:
    assert chosen("all") == ALL
    assert chosen("none") == ()
    assert chosen("code,tools,code") == ("code", "tools")
    with pytest.raises(UsageError, match="--tasks poetry: no such task; known are arithmetic"):
        chosen("poetry")


def test_a_chat_puts_the_same_text_into_a_message() -> None:
    made = make_items(["facts"], 1, 0, 0)
    [plain], [chat] = prompts(made, chat=False), prompts(made, chat=True)
    assert chat.prompt.endswith(plain.prompt)
    assert (plain.chat, chat.chat) == (False, True)
