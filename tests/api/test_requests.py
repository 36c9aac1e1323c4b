"""What a request body becomes."""

import json

import pytest

from kvserve.core.plan import Task
from kvserve.ipc.messages import (
    ChatMessage,
    ChatPrompt,
    Grammar,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from tests.api.scripted import ScriptedService, chat, complete


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
        "repeat_last_n": -1,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "dry_multiplier": 0.8,
        "dry_base": 2,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": 512,
        "seed": 17,
    }
    breakers = ["\n", "é"]
    expected = Sampling(
        **fields, dry_sequence_breakers=tuple(breakers), logit_bias={0: -100.0, 128255: 3.5}
    )
    body = {"dry_sequence_breakers": breakers, "logit_bias": {"0": -100, "128255": 3.5}}
    assert sampling_of(**fields, **body) == expected


def test_mirostat():
    fields = {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2}
    assert sampling_of(**fields) == Sampling(**fields)
    assert sampling_of(mirostat=0, top_k=5, temperature=0) == Sampling(temperature=0, top_k=5)


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
        ChatMessage("tool", "42", tool_call_id="x"),
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


@pytest.mark.parametrize(
    ("send", "fields", "n_logprobs"),
    [
        (chat, {}, None),
        (chat, {"logprobs": False}, None),
        (chat, {"logprobs": True}, 0),
        (chat, {"logprobs": True, "top_logprobs": 20}, 20),
        (complete, {}, None),
        (complete, {"logprobs": 0}, 0),
        (complete, {"logprobs": 5}, 5),
    ],
)
def test_how_many_likelihoods(send, fields, n_logprobs):
    assert spec_of(send, **fields).n_logprobs == n_logprobs


def test_echo_may_go_without_an_answer():
    spec = spec_of(complete, echo=True, max_tokens=0)
    assert (spec.echo, spec.max_tokens) == (True, 0)
    assert not spec_of(complete).echo


def test_a_salt():
    assert spec_of(complete, cache_salt="tenant").cache_salt == "tenant"
    assert spec_of(complete).cache_salt == ""


SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("value", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "regex", "regex": "[a-z]+"}, Grammar("regex", "[a-z]+")),
        ({"type": "lark", "lark": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        *(
            (
                {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": strict},
                },
                Grammar("json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
            )
            for strict in (True, False, None)
        ),
    ],
)
@pytest.mark.parametrize("send", [chat, complete])
def test_response_formats(send, value, grammar):
    assert spec_of(send, response_format=value).grammar == grammar


@pytest.mark.parametrize(
    ("seed", "seeds"), [(None, [None] * 3), (7, [7, 8, 9]), (2**32 - 1, [2**32 - 1, 0, 1])]
)
def test_choices_have_seeds_of_their_own(seed, seeds):
    service = ScriptedService()
    assert chat(service, n=3, seed=seed).status_code == 200
    assert [spec.sampling.seed for spec in service.specs] == seeds


def test_the_choices_of_each_prompt_follow_each_other():
    service = ScriptedService()
    assert complete(service, prompt=["a", "b"], n=2, best_of=2).status_code == 200
    assert [spec.prompt.text for spec in service.specs] == ["a", "a", "b", "b"]


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
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert spec_of(chat, tools=tools, tool_choice="none") == spec_of(chat)


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


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, None),
        ({"model": "default"}, None),
        ({"model": "default:math"}, Task.MATH),
        ({"kvserve": {"task": "rag"}}, Task.RAG),
        ({"model": "default:math", "kvserve": {"task": "chat"}}, Task.CHAT),
    ],
)
def test_a_task_is_named_by_field_or_by_model(fields, task) -> None:
    assert spec_of(chat, **fields).task is task


def test_each_choice_has_a_seed_of_its_own():
    service = ScriptedService()
    assert chat(service, n=3, seed=2**32 - 1).status_code == 200
    assert [spec.sampling.seed for spec in service.specs] == [2**32 - 1, 0, 1]
