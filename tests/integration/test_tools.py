"""Agents: the official client calls functions of a real daemon."""

import json
from collections.abc import Iterator

import openai
import pytest

from tests.integration.daemons import Daemon

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
ASK = [{"role": "user", "content": "How will it be in Rome this week?"}]
WRITTEN = (
    "<think>\nRome, then.\n</think>\n\nI look.\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Rome", "days": 7}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A daemon whose model writes WRITTEN in pieces of five characters."""
    pieces = [WRITTEN[i : i + 5] for i in range(0, len(WRITTEN), 5)]
    form = {"calls": "hermes", "think": "<think>", "end_think": "</think>"}
    script = json.dumps({"answer": pieces, "form": form})
    with (
        Daemon(
            tmp_path_factory.mktemp("fake"), "--model", "demo", "--ctx", "512",
            module="tests.integration.fake_daemon", FAKE_SCRIPT=script,
        ) as daemon,
        openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client,
    ):  # fmt: skip
        yield client


def test_a_scripted_call_and_its_reasoning(scripted: openai.OpenAI) -> None:
    answer = scripted.chat.completions.create(model="demo", messages=ASK, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra["reasoning_content"] == "Rome, then."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 7}


def test_a_scripted_call_in_a_stream(scripted: openai.OpenAI) -> None:
    with scripted.chat.completions.stream(model="demo", messages=ASK, tools=TOOLS) as stream:
        deltas = [event for event in stream if event.type.startswith("tool_calls.function")]
        message = stream.get_final_completion().choices[0].message
    assert len(deltas) > 3
    assert message.content == "I look."
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 7}


def test_a_real_model_must_call_and_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        max_tokens=200, temperature=0,
    )  # fmt: skip
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    [call] = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert arguments["days"] in range(1, 8)
    assert arguments.keys() == {"city", "days"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    followed = client.chat.completions.create(
        model="demo", messages=[*ASK, message, result], tools=TOOLS, max_tokens=16
    )
    assert followed.usage is not None
    assert followed.usage.prompt_tokens > (answer.usage.prompt_tokens if answer.usage else 0)
