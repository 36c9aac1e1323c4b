"""The bench's arithmetic and its table; the load itself against a server of canned answers."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import httpx
import pytest

from kvserve.bench.load import Answer, Load, Result, quantile, run, summarize
from kvserve.bench.report import plot, table
from kvserve.errors import WorkerFailed

LOAD = Load(streams=2, requests_per_stream=3, prompt_words=20, max_tokens=4, shared_words=8)


def result(streams: int, tps: float) -> Result:
    load = Load(streams, 1, 20, 4)
    return Result(load, 1.0, int(tps), 0, tps, tps / streams, 0.1, 0.2, 0.01, 0.02, 20, 0)


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    prompts = [LOAD.prompt(n).split() for n in range(6)]
    assert all(len(prompt) == 20 for prompt in prompts)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 1
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 6
    assert LOAD.prompt(3) == LOAD.prompt(3)


def test_a_run_is_tokens_over_wall_time_and_medians() -> None:
    answers = [Answer(0.5, 1.0, 11, 20, 5, (0.1,) * 10), Answer(0.7, 2.0, 11, 20, 0, (0.2,) * 10)]
    put = summarize(LOAD, answers, n_failed=1, seconds=4.0)
    assert put.tokens_per_second == 22 / 4
    assert put.stream_tps == 7.5
    assert (put.gap_p50, put.n_cached_tokens, put.n_failed) == (0.2, 5, 1)
    with pytest.raises(ValueError, match="no request"):
        summarize(LOAD, [], 3, 1.0)


def test_quantiles_are_of_the_nearest_rank() -> None:
    values = [float(n) for n in range(100)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([], 0.5)) == (50.0, 99.0, 0.0)


def test_the_ratio_is_to_the_best_rival_at_the_same_load() -> None:
    series = {
        "kvserve": [result(1, 100), result(8, 600)],
        "llama-server": [result(1, 80), result(8, 400)],
        "llama-server -bs": [result(1, 90), result(8, 500)],
    }
    rows = table(series).splitlines()
    assert rows[2].endswith("| 1.11 |")
    assert rows[3].endswith("| 1.20 |")
    assert rows[4].endswith("|  |")
    drawn = ET.fromstring(plot(series))
    assert len(drawn.findall("{*}polyline")) == 3


def test_the_plot_shows_every_server_and_round_numbers() -> None:
    names = ["kvserve", *(f"llama-server --flag <{n}>" for n in range(7))]
    series = {name: [result(1, 90 + n), result(64, 2182)] for n, name in enumerate(names)}
    drawn = ET.fromstring(plot(series))
    texts = [text.text for text in drawn.findall("{*}text")]
    assert set(names) <= set(texts)
    assert {"0", "500", "1000", "1500", "2000", "2500"} <= set(texts)
    lines = drawn.findall("{*}polyline")
    assert len({(one.get("stroke"), one.get("stroke-dasharray")) for one in lines}) == len(names)
    heights = [float(point.split(",")[1]) for one in lines for point in one.get("points").split()]
    assert min(heights) > 0
    assert max(heights) < float(drawn.get("viewBox").split()[3])


@pytest.mark.parametrize("rate", [0.0, 0.3, 399.99999999999994, 3999.9999999999995, 1e7])
def test_any_rates_can_be_drawn(rate: float) -> None:
    drawn = ET.fromstring(plot({"kvserve": [result(1, rate)]}))
    [point] = drawn.findall("{*}circle")
    assert 0 < float(point.get("cy")) < float(drawn.get("viewBox").split()[3])


class Canned(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fails = self.server.asked == 2  # type: ignore[attr-defined]
        self.server.asked += 1  # type: ignore[attr-defined]
        if fails:
            self.send_response(500)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"no, no")
            return
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": 20}
        chunks = [{"choices": [{"text": "x"}]}] * 3 + [{"choices": [], "usage": usage}]
        data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        server.asked = 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_a_load_counts_tokens_by_usage_and_failures_apart(url: str) -> None:
    put = asyncio.run(run(url, LOAD))
    assert put.n_failed == 1
    assert put.n_tokens == 5 * 4
    assert put.n_prompt_tokens == 5 * 20


def test_a_server_that_answers_nothing_is_quoted(url: str) -> None:
    with httpx.Client() as client:
        for _ in range(2):  # the third answer is the one that fails
            client.post(f"{url}/completions", json={"max_tokens": 1})
    with pytest.raises(WorkerFailed, match=r"no request was answered: .*500: no, no"):
        asyncio.run(run(url, Load(1, 1, 20, 4)))
