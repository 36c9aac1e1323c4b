"""Closed-loop load on an OpenAI-compatible server: each stream asks, waits, and asks again."""

import asyncio
import contextlib
import functools
import itertools
import json
import random
import ssl
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import httpx

from kvserve.errors import WorkerFailed

_TEXT = (
    "river stone cloud green apple zebra house light water paper glass north music table "
    "winter summer garden window silver copper engine planet letter number forest island "
    "market bridge castle driver farmer singer doctor orange yellow purple circle square"
)
WORDS = _TEXT.split()
"""One token each in the common vocabularies, near enough to size a prompt by words."""


@dataclass(frozen=True, slots=True)
class Load:
    """What each stream does. `shared_words` is the length of a prefix that all prompts have."""

    streams: int
    requests_per_stream: int
    prompt_words: int
    max_tokens: int
    shared_words: int = 0
    seed: int = 0

    def prompt(self, n: int) -> str:
        """The n-th prompt: its own words after the shared ones."""
        shared = random.Random(self.seed).choices(WORDS, k=self.shared_words)  # noqa: S311
        own = random.Random(f"{self.seed} {n}").choices(  # noqa: S311
            WORDS, k=self.prompt_words - self.shared_words
        )
        return " ".join([*shared, *own])


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are seconds; `gaps` lie between its chunks."""

    ttft: float
    seconds: float
    n_tokens: int
    n_prompt_tokens: int
    n_cached_tokens: int
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A whole run. `tokens_per_second` counts generated tokens over the run's wall time;
    `stream_tps` is the median stream's rate between its first and last token."""

    load: Load
    seconds: float
    n_tokens: int
    n_failed: int
    tokens_per_second: float
    stream_tps: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    n_prompt_tokens: int
    n_cached_tokens: int


@functools.cache
def _trusted() -> ssl.SSLContext:
    """httpx's certificates: reading them takes 20 ms, for every client by default."""
    return httpx.create_ssl_context(trust_env=False)


def client_of(url: str, streams: int, api_key: str = "none") -> httpx.AsyncClient:
    """A client for so many streams at a time at `url` (with `/v1`)."""
    return httpx.AsyncClient(
        base_url=url,
        verify=_trusted(),
        headers={"authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(600.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=streams),
        trust_env=False,
    )


async def run(url: str, load: Load, *, model: str = "default", api_key: str = "none") -> Result:
    """Put the load on `url` (with `/v1`). Answers that fail are counted, not raised."""
    answers: list[Answer] = []
    failures: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        # One for each stream: httpx looks through all connections of a client for each request,
        # which made the prompts of 32 streams wait for it, not for the server.
        clients = [
            await stack.enter_async_context(client_of(url, 1, api_key)) for _ in range(load.streams)
        ]

        async def stream(index: int) -> None:
            client = clients[index]
            for turn in range(load.requests_per_stream):
                prompt = load.prompt(index * load.requests_per_stream + turn)
                try:
                    answers.append(await ask(client, model, prompt, load.max_tokens))
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    failures.append(f"{type(error).__name__}: {error}")

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index in range(load.streams):
                group.create_task(stream(index))
        seconds = time.perf_counter() - began
    if not answers:
        raise WorkerFailed(f"no request was answered: {failures[0] if failures else 'none came'}")
    return summarize(load, answers, len(failures), seconds)


def sampled(model: str, prompt: str, max_tokens: int) -> dict[str, object]:
    """The body of a streamed completion, as this bench asks for all of them."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def events(
    client: httpx.AsyncClient, body: dict[str, object]
) -> AsyncIterator[tuple[dict[str, object], bool]]:
    """A completion's chunks as they come: the usage in it, if any, and whether it has text.

    Raises ValueError where the server refuses or breaks off.
    """
    async with client.stream("POST", "/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            raise ValueError(f"{response.status_code}: {response.text[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            has_text = any(choice.get("text") for choice in chunk.get("choices", ()))
            yield chunk.get("usage") or {}, has_text


async def ask(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Answer:
    """One completion, timed. Raises ValueError where there is none."""
    began = time.perf_counter()
    arrivals: list[float] = []
    usage: dict[str, object] = {}
    async for told, has_text in events(client, sampled(model, prompt, max_tokens)):
        usage = told or usage
        if has_text:
            arrivals.append(time.perf_counter())
    if not arrivals:
        raise ValueError("an answer without text")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return Answer(
        ttft=arrivals[0] - began,
        seconds=arrivals[-1] - arrivals[0],
        n_tokens=_count(usage.get("completion_tokens"), len(arrivals)),
        n_prompt_tokens=_count(usage.get("prompt_tokens"), 0),
        n_cached_tokens=_count(cached, 0),
        gaps=tuple(b - a for a, b in itertools.pairwise(arrivals)),
    )


def summarize(load: Load, answers: Sequence[Answer], n_failed: int, seconds: float) -> Result:
    """Put the answers of a run together. Raises ValueError where there is none."""
    if not answers:
        raise ValueError("no request was answered")
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    ttfts = sorted(answer.ttft for answer in answers)
    rates = [(a.n_tokens - 1) / a.seconds for a in answers if a.seconds > 0]
    n_tokens = sum(answer.n_tokens for answer in answers)
    return Result(
        load=load,
        seconds=seconds,
        n_tokens=n_tokens,
        n_failed=n_failed,
        tokens_per_second=n_tokens / seconds,
        stream_tps=statistics.median(rates) if rates else 0.0,
        ttft_p50=quantile(ttfts, 0.5),
        ttft_p99=quantile(ttfts, 0.99),
        gap_p50=quantile(gaps, 0.5),
        gap_p99=quantile(gaps, 0.99),
        n_prompt_tokens=sum(answer.n_prompt_tokens for answer in answers),
        n_cached_tokens=sum(answer.n_cached_tokens for answer in answers),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ordered sequence lies (nearest rank); 0 for none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
