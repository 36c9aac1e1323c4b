"""Streams that count, under reloads and kills: nothing may be lost, repeated or cut off.

The model continues "7, 8, 9," with the next numbers, one answer after the other in each stream,
while another task changes the context and a third kills the worker with SIGKILL at random moments.
An answer is right where it has as many tokens as were asked for, and no number is missing or twice.
A model of random weights cannot count: with `--lengths-only` its answers need the right length.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from kvserve.instance import find_instance

PORT = 8765
TOKENS = 60
"""An answer's length."""


@dataclass
class Tally:
    """What became of the answers."""

    whole: int = 0
    seams: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    kills: int = 0
    reloads: int = 0


async def count(
    client: httpx.AsyncClient, args: argparse.Namespace, tally: Tally, seed: int, until: float
) -> None:
    """One stream: answer after answer until the time is up."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        start = rng.randrange(10, 60)
        prompt = ", ".join(str(n) for n in range(start, start + 40)) + ","
        body = {
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, n_generated, last, problem = "", 0, time.monotonic(), None
        longest = 0.0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer = (await response.aread()).decode()
                tally.refused.append(f"{response.status_code}: {answer[:200]}")
                await asyncio.sleep(1)
                continue
            async for line in response.aiter_lines():
                now = time.monotonic()
                if not line.startswith("data: {"):
                    continue
                longest, last = max(longest, now - last), now
                event = json.loads(line[6:])
                problem = problem or event.get("error")
                text += "".join(choice["text"] for choice in event.get("choices", ()))
                n_generated = (event.get("usage") or {}).get("completion_tokens", n_generated)
        judge(tally, prompt, text, n_generated, problem, counts=not args.lengths_only)
        tally.gaps.append(longest)


def judge(
    tally: Tally, prompt: str, text: str, n_generated: int, problem: object, *, counts: bool
) -> None:
    """Enter an answer into the tally."""
    if problem is not None:
        tally.refused.append(str(problem)[:200])
        return
    numbers = [int(n) for n in re.findall(r"\d+", prompt + text)]
    jumps = [(a, b) for a, b in itertools.pairwise(numbers[:-1]) if b != a + 1]
    if n_generated != TOKENS:
        tally.wrong.append(f"{n_generated} of {TOKENS} tokens: {text!r}")
    elif jumps and counts:
        tally.wrong.append(f"jumps {jumps[:3]}: {text!r}")
    else:
        tally.whole += 1


async def reload(client: httpx.AsyncClient, args: argparse.Namespace, tally: Tally, until: float):
    """Change the context again and again."""
    for n in range(10**6):
        await asyncio.sleep(args.every)
        if time.monotonic() > until:
            return
        n_ctx = args.contexts[n % len(args.contexts)]
        answer = await client.post("/admin/context", json={"n_ctx": n_ctx})
        if answer.status_code == 200:
            tally.reloads += answer.json()["changed"]


async def kill(client: httpx.AsyncClient, args: argparse.Namespace, tally: Tally, until: float):
    """Kill whatever worker there is, at random moments, and time the recovery."""
    rng = random.Random(args.seed + 1)
    await asyncio.sleep(args.seconds * args.kills_from)
    left = args.seconds * (1 - args.kills_from)
    while args.kills and tally.kills < args.kills:
        await asyncio.sleep(rng.uniform(0.2, 2 * (left / (args.kills + 1))))
        if time.monotonic() > until:
            return
        status = (await client.get("/admin/status")).json()
        if status["worker_pid"] is None:
            continue
        began = time.monotonic()
        try:
            os.kill(status["worker_pid"], signal.SIGKILL)
        except ProcessLookupError:
            continue
        tally.kills += 1
        print(f"killed the worker while {status['phase']}", file=sys.stderr, flush=True)
        await asyncio.sleep(0.1)
        while (await client.get("/health/ready")).status_code != 200:  # noqa: ASYNC110 - by HTTP
            await asyncio.sleep(0.05)
        tally.recoveries.append(time.monotonic() - began)


async def soak(url: str, args: argparse.Namespace) -> tuple[Tally, dict[str, Any]]:
    """Run everything until the time is up and all streams have ended."""
    tally = Tally()
    until = time.monotonic() + args.seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=limits, trust_env=False
    ) as client:
        streams = [
            count(client, args, tally, args.seed * 1000 + n, until) for n in range(args.streams)
        ]
        await asyncio.gather(
            *streams, reload(client, args, tally, until), kill(client, args, tally, until)
        )
        status: dict[str, Any] = (await client.get("/admin/status")).json()
    return tally, status


def memory_files(pid: int) -> int:
    """Sequences' memory files that a process still holds."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return sum("kvserve-state" in str(link.readlink()) for link in links)


def main() -> int:
    """Returns 1 where an answer was wrong or something was left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=15, help="seconds between two reloads")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 16384])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kills-from", type=float, default=0.0, help="share of the time without")
    parser.add_argument("--lengths-only", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", nargs=argparse.REMAINDER, default=[], help="for kvserve start")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        common = ["--state-dir", state, "--port", str(PORT)]
        command = [sys.executable, "-m", "kvserve"]
        subprocess.run(
            [*command, "start", "--model", args.model, "--ctx", str(args.contexts[0]), "--detach",
             "--parallel", str(args.streams), *common, *args.start],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        try:
            tally, status = asyncio.run(soak(f"http://127.0.0.1:{PORT}", args))
            left = memory_files(find_instance(Path(state), PORT).pid)
        finally:
            subprocess.run([*command, "stop", *common], check=False, stdout=sys.stderr)
    carried = [r["carry"] for r in status["reloads"] if r["carry"]]
    print(f"| streams | {args.streams} for {args.seconds:.0f} s |\n|---|---|")
    print(f"| answers of {TOKENS} tokens, whole and in order | {tally.whole} |")
    print(f"| wrong | {len(tally.wrong)} |")
    print(f"| refused or failed | {len(tally.refused)} |")
    print(f"| reloads | {tally.reloads} |")
    pairs = {f"{r['to_cache_type']} at {r['to_n_ctx']}" for r in status["reloads"]}
    pauses = [r["pause_seconds"] for r in status["reloads"] if r["pause_seconds"] is not None]
    print(f"| loaded | {', '.join(sorted(pairs))} |")
    print(f"| with both workers at once | {sum(r['overlapped'] for r in status['reloads'])} |")
    if pauses:
        print(f"| longest pause of a reload | {max(pauses):.2f} s |")
    print(f"| workers killed | {tally.kills} |")
    if tally.recoveries:
        print(f"| ready again after a kill, longest | {max(tally.recoveries):.1f} s |")
    print(f"| sequences carried | {sum(c['n_sequences'] for c in carried)} |")
    print(f"| left behind | {sum(len(c['refused']) for c in carried)} |")
    if tally.gaps:
        print(f"| longest gap in a stream | {max(tally.gaps):.1f} s |")
    print(f"| memory files left | {left} |")
    for line in [*tally.wrong[:10], *tally.refused[:10]]:
        print(line, file=sys.stderr)
    return int(bool(tally.wrong or left))


if __name__ == "__main__":
    sys.exit(main())
