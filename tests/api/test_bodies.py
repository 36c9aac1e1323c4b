"""Bodies that are large, broken, late or no HTTP at all."""

import asyncio
import json
import socket
import threading
from dataclasses import replace

import pytest
from starlette.requests import Request

from kvserve.api.bodies import INLINE_BYTES, read_body
from kvserve.api.malformed import JsonErrorProtocol
from kvserve.api.schemas import CompletionRequest
from kvserve.errors import InvalidRequest
from tests.api.scripted import CONFIG, ScriptedService, ask, live_server


def read(data: bytes, content_type: str = "application/json") -> tuple[CompletionRequest, int]:
    """The body, and the thread that made something of it."""

    async def receive():
        return {"type": "http.request", "body": data, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", content_type.encode())]}
    request = Request(scope, receive)
    return asyncio.run(read_body(request, CompletionRequest, lambda _: threading.get_ident()))


@pytest.mark.parametrize(("size", "here"), [(10, True), (INLINE_BYTES, False)])
def test_a_large_body_is_read_beside_the_event_loop(size: int, here: bool) -> None:
    body, thread = read(json.dumps({"prompt": "a" * size}).encode())
    assert len(body.prompt) == size
    assert (thread == threading.get_ident()) is here


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"prompt": "a",}', "not JSON: "),
        (b'{"prompt": ', "at character 11"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "not JSON: Expecting value at character 0"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(data)


def test_a_body_that_is_not_said_to_be_json_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Content-Type"):
        read(b"{}", "text/plain")


def test_a_bad_message_among_many_is_named() -> None:
    messages = [{"role": "user", "content": "a" * 1000}] * 300 + [{"role": "poet"}]
    response = ask("POST", "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[300].role"


def exchange(url: str, data: bytes) -> tuple[bytes, bytes]:
    """Send bytes; the head and the body of the answer, once the server hung up."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("part", [b"", b'{"prompt"'])
def test_a_body_that_never_comes_is_not_waited_for(part: bytes) -> None:
    with live_server(ScriptedService(), replace(CONFIG, body_seconds=0.2)) as live:
        head, body = exchange(
            live.url,
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n" + part,
        )
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_json(data: bytes) -> None:
    with live_server(ScriptedService(), http=JsonErrorProtocol) as live:
        head, body = exchange(live.url, data)
    assert head.startswith(b"HTTP/1.1 400")
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("this is not HTTP")
