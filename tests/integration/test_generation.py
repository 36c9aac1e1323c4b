"""What the OpenAI API can ask of a generation: the official client and the real small model."""

import json
import math
import re

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

TEXT = "The capital of France is"
CHAT = [{"role": "user", "content": "Describe a person."}]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


# Three tokens far ahead of all others: a real draw at each step, which no rounding can change.
COIN = {"temperature": 5.0, "logit_bias": {"500": 100, "600": 100, "700": 100}, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture
def chat(client: openai.OpenAI, model: str):
    def ask(**fields):
        usual = {"model": model, "messages": CHAT, "max_tokens": 16, "temperature": 0}
        return client.chat.completions.create(**(usual | fields))

    return ask


@pytest.fixture
def complete(client: openai.OpenAI, model: str):
    def ask(**fields):
        usual = {"model": model, "prompt": TEXT, "max_tokens": 16, "temperature": 0}
        return client.completions.create(**(usual | fields))

    return ask


def test_likelihoods_of_a_chat(chat) -> None:
    choice = chat(logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == choice.message.content
    for one in content:
        assert one.logprob == max(top.logprob for top in one.top_logprobs) <= 0
        assert len({top.token for top in one.top_logprobs}) == 3
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1.001


def test_likelihoods_of_a_stream_are_those_of_the_answer(chat) -> None:
    whole = chat(logprobs=True, top_logprobs=2).choices[0]
    text, content = "", []
    for chunk in chat(logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            content += choice.logprobs.content if choice.logprobs else []
    assert text == whole.message.content
    assert [one.token for one in content] == [one.token for one in whole.logprobs.content]


def test_parts_of_characters_have_their_bytes(complete, chat) -> None:
    """A snowman and a llama are more tokens than one."""
    pattern = {"type": "regex", "regex": "☃🦙‍x"}
    choice = chat(logprobs=True, response_format=pattern).choices[0]
    assert choice.message.content == "☃🦙‍x"
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == "☃🦙‍x"
    legacy = complete(logprobs=1, extra_body={"response_format": pattern}).choices[0]
    assert legacy.text == "☃🦙‍x"
    assert len(legacy.logprobs.tokens) >= len(content)
    assert legacy.logprobs.text_offset == sorted(legacy.logprobs.text_offset)


def test_a_schema_is_followed_to_the_letter(client, model) -> None:
    for temperature in (0, 1.5):
        answer = client.chat.completions.parse(
            model=model,
            messages=CHAT,
            response_format=Person,
            temperature=temperature,
            seed=1,
            max_completion_tokens=250,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_object(chat) -> None:
    choice = chat(response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_expressions_and_grammars(chat) -> None:
    choice = chat(response_format={"type": "regex", "regex": r"[0-9]{4}-[0-9]{2}"}).choices[0]
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", choice.message.content)
    assert choice.finish_reason == "stop"
    lark = {"type": "lark", "lark": 'start: "left" | "right"'}
    assert chat(response_format=lark).choices[0].message.content in ("left", "right")


def test_a_bad_grammar_names_its_field(chat) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(response_format={"type": "regex", "regex": "[a-z"})
    assert caught.value.param == "response_format.regex"


def test_choices(chat, complete) -> None:
    drawn = COIN | {"seed": 5, "n": 3}
    answer = chat(**drawn)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == chat().usage.prompt_tokens
    # Quantized weights round otherwise in other company, and a coin's draw may turn on that: the
    # text of a seed is compared in tests/worker/test_seeds.py, with f32 weights.
    sure = {"n": 3, "temperature": 0.0, "response_format": {"type": "regex", "regex": "one two"}}
    streamed = {}
    for chunk in chat(**sure, stream=True):
        for choice in chunk.choices:
            text = choice.delta.content or ""
            streamed[choice.index] = streamed.get(choice.index, "") + text
    assert streamed == dict.fromkeys(range(3), "one two")
    assert [c.index for c in complete(prompt=[TEXT, "One"], n=2).choices] == [0, 1, 2, 3]


def test_an_echo_scores_as_lm_eval_asks_for_it(complete) -> None:
    """Token ids with `echo` and one token to generate, which the caller then drops."""
    prompt = complete(echo=True, logprobs=1, max_tokens=0)
    logprobs = prompt.choices[0].logprobs
    assert prompt.choices[0].text == TEXT == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    assert all(one < 0 for one in logprobs.token_logprobs[1:])
    assert prompt.usage.completion_tokens == 0
    longer = complete(echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert len(longer.tokens) == len(logprobs.tokens) + 1
    ids = complete(prompt=[[2, 818, 5279], [2, 818]], echo=True, logprobs=1, max_tokens=1)
    for choice, n in zip(ids.choices, (3, 2), strict=True):
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == n + 1
        for one, top in zip(
            choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True
        ):
            assert one <= max(top.values())
    assert choice.logprobs.token_logprobs[-1] == max(choice.logprobs.top_logprobs[-1].values())


def test_cached_tokens_are_told_and_salts_part_them(complete) -> None:
    prompt = [2, *range(1000, 1060)]

    def cached(tail: int, salt: str) -> int:
        body = {"cache_salt": salt, "ignore_eos": True}
        answer = complete(prompt=[*prompt, tail], extra_body=body, max_tokens=2)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached(5, "a"), cached(6, "a"), cached(7, "b")] == [0, 61, 0]


def test_limits(complete) -> None:
    body = {"ignore_eos": True, "min_tokens": 4}
    answer = complete(max_tokens=6, stop=["zzz"], extra_body=body)
    assert answer.usage.completion_tokens == 6
    with pytest.raises(openai.BadRequestError) as caught:
        complete(max_tokens=2, extra_body=body)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    "sampling",
    [
        {"typical_p": 0.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.1},
        {"dry_multiplier": 0.8, "dry_sequence_breakers": ["\n"]},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 3.0},
        {"min_p": 0.1, "top_k": 0, "repeat_penalty": 1.1, "repeat_last_n": -1},
    ],
    ids=str,
)
def test_ways_to_sample(complete, sampling) -> None:
    body = {"ignore_eos": True, **sampling}
    answer = complete(temperature=0.8, seed=3, max_tokens=8, extra_body=body)
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].text


def test_dry_ends_a_loop(complete) -> None:
    prompt = "red green blue\n" * 12
    looping = complete(prompt=prompt, max_tokens=24).choices[0].text
    assert "red green blue\nred green blue" in looping
    body = {"dry_multiplier": 5.0, "dry_sequence_breakers": []}
    assert (
        "red green blue\nred"
        not in complete(prompt=prompt, max_tokens=24, extra_body=body).choices[0].text
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_is_not_possible_is_refused(chat, fields, param) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
