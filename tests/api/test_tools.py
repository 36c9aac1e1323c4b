"""Function calling and reasoning over HTTP."""

import json
from dataclasses import replace

import pytest

from kvserve.dialects.form import Form
from kvserve.ipc.messages import ToolCall
from kvserve.supervisor.admission import Text
from tests.api.scripted import SERVED, ScriptedService, ask, chat, done, events
from tests.dialects.answers import HERMES, MISTRAL

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
WRITTEN = (
    "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def service_that_writes(text: str, form: Form = HERMES, reason: str = "stop") -> ScriptedService:
    def script(ticket, _spec) -> None:
        ticket.put(replace(SERVED, form=form))
        for char in text:
            ticket.put(Text(char, (1,)))
        ticket.put(done(reason))

    return ScriptedService(script)


def test_calls_and_reasoning_of_a_whole_answer() -> None:
    choice = chat(service_that_writes(WRITTEN), tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "I look.")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Paris"}'},
        {"name": "weather", "arguments": '{"city": "Rome"}'},
    ]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len({*ids}) == 2
    assert all(i.startswith("call_") for i in ids)


def test_calls_and_reasoning_of_a_stream() -> None:
    told = events(chat(service_that_writes(WRITTEN), tools=TOOLS, stream=True))
    assert told.pop() == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index, city in enumerate(("Paris", "Rome")):
        first, *rest = [call for call in calls if call["index"] == index]
        assert first["function"] == {"name": "weather", "arguments": ""}
        assert first["type"] == "function"
        assert first["id"]
        assert len(rest) > 5
        assert all(call.keys() == {"index", "function"} for call in rest)
        text = "".join(call["function"]["arguments"] for call in rest)
        assert json.loads(text) == {"city": city}
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_of_calls_alone_has_no_content() -> None:
    written = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    message = chat(service_that_writes(written), tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] is None
    assert "reasoning_content" not in message


def test_an_answer_that_is_cut_off_keeps_its_reason() -> None:
    service = service_that_writes('<tool_call>{"name": "weather", "arguments": {', reason="length")
    choice = chat(service, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == "{"


def test_mistral_ids_are_what_its_templates_take() -> None:
    service = service_that_writes("[TOOL_CALLS]weather[ARGS]{}", MISTRAL)
    [call] = chat(service, tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


def test_without_tools_calls_are_text() -> None:
    message = chat(service_that_writes("a <tool_call>b")).json()["choices"][0]["message"]
    assert message["content"] == "a <tool_call>b"
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    ("setting", "field", "kept"),
    [
        ("auto", None, False),
        ("auto", "none", True),
        ("none", None, True),
        ("none", "auto", False),
        ("none", "deepseek", False),
        ("deepseek", None, False),
    ],
)
def test_reasoning_can_be_left_in_place(setting: str, field: str | None, kept: bool) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "reasoning_format": field}
    service, path = service_that_writes("<think>a</think>b"), "/v1/chat/completions"
    config = {"reasoning_format": setting}
    message = ask("POST", path, service=service, config=config, json=body).json()
    message = message["choices"][0]["message"]
    assert message["content"] == ("<think>a</think>b" if kept else "b")
    assert message.get("reasoning_content") == (None if kept else "a")


def prompt_of(**fields):
    service = ScriptedService()
    response = chat(service, **fields)
    assert response.status_code == 200, response.text
    return service.specs[0].prompt


def test_what_the_worker_is_told_of_tools() -> None:
    tools = prompt_of(tools=[*TOOLS, {"type": "function", "function": {"name": "now"}}]).tools
    empty = {"type": "object", "properties": {}}
    now = {"name": "now", "description": "", "parameters": empty}
    assert [one["function"] for one in json.loads(tools.text)] == [FUNCTION, now]
    assert (tools.required, tools.only, tools.parallel, tools.strict) == (False, None, True, False)


def test_choices() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    assert prompt_of(tools=TOOLS, tool_choice="none").tools is None
    assert prompt_of(tools=TOOLS, tool_choice="required").tools.required
    only = prompt_of(tools=TOOLS, tool_choice=named, parallel_tool_calls=False).tools
    assert (only.required, only.only, only.parallel) == (True, "weather", False)
    strict = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
    assert prompt_of(tools=strict).tools.strict


def test_calls_and_results_in_messages() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = prompt_of(
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "b"},
            {"role": "tool", "content": "c", "tool_call_id": "c1"},
        ],
        tools=TOOLS,
    ).messages
    assert messages[1].tool_calls == (ToolCall("c1", "weather", "{}"),)
    assert messages[1].reasoning == "b"
    assert messages[2].tool_call_id == "c1"


def test_a_schema_for_the_answer_goes_with_tools() -> None:
    service = ScriptedService()
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    assert chat(service, tools=TOOLS, response_format=wanted).status_code == 200
    assert (
        chat(service, tools=TOOLS, response_format=wanted, tool_choice="required").status_code
        == 200
    )
    assert [spec.grammar is None for spec in service.specs] == [False, True]
    error = chat(tools=TOOLS, response_format={"type": "regex", "regex": "a"}).json()["error"]
    assert error["param"] == "response_format.type"


def function(**fields) -> dict:
    return {"tools": [{"type": "function", "function": {**FUNCTION, **fields}}]}


ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": TOOLS * 2}, "tools[1].function.name"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [*TOOLS, {"type": "function", "function": {}}]}, "tools[1].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(description=1), "tools[0].function.description"),
        (function(parameters=[]), "tools[0].function.parameters"),
        (function(strict=1), "tools[0].function.strict"),
        (function(parameters={"a": 2**70}), "tools"),
        (function(parameters={"a": "\ud800"}), "tools"),
        (function(parameters={"a": "x" * 2**20}), "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"reasoning_format": "x"}, "reasoning_format"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
         "messages[0].tool_calls[0]"),
        ({"messages": [{**ASSISTANT, "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{**ASSISTANT, "tool_calls": [{"function": {"name": ""}}]}]},
         "messages[0].tool_calls[0].function.name"),
        ({"messages": [{**ASSISTANT, "tool_calls": [{"function": {"name": "a", "arguments": 1}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict, param: str) -> None:
    response = chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
