"""Answers read whole and in pieces, and garbage."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.dialects.form import MARKERS, Form
from kvserve.dialects.parts import Arguments, CallBegun, Content, Part, Reasoning
from kvserve.dialects.reader import Reader
from tests.dialects.answers import CASES, FORMS, FUNCTIONS, HARMONY, HERMES, Case


@dataclass
class Answer:
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        calls = "".join(f"{name}\n{arguments}\n" for name, arguments in self.calls)
        return f"{self.reasoning}\n{self.content}\n{calls}"


def put_together(parts: Iterable[Part]) -> Answer:
    answer = Answer()
    for part in parts:
        match part:
            case Content(text):
                answer.content += text
            case Reasoning(text):
                answer.reasoning += text
            case CallBegun(name):
                answer.calls.append((name, ""))
            case Arguments(text):
                name, arguments = answer.calls[-1]
                answer.calls[-1] = (name, arguments + text)
    return answer


def read(form: Form, pieces: Sequence[str], *, calls: bool = True, keeps: bool = False) -> Answer:
    reader = Reader(form, FUNCTIONS if calls else None, keeps_reasoning=keeps)
    parts = [part for piece in pieces for part in reader.push(piece)]
    return put_together([*parts, *reader.finish()])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_what_models_write(case: Case, size: int) -> None:
    text = case.written
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    answer = read(case.form, pieces)
    assert answer.reasoning == case.reasoning
    assert answer.content == case.content
    assert [(name, json.loads(args)) for name, args in answer.calls] == list(case.calls)


@pytest.mark.parametrize("name", ["hermes", "qwen xml", "deepseek v3.1", "gpt-oss", "mistral"])
def test_arguments_come_as_they_are_written(name: str) -> None:
    case = CASES[name]
    reader = Reader(case.form, FUNCTIONS)
    parts = [part for char in case.written for part in reader.push(char)]
    begun = parts.index(CallBegun("weather"))
    assert len([part for part in parts[begun:] if isinstance(part, Arguments)]) > 10


def test_without_functions_calls_are_text() -> None:
    answer = read(HERMES, ['<think>a</think>b <tool_call>{"name": "now"}</tool_call>'], calls=False)
    assert (answer.reasoning, answer.content) == ("a", 'b <tool_call>{"name": "now"}</tool_call>')


@pytest.mark.parametrize("written", ["<think>\na\n</think>\n\nb", "a</think>", " b\n", "<think>a"])
def test_reasoning_can_be_left_in_place(written: str) -> None:
    assert read(HERMES, [written], calls=False, keeps=True).content == written


def test_channels_can_be_left_in_place() -> None:
    written = "<|channel|>analysis<|message|>a<|end|>"
    answer = read(HARMONY, [f"{written}<|start|>assistant<|channel|>final<|message|>b"], keeps=True)
    assert (answer.reasoning, answer.content) == ("", f"{written}b")


WORDS = [f"S{n}S" for n in range(12)]
SYNTAX = [
    *MARKERS,
    *("<|call|>", "<function=", "weather>", "</function>", "<parameter=", "city>", "</parameter>"),
    *('{"name": "weather", "arguments": {', '{"city": "', '"', "}", "}}", "{", "[", "]", ";", "\\"),
    *("weather", "now", "call:weather{", "```json\n", "```", "\n", " ", "function", ">", ",", ":"),
    *(
        "analysis",
        "commentary",
        "final",
        " to=functions.now",
        "assistant",
        "<",
        "[TOOL_",
        "é",
        "🙂",
    ),
]


@st.composite
def garbage(draw: st.DrawFn) -> str:
    words = iter(WORDS)
    pieces = draw(st.lists(st.sampled_from([*SYNTAX, None, None, None]), max_size=24))
    return "".join(next(words, "") if piece is None else piece for piece in pieces)


forms = st.sampled_from([*FORMS, Form("hermes", "<think>", "</think>", thinking=True)])
written = garbage() | st.sampled_from([case.written for case in CASES.values()])
switches = st.booleans()


@settings(max_examples=300, deadline=None)
@given(forms, written, st.data(), switches, switches)
def test_how_the_text_is_cut_changes_nothing(form, text, data, calls, keeps) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = read(form, [text], calls=calls, keeps=keeps)
    assert read(form, pieces, calls=calls, keeps=keeps) == whole
    assert read(form, list(text), calls=calls, keeps=keeps) == whole


@settings(max_examples=300, deadline=None)
@given(forms, garbage(), switches, switches)
def test_no_word_is_lost_or_told_twice(form, text, calls, keeps) -> None:
    told = read(form, [text], calls=calls, keeps=keeps).text
    assert sorted(re.findall(r"S\d+S", told)) == sorted(re.findall(r"S\d+S", text))


@settings(max_examples=200, deadline=None)
@given(forms, st.text(), switches)
def test_text_without_marks_stays_as_it_is(form, text, calls) -> None:
    if form.thinking or any(mark in text for mark in ("<", "[", "{", "to=")):
        return
    assert read(form, [text], calls=calls).content == text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.calls)
@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"a":' * 5_000, "<tool_call>" * 2_000, "\\" * 9_999]
)
def test_deep_nesting_is_text(form: Form, text: str) -> None:
    for opening in ("", "<tool_call>", "[TOOL_CALLS]", "<start_function_call>call:a{"):
        read(form, [opening + text])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (Form("hermes"), '<tool_call>{"arguments": {"a": "\\ud83d"}, "name": "f"}</tool_call>'),
        (Form("hermes"), '<tool_call>{"arguments": {}, "name": "f\\ud83d"}</tool_call>'),
        (Form("hermes"), '<tool_call>{"name": "f", "arguments": "\\ud83d"}</tool_call>'),
        (
            Form("glm"),
            '<tool_call>f<arg_key>a</arg_key><arg_value>["\\ud83d"]</arg_value></tool_call>',
        ),
    ],
)
def test_half_a_surrogate_pair_in_an_escape_can_be_sent(form: Form, text: str) -> None:
    [(name, arguments)] = read(form, [text]).calls
    (name + arguments).encode()
    assert name.startswith("f")


def test_a_schema_of_alternatives_within_alternatives_is_bounded() -> None:
    schema: object = {"type": "string"}
    for _ in range(2000):
        schema = {"anyOf": [schema]}
    reader = Reader(Form("qwen_xml"), {"f": {"type": "object", "properties": {"a": schema}}})
    assert reader.push("Hi.") == [Content("Hi.")]
