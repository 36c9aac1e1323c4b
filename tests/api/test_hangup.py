"""A client that hangs up frees its place at once, and one that waits hears from the server."""

import socket
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from kvserve.errors import NotReady
from kvserve.supervisor.admission import Text
from tests.api.scripted import (
    CHAT,
    CONFIG,
    SERVED,
    SERVING,
    Live,
    ScriptedService,
    answers,
    begins,
    done,
    live_server,
    stays_in_line,
)

PATIENCE_SECONDS = 10


@pytest.fixture
def live() -> Iterator[Live]:
    with live_server(ScriptedService(stays_in_line)) as server:
        yield server


@pytest.fixture
def restless() -> Iterator[Live]:
    """A server that pings after 20 ms."""
    service = ScriptedService(stays_in_line)
    with live_server(service, replace(CONFIG, ping_seconds=0.02)) as server:
        yield server


def post_raw(live: Live, body: str) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return connection


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("prompt", ['"x"', '["x","y","z"]'])
@pytest.mark.parametrize("script", [stays_in_line, begins("Hel")], ids=["in line", "running"])
def test_hanging_up_gives_the_request_up(live, stream, prompt, script):
    live.service.script = script
    with post_raw(live, f'{{"prompt":{prompt},"stream":{stream}}}'):
        assert live.service.submitted.wait(PATIENCE_SECONDS)
        assert live.service.gave_up == []
    assert live.service.all_gave_up.wait(PATIENCE_SECONDS)


def test_hanging_up_after_the_first_text(live):
    live.service.script = begins("Hel")
    body = {**CHAT, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body) as response:
        assert any("Hel" in line for line in response.iter_lines())
    assert live.service.all_gave_up.wait(PATIENCE_SECONDS)


def test_a_complete_answer_gives_nothing_up(live):
    live.service.script = answers("Hello")
    for stream in (False, True):
        httpx.post(f"{live.url}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert live.service.gave_up == []


def test_the_connection_can_be_used_again(live):
    live.service.script = answers("Hello")
    with httpx.Client(base_url=live.url) as client:
        for stream in (True, False, True):
            body = {**CHAT, "stream": stream}
            assert "Hello" in client.post("/v1/chat/completions", json=body).text


def test_a_stream_in_line_begins_with_pings(restless):
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{restless.url}/v1/completions", json=body) as response:
        launch = SERVING.plan.chosen.launch
        assert response.headers["x-kvserve-ctx"] == str(launch.n_ctx)
        assert response.headers["x-kvserve-cache-type"] == str(launch.pair)
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
        restless.service.tell(SERVED, Text("a", (1,)), done())
        data = [line for line in lines if line.startswith("data: ")]
    assert '"text":"a"' in data[0]
    assert data[-1] == "data: [DONE]"


def test_a_refusal_after_the_first_ping_is_an_event(restless):
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{restless.url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        restless.service.tell(NotReady("gave up waiting"))
        data = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert len(data) == 1
    assert '"code":"not_ready"' in data[0]


def test_pings_between_texts(restless):
    restless.service.script = begins("a")
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{restless.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert any('"text":"a"' in line for line in lines)
        assert any(line == ": waiting" for line in lines)
        restless.service.tell(done())
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_hanging_up_between_pings(restless):
    body = {"prompt": "x", "stream": True}
    with httpx.stream("POST", f"{restless.url}/v1/completions", json=body) as response:
        assert next(response.iter_lines()) == ": waiting"
    assert restless.service.all_gave_up.wait(PATIENCE_SECONDS)


def test_an_answer_that_does_not_stream_waits_in_silence(restless):
    with post_raw(restless, '{"prompt":"x"}') as connection:
        assert restless.service.submitted.wait(PATIENCE_SECONDS)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
