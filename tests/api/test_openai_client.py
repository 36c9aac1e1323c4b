"""The official OpenAI client against a real server."""

from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest

from kvserve.errors import ContextLengthExceeded, NotReady, Overloaded, WorkerFailed
from tests.api.scripted import (
    CONFIG,
    Live,
    ScriptedService,
    answers,
    begins,
    live_server,
    refuses,
)

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live_server(ScriptedService(), replace(CONFIG, api_keys=("key-1", "key-2"))) as live:
        yield live


@pytest.fixture
def service(server: Live) -> ScriptedService:
    server.service.script = answers("Hello", " world")
    return server.service


@pytest.fixture
def client(server: Live, service: ScriptedService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-2", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="default", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.system_fingerprint == "fp_1"


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="llama-3-8b",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 9


def test_chat_stream_helper(client):
    with client.chat.completions.stream(model="default", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hello world"


def test_completion(client, service):
    answer = client.completions.create(model="default", prompt=["a", [1, 2]], seed=-1, stop="\n")
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
    assert answer.usage.completion_tokens == 4


def test_completion_stream(client):
    stream = client.completions.create(model="default", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world"


def test_raw_headers(client):
    raw = client.chat.completions.with_raw_response.create(
        model="default", messages=MESSAGES, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["llama-3-8b"]
    assert client.models.retrieve("default").max_model_len == 32768


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ContextLengthExceeded("too long", param="messages"), openai.BadRequestError),
        (Overloaded("full", retry_after=1), openai.RateLimitError),
        (NotReady("loading", retry_after=1), openai.InternalServerError),
    ],
)
def test_refusals_have_their_status_in_a_stream_too(client, service, error, raised, stream):
    service.script = refuses(error)
    with pytest.raises(raised) as caught:
        client.chat.completions.create(model="default", messages=MESSAGES, stream=stream)
    assert caught.value.code == error.code
    assert caught.value.param == error.param
    assert error.message in str(caught.value)


def test_a_failure_after_text_ends_the_stream(client, service):
    service.script = begins("Hel", error=WorkerFailed("the worker died"))
    stream = client.completions.create(model="default", prompt="a", stream=True)
    assert next(stream).choices[0].text == "Hel"
    with pytest.raises(openai.APIError, match="the worker died"):
        next(stream)


@pytest.mark.parametrize(
    ("wrong", "raised"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
    ],
)
def test_bad_requests(client, wrong, raised):
    with pytest.raises(raised):
        client.chat.completions.create(**{"model": "default", "messages": MESSAGES, **wrong})


def test_a_wrong_key(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
