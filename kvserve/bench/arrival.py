"""What a long prompt that arrives does to the streams that run: their gaps before and meanwhile."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvserve.bench.load import Load, ask, client_of, events, quantile, sampled
from kvserve.bench.report import OURS, rivals
from kvserve.errors import WorkerFailed

_IDLE_TOKENS = 48
"""Tokens that each stream gets before the first prompt arrives, and between two."""
_ANSWER_TOKENS = 8
"""Of an arriving prompt: the first may be part of a character, which is no text yet."""
_LEFT_OUT = 4
"""Gaps at the beginning of a stream, when others may still begin."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """`load.streams` streams run; `n_arrivals` prompts of `words` words come, one after another."""

    load: Load
    words: int
    n_arrivals: int


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Seconds between two chunks of a running stream, before any prompt arrived and while one was
    read; and the arriving prompts' median time to first token."""

    arrival: Arrival
    idle_p50: float
    idle_p99: float
    gap_p50: float
    gap_p99: float
    gap_max: float
    ttft_p50: float
    n_prompt_tokens: int

    @property
    def times_idle(self) -> float:
        """The p99 while a prompt is read, in idle medians."""
        return self.gap_p99 / self.idle_p50 if self.idle_p50 else 0.0


async def run(url: str, arrival: Arrival, *, model: str = "default") -> Disturbance:
    """Measure at `url` (with `/v1`). Raises WorkerFailed where the server refuses, or where a
    stream ends before the last prompt was answered."""
    load = arrival.load
    times: list[list[float]] = [[] for _ in range(load.streams)]
    came = asyncio.Event()
    async with client_of(url, load.streams) as client:

        async def stream(index: int) -> None:
            body = sampled(model, load.prompt(index), load.max_tokens)
            async for _, text in events(client, body):
                if text:
                    times[index].append(time.perf_counter())
                    came.set()
            raise ValueError(
                f"a stream at {url} ended after {len(times[index])} chunks, before the last prompt "
                "was answered: raise --max-tokens"
            )

        async def disturb() -> list[tuple[float, float, int]]:
            windows = []
            for n in range(arrival.n_arrivals):
                await _progress(times, _IDLE_TOKENS, came)
                # Another seed: no word of it is in a prompt before, so nothing of it is cached.
                long = replace(load, prompt_words=arrival.words, shared_words=0, seed=1000 + n)
                begun = time.perf_counter()
                answer = await ask(client, model, long.prompt(n), _ANSWER_TOKENS)
                windows.append((begun, begun + answer.ttft, answer.n_prompt_tokens))
            return windows

        streams = [asyncio.create_task(stream(index)) for index in range(load.streams)]
        disturbing = asyncio.create_task(disturb())
        try:
            await asyncio.wait([*streams, disturbing], return_when=asyncio.FIRST_COMPLETED)
            for task in (disturbing, *streams):
                if task.done() and (error := task.exception()) is not None:
                    raise WorkerFailed(f"{type(error).__name__}: {error}")
            windows = disturbing.result()
        finally:
            for task in (*streams, disturbing):
                task.cancel()
            await asyncio.gather(*streams, disturbing, return_exceptions=True)
    return summarize(arrival, times, windows)


async def _progress(times: Sequence[Sequence[float]], n_tokens: int, came: asyncio.Event) -> None:
    """Wait until every stream has had so many more tokens; `came` is set with each."""
    wanted = [len(of_one) + n_tokens for of_one in times]
    while any(len(of_one) < n for of_one, n in zip(times, wanted, strict=True)):
        came.clear()
        await came.wait()


def summarize(
    arrival: Arrival,
    times: Sequence[Sequence[float]],
    windows: Sequence[tuple[float, float, int]],
) -> Disturbance:
    """Sort the gaps. `times` are the chunks of each stream, `windows` begin when a prompt is sent
    and end with its first token; a gap counts where it ends."""
    first = windows[0][0]
    idle, disturbed = [], []
    for of_one in times:
        for n, (before, after) in enumerate(itertools.pairwise(of_one)):
            if after < first and n >= _LEFT_OUT:
                idle.append(after - before)
            elif any(begin <= after <= end for begin, end, _ in windows):
                disturbed.append(after - before)
    idle.sort()
    disturbed.sort()
    return Disturbance(
        arrival=arrival,
        idle_p50=quantile(idle, 0.5),
        idle_p99=quantile(idle, 0.99),
        gap_p50=quantile(disturbed, 0.5),
        gap_p99=quantile(disturbed, 0.99),
        gap_max=max(disturbed, default=0.0),
        ttft_p50=quantile(sorted(end - begin for begin, end, _ in windows), 0.5),
        n_prompt_tokens=max(n for _, _, n in windows),
    )


def table(series: Mapping[str, Sequence[Disturbance]]) -> str:
    """One row for each server and number of streams; the last column is kvserve's p99 against the
    least of the others at the same load."""
    lines = [
        "| server | streams | prompt | gap before p50 / p99, ms "
        "| gap meanwhile p50 / p99 / most, ms | p99 / p50 before | its TTFT, s "
        "| kvserve's p99 / best other |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, results in series.items():
        for one in results:
            best = [other.gap_p99 for other in rivals(series) if other.arrival == one.arrival]
            ratio = f"{one.gap_p99 / min(best):.2f}" if best and name == OURS else ""
            before = f"{1e3 * one.idle_p50:.1f} / {1e3 * one.idle_p99:.1f}"
            gaps = (one.gap_p50, one.gap_p99, one.gap_max)
            meanwhile = " / ".join(f"{1e3 * gap:.1f}" for gap in gaps)
            lines.append(
                f"| {name} | {one.arrival.load.streams} | {one.n_prompt_tokens:,} | {before} "
                f"| {meanwhile} | {one.times_idle:.1f} | {one.ttft_p50:.2f} | {ratio} |"
            )
    return "\n".join(lines)
