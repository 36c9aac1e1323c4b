"""Every failure is an OpenAI error object with its status."""

import asyncio

import httpx
import pytest

from kvserve import errors
from kvserve.api.app import create_app
from tests.api.scripted import CHAT, CONFIG, ScriptedService, ask, begins, chat, events, refuses

TABLE = [
    (errors.InvalidRequest("m", param="stop"), 400, "invalid_request_error", "invalid_request"),
    (errors.ContextLengthExceeded("m"), 400, "invalid_request_error", "context_length_exceeded"),
    (errors.UsageError("m"), 400, "invalid_request_error", "invalid_settings"),
    (errors.Overloaded("m", retry_after=1.2), 429, "rate_limit_error", "queue_full"),
    (errors.NotReady("m", retry_after=0), 503, "server_error", "not_ready"),
    (errors.WorkerFailed("m"), 503, "server_error", "worker_failed"),
    (errors.DeadlineExceeded("m"), 504, "server_error", "deadline_exceeded"),
    (errors.KvserveError("m"), 500, "server_error", "internal_error"),
]


def assert_error(response: httpx.Response, status: int, code: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["code"] == code
    assert error["message"]
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code"), TABLE)
def test_a_refused_generation(error, status, kind, code, stream):
    response = chat(ScriptedService(refuses(error)), stream=stream)
    answer = assert_error(response, status, code)
    assert answer == {"message": "m", "type": kind, "param": error.param, "code": code}


@pytest.mark.parametrize(("seconds", "header"), [(1.2, "2"), (0, "1"), (30, "30"), (None, None)])
def test_retry_after(seconds, header):
    response = chat(ScriptedService(refuses(errors.Overloaded("m", retry_after=seconds))))
    assert response.headers.get("retry-after") == header


def test_what_does_not_fit_comes_with_its_numbers():
    def refuse(_n_ctx):
        raise errors.DoesNotFit("m", needed_bytes=9, free_bytes=5, options=("q4_0 fits",))

    service = ScriptedService()
    service.on_plan = refuse
    response = ask("POST", "/admin/context", service=service, json={"n_ctx": 1_000_000})
    error = assert_error(response, 409, "does_not_fit")
    assert (error["needed_bytes"], error["free_bytes"]) == (9, 5)
    assert error["options"] == ["q4_0 fits"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/" + "x" * 5000, 404, "unknown_url"),
        ("GET", "/%ed%a0%80", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/admin/context", 405, "method_not_allowed"),
    ],
)
def test_wrong_urls_and_methods(method, path, status, code):
    response = ask(method, path)
    error = assert_error(response, status, code)
    assert len(error["message"]) < 400
    assert ("allow" in response.headers) is (status == 405)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"\xff\xfe", JSON),
        (b"[]", JSON),
        (b'"x"', JSON),
        (b"null", JSON),
        (b"[" * 100_000, JSON),
        (b'{"a":' * 100_000, JSON),
        (b'{"seed":' + b"9" * 5000 + b"}", JSON),
        (b'{"prompt":"x"}', {}),
        (b'{"prompt":"x"}', {"content-type": "text/plain"}),
        (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/admin/context"])
def test_bodies_that_are_no_json_object(path, body, headers):
    service = ScriptedService()
    response = ask("POST", path, service=service, content=body, headers=headers)
    assert_error(response, 400, "invalid_request")
    assert service.specs == []
    assert service.asked == []


def test_a_body_without_its_content_type_is_told_so():
    error = ask("POST", "/v1/completions", content=b"{}").json()["error"]
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
def test_the_body_limit(chunked, size, status):
    body = b'{"prompt":"x"}'.ljust(size)

    async def in_pieces():
        for start in range(0, size, 100):
            yield body[start : start + 100]

    response = ask(
        "POST",
        "/v1/completions",
        config={"max_body_bytes": 1000},
        content=in_pieces() if chunked else body,
        headers=JSON,
    )
    assert response.status_code == status
    if status == 413:
        assert_error(response, 413, "request_too_large")
        assert response.headers["connection"] == "close"


def test_an_absurd_length_is_refused_before_a_byte_is_read():
    headers = {**JSON, "content-length": "9" * 400}
    response = ask("POST", "/v1/completions", content=b"{}", headers=headers)
    assert_error(response, 413, "request_too_large")


def test_a_bug_is_500_with_an_id_and_no_internals():
    def bug(_ticket, _spec):
        raise RuntimeError("secret")

    response = ask(
        "POST",
        "/v1/chat/completions",
        service=ScriptedService(bug),
        json=CHAT,
        headers={"x-request-id": "r-1"},
    )
    error = assert_error(response, 500, "internal_error")
    assert "r-1" in error["message"]
    assert response.headers["x-request-id"] == "r-1"
    assert "secret" not in response.text


def test_a_failure_after_text_is_the_last_event():
    response = chat(ScriptedService(begins("Hel", error=errors.WorkerFailed("died"))), stream=True)
    assert response.status_code == 200
    *_, text, error = events(response)
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert error == {
        "error": {"message": "died", "type": "server_error", "param": None, "code": "worker_failed"}
    }


def test_a_bug_after_text_is_told_without_internals_and_raised_for_the_log():
    def script(ticket, spec):
        begins("Hel")(ticket, spec)
        ticket.put(None)

    async def play():
        app = create_app(ScriptedService(script), CONFIG)
        sent = []

        async def receive():
            if sent_body:
                await asyncio.Event().wait()
            sent_body.append(True)
            return {"type": "http.request", "body": b'{"prompt":"x","stream":true}'}

        async def send(message):
            sent.append(message)
            if b"Hel" in message.get("body", b""):
                # The next event is no event of a ticket at all.
                raise RuntimeError("secret")

        sent_body = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        with pytest.raises(RuntimeError, match="secret"):
            await app(scope, receive, send)
        return sent

    sent = asyncio.run(play())
    assert b"internal_error" in sent[-2]["body"]
    assert b"secret" not in sent[-2]["body"]
    assert sent[-1]["more_body"] is False
