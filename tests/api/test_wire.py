"""OpenAI's wire format, byte for byte where clients depend on it."""

import json

import pytest

from kvserve.errors import WorkerFailed
from kvserve.supervisor.admission import Done, Served, Text
from tests.api.scripted import (
    NOW,
    SERVED,
    ScriptedService,
    answers,
    ask,
    begins,
    chat,
    complete,
    done,
    events,
)

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def test_chat_whole():
    response = chat(ScriptedService(answers("Hello", " world", reason="length")))
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "created": int(NOW),
        "model": "llama-3-8b",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": USAGE,
    }


def test_completion_whole():
    body = complete().json()
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": int(NOW),
        "model": "llama-3-8b",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def test_chat_stream():
    response = chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, end = events(response)
    assert end == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    head = {key: chunks[0][key] for key in chunks[0] if key != "choices"}
    assert head == {
        "id": chunks[0]["id"],
        "object": "chat.completion.chunk",
        "created": int(NOW),
        "model": "llama-3-8b",
        "system_fingerprint": "fp_1",
    }
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": "", "refusal": None}, None),
            ({"content": "Hello"}, None),
            ({"content": " world"}, None),
            ({}, "stop"),
        ]
    ]


def test_completion_stream():
    *chunks, end = events(complete(stream=True))
    assert end == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        for text, reason in [("Hello", None), (" world", None), ("", "stop")]
    ]


@pytest.mark.parametrize("send", [chat, complete])
def test_include_usage_adds_a_last_chunk_and_null_before_it(send):
    *chunks, end = events(send(stream=True, stream_options={"include_usage": True}))
    assert end == "[DONE]"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_no_usage_in_a_stream_unless_asked(options):
    assert "usage" not in chat(stream=True, stream_options=options).text


def test_empty_text_makes_no_chunk():
    *chunks, _ = events(complete(ScriptedService(answers("", "a", "")), stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", ""]


@pytest.mark.parametrize(
    "text", ['"\\\n\r\n\n', "\u2028\u2029\x85\x0b\x0c\x00", "né 漢字 🦙", "data: x"]
)
@pytest.mark.parametrize("send", [chat, complete])
def test_any_text_survives_both_ways(send, text):
    whole = send(ScriptedService(answers(text))).json()["choices"][0]
    assert text == (whole["text"] if "text" in whole else whole["message"]["content"])
    response = send(ScriptedService(answers(text)), stream=True)
    response.content.decode("ascii")
    choices = [chunk["choices"][0] for chunk in events(response)[:-1]]
    streamed = [c.get("text") or c.get("delta", {}).get("content") or "" for c in choices]
    assert "".join(streamed) == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("send", [chat, complete])
def test_headers_of_an_answer(send, stream):
    headers = send(stream=stream).headers
    assert headers["x-kvserve-ctx"] == "32768"
    assert headers["x-kvserve-cache-type"] == "q8_0:q8_0"
    assert headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("offered", "echoed"),
    [("trace-1.2:3_4", True), ("", False), ("a b", False), ("x" * 129, False), ("ä", False)],
)
def test_a_sane_request_id_is_echoed(offered, echoed):
    headers = {"x-request-id": offered.encode()}
    response = ask("GET", "/v1/models", headers=headers)
    assert (response.headers["x-request-id"] == offered) is echoed


def test_several_prompts_are_indexed_choices():
    service = ScriptedService(lambda ticket, spec: answers(spec.prompt.text)(ticket, spec))
    body = complete(service, prompt=["one", "two", "three"]).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "one"),
        (1, "two"),
        (2, "three"),
    ]
    assert body["usage"]["prompt_tokens"] == 21
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 9}


def test_several_prompts_stream_as_they_come():
    waiting = []

    def script(ticket, spec):
        waiting.append(ticket)
        if len(waiting) == 2:
            first, second = waiting
            for event in (SERVED, Text("b", (1,)), done()):
                second.put(event)
            for event in (SERVED, Text("a", (1,)), done("length")):
                first.put(event)

    options = {"include_usage": True}
    *chunks, usage, end = events(
        complete(ScriptedService(script), prompt=["x", "y"], stream=True, stream_options=options)
    )
    assert end == "[DONE]"
    assert usage["usage"]["total_tokens"] == 18
    by_index = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append((choice["text"], choice["finish_reason"]))
    assert by_index == {0: [("a", None), ("", "length")], 1: [("b", None), ("", "stop")]}


def test_a_failing_prompt_fails_the_whole_answer_and_gives_up_the_others():
    def script(ticket, spec):
        if spec.prompt.text == "bad":
            ticket.put(WorkerFailed("died"))
        else:
            begins("x")(ticket, spec)

    service = ScriptedService(script)
    response = complete(service, prompt=["good", "bad", "good"])
    assert response.status_code == 503
    assert service.gave_up == [2, 0]


def test_each_choice_has_the_fingerprint_of_the_worker_that_serves_it():
    def script(ticket, spec):
        ticket.put(Served(1, 4096, "f16:f16", f"fp_{spec.prompt.text}"))
        ticket.put(Done("stop", 1, 0, 0, None))

    chunks = events(complete(ScriptedService(script), prompt=["a", "b"], stream=True))[:-1]
    assert {(c["choices"][0]["index"], c["system_fingerprint"]) for c in chunks} == {
        (0, "fp_a"),
        (1, "fp_b"),
    }


def test_models():
    entry = {
        "id": "llama-3-8b",
        "object": "model",
        "created": 1_600_000_000,
        "owned_by": "kvserve",
        "max_model_len": 32768,
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
    }
    assert ask("GET", "/v1/models").json() == {"object": "list", "data": [entry]}
    for name in ("llama-3-8b", "default", "Meta-Llama-3-8B.Q4_K_M"):
        assert ask("GET", f"/v1/models/{name}").json() == entry
    missing = ask("GET", "/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_models_are_listed_without_a_plan():
    service = ScriptedService()
    service.now = type(service.now)(
        **{f: getattr(service.now, f) for f in service.now.__slots__} | {"plan": None}
    )
    (entry,) = ask("GET", "/v1/models", service=service).json()["data"]
    assert entry["max_model_len"] is None


def test_openapi_is_served_and_no_page_that_loads_scripts():
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/admin/context"} <= set(paths)
    assert ask("GET", "/docs").status_code == 404
    assert json.dumps(paths)
