"""What is refused of a request body, and which parameter the refusal names."""

import json

import pytest

from tests.api.scripted import ScriptedService, ask, chat, complete

UNSUPPORTED = [
    ({"best_of": 3}, "best_of"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"grammar": "root ::= x"}, "grammar"),
    ({"guided_json": {}}, "guided_json"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": [{}]}, "functions"),
]


@pytest.mark.parametrize("send", [chat, complete])
@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED)
def test_unsupported_fields(send, fields, param):
    response = send(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize("fields", [{"tools": [{"type": "function"}]}, {"tool_choice": "required"}])
def test_completions_call_nothing(fields):
    error = complete(**fields).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", *fields)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "content[1]"),
        ({"content": [{"type": "input_audio"}]}, "content[0]"),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]},
            "tool_calls[0].type",
        ),
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
    ({"repeat_last_n": -2}, "repeat_last_n"),
    ({"xtc_probability": 1.1}, "xtc_probability"),
    ({"xtc_threshold": 0.51}, "xtc_threshold"),
    ({"dry_multiplier": -1}, "dry_multiplier"),
    ({"dry_base": 0.9}, "dry_base"),
    ({"dry_allowed_length": 0}, "dry_allowed_length"),
    ({"dry_penalty_last_n": "all"}, "dry_penalty_last_n"),
    ({"dry_sequence_breakers": "x"}, "dry_sequence_breakers"),
    ({"dry_sequence_breakers": ["a", ""]}, "dry_sequence_breakers[1]"),
    ({"dry_sequence_breakers": ["a", "\ud800"]}, "dry_sequence_breakers[1]"),
    ({"dry_sequence_breakers": ["a"] * 33}, "dry_sequence_breakers"),
    ({"mirostat": 3}, "mirostat"),
    ({"mirostat_tau": -1}, "mirostat_tau"),
    ({"mirostat_eta": 2}, "mirostat_eta"),
    ({"mirostat": 2, "temperature": 0}, "mirostat"),
    ({"mirostat": 2, "top_k": 40}, "top_k"),
    ({"mirostat": 1, "top_p": 0.9}, "top_p"),
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
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": "2"}, "n"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": "\ud800"}, "cache_salt"),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": 5}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        "response_format.json_schema.strict",
    ),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex"),
    ({"response_format": {"type": "lark", "lark": "\ud800"}}, "response_format.lark"),
    ({"response_format": {"type": "lark", "lark": "x" * 262145}}, "response_format.lark"),
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
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
    ],
)
def test_invalid_completions(fields, param):
    response = complete(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_chat_has_no_echo():
    error = chat(echo=True).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "echo")


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
    chat(service, **json.loads('{"n": 0}'))
    assert service.specs == []
