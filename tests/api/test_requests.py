"""What a request body becomes, and what is refused with which parameter named."""

import json

import pytest

from kvserve.ipc.messages import ChatMessage, ChatPrompt, Sampling, TextPrompt, TokenPrompt
from tests.api.scripted import ScriptedService, ask, chat, complete


def spec_of(send, **fields):
    service = ScriptedService()
    response = send(service, **fields)
    assert response.status_code == 200, response.text
    (spec,) = service.specs
    return spec


def sampling_of(**fields):
    return spec_of(chat, **fields).sampling


def messages_of(*messages):
    return spec_of(chat, messages=list(messages)).prompt.messages


def test_defaults():
    spec = spec_of(chat)
    assert spec.prompt == ChatPrompt(messages=(ChatMessage("user", "hi"),))
    assert spec.sampling == Sampling()
    assert (spec.max_tokens, spec.min_tokens, spec.stop, spec.ignore_eos) == (None, 0, (), False)


def test_null_is_the_default():
    names = (
        "model temperature top_p top_k min_p typical_p repeat_penalty repetition_penalty seed "
        "presence_penalty frequency_penalty logit_bias max_tokens max_completion_tokens stop "
        "min_tokens ignore_eos stream stream_options n best_of echo suffix logprobs top_logprobs "
        "response_format tools tool_choice functions kvserve chat_template_kwargs audio"
    )
    assert spec_of(chat, **dict.fromkeys(names.split())) == spec_of(chat)


def test_all_sampling_fields():
    fields = {
        "temperature": 5,
        "top_k": 12,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "seed": 17,
    }
    expected = Sampling(**fields, logit_bias={0: -100.0, 128255: 3.5})
    assert sampling_of(**fields, logit_bias={"0": -100, "128255": 3.5}) == expected


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"repetition_penalty": 1.2}, "repeat_penalty", 1.2),
        ({"repetition_penalty": 1.2, "repeat_penalty": 1.3}, "repeat_penalty", 1.3),
        ({"repetition_penalty": 1.2, "repeat_penalty": None}, "repeat_penalty", 1.2),
        ({"seed": -1}, "seed", 2**32 - 1),
        ({"seed": 2**80 + 5}, "seed", 5),
        ({"temperature": 0}, "temperature", 0),
    ],
)
def test_sampling_spellings(fields, name, value):
    assert getattr(sampling_of(**fields), name) == value


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_the_newer_token_limit_wins(fields, max_tokens):
    assert spec_of(chat, **fields).max_tokens == max_tokens


@pytest.mark.parametrize("stop", ["END", ["END"], ["END", "x" * 512], [str(i) for i in range(16)]])
def test_stops(stop):
    assert spec_of(chat, stop=stop).stop == ((stop,) if isinstance(stop, str) else tuple(stop))


def test_limits_of_the_engine():
    spec = spec_of(complete, min_tokens=3, max_tokens=3, ignore_eos=True, stop=[])
    assert (spec.min_tokens, spec.max_tokens, spec.ignore_eos, spec.stop) == (3, 3, True, ())


def test_roles_and_content():
    assert messages_of(
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
        {"role": "user", "content": "", "name": "bob"},
    ) == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "a\nb"),
        ChatMessage("assistant", ""),
        ChatMessage("assistant", "no"),
        ChatMessage("tool", "42"),
        ChatMessage("user", "", "bob"),
    )


def test_template_kwargs_and_continuation():
    prompt = spec_of(
        chat,
        messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "low"},
        continue_final_message=True,
    ).prompt
    assert prompt.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert prompt.continue_final


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt("a")]),
        (["a"], [TextPrompt("a")]),
        ([1, 2], [TokenPrompt((1, 2))]),
        ([[1, 2]], [TokenPrompt((1, 2))]),
        (["a", [0]], [TextPrompt("a"), TokenPrompt((0,))]),
        (["x"] * 64, [TextPrompt("x")] * 64),
    ],
)
def test_prompts(prompt, expected):
    service = ScriptedService()
    assert complete(service, prompt=prompt).status_code == 200
    assert [spec.prompt for spec in service.specs] == expected


