"""Gaps of running streams while a prompt arrives: the arithmetic, and a server of canned chunks."""

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvserve.bench.arrival import Arrival, Disturbance, run, summarize, table
from kvserve.bench.load import Load
from kvserve.errors import WorkerFailed

ARRIVAL = Arrival(Load(streams=2, requests_per_stream=1, prompt_words=4, max_tokens=1000), 64, 2)


def test_gaps_are_told_apart_by_where_they_end() -> None:
    times = [[0.0, 9.0, 9.1, 9.2, 9.3, 9.4, 9.5, 9.6, 9.9, 10.2, 10.3, 20.0]]
    put = summarize(ARRIVAL, times, [(9.65, 10.0, 70), (10.15, 10.25, 71)])
    assert put.idle_p50 == pytest.approx(0.1)
    assert put.idle_p99 == pytest.approx(0.1)
    assert put.gap_p50 == pytest.approx(0.3)
    assert put.gap_max == pytest.approx(0.3)
    assert put.times_idle == pytest.approx(3.0)
    assert put.ttft_p50 == pytest.approx(0.35)
    assert put.n_prompt_tokens == 71


def test_the_ratio_is_to_the_least_p99_at_the_same_load() -> None:
    ours = Disturbance(ARRIVAL, 0.01, 0.01, 0.02, 0.03, 0.03, 1.0, 64)
    series = {
        "kvserve": [ours],
        "llama-server": [replace(ours, gap_p99=0.1)],
        "llama-server -bs": [replace(ours, gap_p99=0.06)],
    }
    rows = table(series).splitlines()
    assert rows[2].endswith("| 3.0 | 1.00 | 0.50 |")
    assert rows[3].endswith("|  |")


class Slow(http.server.BaseHTTPRequestHandler):
    """Two milliseconds a token; fifty while a long prompt is read."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        server = self.server
        long = len(body["prompt"].split()) > 32
        if long:
            server.pause = 0.05  # type: ignore[attr-defined]
            time.sleep(0.2)
            server.pause = 0.002  # type: ignore[attr-defined]
        for _ in range(min(body["max_tokens"], server.most)):  # type: ignore[attr-defined]
            time.sleep(server.pause)  # type: ignore[attr-defined]
            try:
                self._send({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 64}})
            except OSError:
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, chunk: object) -> None:
        data = f"data: {json.dumps(chunk)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.pause, server.most = 0.002, 1000  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_prompt_that_holds_the_streams_up_shows(server: http.server.ThreadingHTTPServer) -> None:
    put = asyncio.run(run(f"http://127.0.0.1:{server.server_port}/v1", ARRIVAL))
    assert put.gap_max > 0.045 > put.idle_p50
    assert put.ttft_p50 > 0.2
    assert put.n_prompt_tokens == 64


def test_streams_that_end_too_early_are_no_measurement(
    server: http.server.ThreadingHTTPServer,
) -> None:
    server.most = 20  # type: ignore[attr-defined]
    with pytest.raises(WorkerFailed, match=r"ended after 20 chunks, .*raise --max-tokens"):
        asyncio.run(run(f"http://127.0.0.1:{server.server_port}/v1", ARRIVAL))