IGNORED = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "modalities": ["text"],
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "prediction": None,
    "brand_new_field": [{"deep": [None]}],
    "model_extra": 1,
    "model_config": {},
}


@pytest.mark.parametrize("name", IGNORED)
def test_harmless_fields_are_accepted(name):
    assert spec_of(chat, **{name: IGNORED[name]}) == spec_of(chat)


def test_tools_are_harmless_where_none_may_be_called():
    assert spec_of(chat, tools=[{"type": "function"}], tool_choice="none") == spec_of(chat)


@pytest.mark.parametrize("name", ["llama-3-8b", "default", "Meta-Llama-3-8B.Q4_K_M"])
def test_names_of_the_model(name):
    assert spec_of(complete, model=name)


def test_kvserve_options():
    options = {"ctx": 32768, "task": "code"}
    assert spec_of(chat, kvserve=options).min_ctx == 32768
    assert spec_of(chat, kvserve={}) == spec_of(chat)
    assert spec_of(chat).min_ctx == 0


def test_a_context_above_the_models_names_the_models():
    error = chat(kvserve={"ctx": 131073}).json()["error"]
    assert error["param"] == "kvserve.ctx"
    assert "the model was trained for 131072 tokens" in error["message"]


UNSUPPORTED = [
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"grammar": "root ::= x"}, "grammar"),
    ({"guided_json": {}}, "guided_json"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
]


@pytest.mark.parametrize("send", [chat, complete])
@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED)
def test_unsupported_fields(send, fields, param):
    response = send(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "content[1]"),
        ({"content": [{"type": "input_audio"}]}, "content[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls"),
    ],
)
def test_unsupported_messages(message, param):
    messages = [{"role": "user", "content": "x"}, {"role": "user", **message}]
    error = chat(messages=messages).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", f"messages[1].{param}")


INVALID = [
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 5.1}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 513}, "stop"),
    ({"stop": 1}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "\ud800"}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"model": 3}, "model"),
    ({"kvserve": {"ctx": 0}}, "kvserve.ctx"),
    ({"kvserve": {"ctx": "8192"}}, "kvserve.ctx"),
    ({"kvserve": {"task": "cooking"}}, "kvserve.task"),
    ({"kvserve": {"context": 1}}, "kvserve.context"),
]


@pytest.mark.parametrize("send", [chat, complete])
@pytest.mark.parametrize(("fields", "param"), INVALID)
def test_invalid_fields(send, fields, param):
    response = send(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert error["param"] == param


INVALID_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"thinking": None}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"thinking": {}}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"thinking": 2**63}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"thinking": "x" * 65}}, "chat_template_kwargs.thinking"),
    ({"chat_template_kwargs": {"thinking": "\ud800"}}, "chat_template_kwargs.thinking"),
    ({"continue_final_message": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("fields", "param"), INVALID_CHATS)
def test_invalid_chats(fields, param):
    response = chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ([], "prompt"),
        (5, "prompt"),
        ({}, "prompt"),
        ([[]], "prompt[0]"),
        ([1, "a"], "prompt"),
        ([1, True], "prompt"),
        ([-1], "prompt"),
        ([2**31], "prompt"),
        (["a", 1], "prompt[1]"),
        (["a", ["b"]], "prompt[1]"),
        (["a"] * 65, "prompt"),
        (["a", "\ud800"], "prompt[1]"),
    ],
)
def test_invalid_prompts(prompt, param):
    response = complete(prompt=prompt)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed", "logit_bias.1"])
def test_numbers_that_are_none(name, number):
    body = f'{{"prompt":"x","{name}":{number}}}'
    if name == "logit_bias.1":
        body = f'{{"prompt":"x","logit_bias":{{"1":{number}}}}}'
    headers = {"content-type": "application/json"}
    response = ask("POST", "/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_an_unknown_model():
    response = chat(model="gpt-4o")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "llama-3-8b" in error["message"]


def test_nothing_is_submitted_for_a_bad_request():
    service = ScriptedService()
    complete(service, prompt=["a", 1])
    chat(service, model="gpt-4o")
    chat(service, **json.loads('{"n": 2}'))
    assert service.specs == []
