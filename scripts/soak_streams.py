"""Streams that break off at random: whatever a request took must come back when it is gone.

Each stream asks again and again: short and long prompts, some with a common beginning, several
choices, log probabilities, schemas, with and without a stream; a share of the clients hang up in
the midst. After a warm-up, and again at the end, the load stops, and what both processes hold is
compared: resident memory, open files and threads, and the KV cells of running requests.

It starts a server of its own, on a small generated model or on `--model FILE`, with the flags after
`--start`; or it takes the daemon that runs on `--port`.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from kvserve.bench.load import WORDS
from kvserve.instance import find_instance
from kvserve.settings import load_settings
from tests.models import write_model

PORT = 8767
MIB = 2**20
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["river", "stone"]}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}
ENGINE_ITEMS = ("weights_bytes", "kv_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")


@dataclass(frozen=True, slots=True)
class Process:
    """What one process holds. `anonymous` is resident memory that no file is behind, in bytes;
    `n_stored` are memory files of sequences that left the cache, `n_files` all other open files."""

    resident: int
    anonymous: int
    n_files: int
    n_stored: int
    n_threads: int

    @staticmethod
    def read(pid: int) -> "Process":
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        files = open_files(pid)
        n_stored = sum("kvserve-state" in name for name in files)
        return Process(
            resident=int(facts["VmRSS"].split()[0]) * 1024,
            anonymous=int(facts["RssAnon"].split()[0]) * 1024,
            n_files=len(files) - n_stored,
            n_stored=n_stored,
            n_threads=int(facts["Threads"]),
        )


def open_files(pid: int) -> list[str]:
    """What a process has open, as the kernel names it; a file closed meanwhile is left out."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.readlink().name)
    return found


@dataclass(frozen=True, slots=True)
class Sample:
    """Both processes at one moment of the run."""

    name: str
    daemon: Process
    worker: Process
    worker_pid: int
    n_cells_used: int
    n_running: int
    n_waiting: int
    n_engine_bytes: int
    n_ended: int

    def row(self) -> str:
        sizes = (self.daemon.resident, self.worker.resident, self.worker.anonymous)
        numbers = (
            *(f"{size / MIB:.1f}" for size in sizes),
            f"{self.daemon.n_files} + {self.worker.n_files}",
            f"{self.daemon.n_stored} + {self.worker.n_stored}",
            f"{self.daemon.n_threads} + {self.worker.n_threads}",
            self.n_cells_used,
            f"{self.n_running} + {self.n_waiting}",
            self.n_ended,
        )
        return f"| {self.name} | {' | '.join(map(str, numbers))} |"


HEADER = (
    "| | daemon, MiB | worker, MiB | of it anonymous | open files | memory files | threads "
    f"| cells in use | running + waiting | requests ended |\n{'|---' * 10}|"
)


class Asking:
    """The streams and what became of their requests."""

    def __init__(self, client: httpx.AsyncClient, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self.outcomes: Counter[str] = Counter()

    async def keep(self, streams: int, seconds: float, seed: int) -> None:
        """So many streams for so long; each ends its last request."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for n in range(streams):
                group.create_task(self._stream(random.Random(f"{seed} {n}"), until))

    async def _stream(self, chance: random.Random, until: float) -> None:
        while time.monotonic() < until:
            try:
                self.outcomes[await self._one(chance)] += 1
            except httpx.HTTPError as error:
                self.outcomes[f"failed: {type(error).__name__} {error}"] += 1

    async def _one(self, chance: random.Random) -> str:
        path, body = self._body(chance)
        patience = chance.randint(0, 24) if chance.random() < self._args.cancel else None
        if not body["stream"]:
            return await self._whole(path, body, patience)
        n_events, n_tokens = 0, 0
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                return f"failed: {response.status_code} {(await response.aread())[:200]!r}"
            async for line in response.aiter_lines():
                if n_events == patience:
                    return "hung up"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return f"failed: {event['error']}"
                n_events += 1
                usage = event.get("usage") or {}
                n_tokens = usage.get("completion_tokens", n_tokens)
        return "answered" if right_length(body, n_tokens) else f"wrong: {n_tokens} tokens"

    async def _whole(self, path: str, body: dict[str, Any], patience: int | None) -> str:
        """Without a stream a client hangs up after a time."""
        limit = None if patience is None else 0.02 * patience
        try:
            async with asyncio.timeout(limit):
                answer = await self._client.post(path, json=body)
        except TimeoutError:
            return "hung up"
        if answer.status_code != httpx.codes.OK:
            return f"failed: {answer.status_code} {answer.text[:200]}"
        n_tokens = answer.json()["usage"]["completion_tokens"]
        return "answered" if right_length(body, n_tokens) else f"wrong: {n_tokens} tokens"

    def _body(self, chance: random.Random) -> tuple[str, dict[str, Any]]:
        long = chance.random() < 0.15
        words = chance.choices(WORDS, k=chance.randint(1, self._args.words if long else 12))
        if chance.random() < 0.4:
            words = random.Random(chance.randrange(6)).choices(WORDS, k=40) + words
        body: dict[str, Any] = {
            "prompt": " ".join(words),
            "max_tokens": chance.choice((4, 16, 16, 48, 96)),
            "temperature": chance.choice((0.0, 0.8, 1.2)),
            "stream": chance.random() < 0.85,
            "n": 2 if chance.random() < 0.15 else 1,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if chance.random() < 0.15:
            body["logprobs"] = chance.randint(0, 5)
        if chance.random() < 0.15:
            form = {"name": "f", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        else:
            body["ignore_eos"] = True
        if chance.random() < 0.2:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            if "logprobs" in body:
                body["top_logprobs"] = body["logprobs"]
                body["logprobs"] = True
            return "/v1/chat/completions", body
        return "/v1/completions", body


def right_length(body: dict[str, Any], n_tokens: int) -> bool:
    """Constrained answers may end before; the others have all tokens."""
    most = int(body["max_tokens"] * body["n"])
    return 0 < n_tokens <= most if "response_format" in body else n_tokens == most


class Watching:
    """Takes samples of the daemon and its worker."""

    def __init__(self, client: httpx.AsyncClient, pid: int, asking: Asking) -> None:
        self._client = client
        self._pid = pid
        self._asking = asking
        self.samples: list[Sample] = []

    async def sample(self, name: str) -> Sample:
        status = (await self._client.get("/admin/status")).json()
        items = (status["memory"][item]["measured"] or 0 for item in ENGINE_ITEMS)
        sample = Sample(
            name=name,
            daemon=Process.read(self._pid),
            worker=Process.read(status["worker_pid"]),
            worker_pid=status["worker_pid"],
            n_cells_used=status["kv_cells_used"],
            n_running=status["requests"]["running"],
            n_waiting=status["requests"]["waiting"],
            n_engine_bytes=sum(items),
            n_ended=sum(self._asking.outcomes.values()),
        )
        print(sample.row(), flush=True)
        self.samples.append(sample)
        return sample

    async def idle(self, name: str) -> Sample:
        """A sample when nothing runs or waits any more and connections had time to close."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            requests = (await self._client.get("/admin/status")).json()["requests"]
            if not requests["running"] + requests["waiting"]:
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(8)
        return await self.sample(name)

    async def each_minute(self) -> None:
        for minute in range(1, 10**6):
            await asyncio.sleep(60)
            await self.sample(f"minute {minute}")


async def soak(url: str, pid: int, key: str, args: argparse.Namespace) -> int:
    """Run, print, and return 1 where something failed or did not come back."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    headers = {"authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, headers=headers) as admin,
        httpx.AsyncClient(
            base_url=url, timeout=600, limits=limits, trust_env=False, headers=headers
        ) as client,
    ):
        asking = Asking(client, args)
        watching = Watching(admin, pid, asking)
        print(HEADER, flush=True)
        await watching.sample("loaded")
        await asking.keep(args.streams, args.warm_up, seed=1)
        start = await watching.idle("warm, idle")
        watch = asyncio.create_task(watching.each_minute())
        await asking.keep(args.streams, args.seconds, seed=2)
        watch.cancel()
        end = await watching.idle("end, idle")
    bad = [line for line in asking.outcomes if line not in ("answered", "hung up")]
    report(start, end, watching.samples, asking.outcomes, args)
    for line in bad[:10]:
        print(f"{asking.outcomes[line]} x {line}", file=sys.stderr)
    left = not_returned(start, end, args.allowed_mib * MIB)
    for line in left:
        print(f"not back: {line}", file=sys.stderr)
    return int(bool(bad or left))


def report(
    start: Sample,
    end: Sample,
    samples: list[Sample],
    outcomes: Counter[str],
    args: argparse.Namespace,
) -> None:
    """What the table comes to."""
    loaded = [sample for sample in samples if sample.name.startswith("minute")] or [end]
    n_failed = sum(outcomes.values()) - outcomes["answered"] - outcomes["hung up"]
    most = max(loaded, key=lambda sample: sample.worker.resident)
    beyond = (most.worker.resident - most.n_engine_bytes) / MIB
    grown = (end.worker.resident - start.worker.resident) / MIB
    daemon = (end.daemon.resident - start.daemon.resident) / MIB
    print(
        f"\n| streams | {args.streams} for {args.warm_up:.0f} + {args.seconds:.0f} s |\n|---|---|"
    )
    print(f"| answered | {outcomes['answered']:,} |")
    print(f"| hung up in the midst | {outcomes['hung up']:,} |")
    print(f"| failed or of a wrong length | {n_failed} |")
    print(f"| worker, end less start | {grown:+.1f} MiB |")
    print(f"| daemon, end less start | {daemon:+.1f} MiB |")
    print(f"| daemon under load, most | {max(s.daemon.resident for s in loaded) / MIB:.0f} MiB |")
    print(
        f"| worker under load, most, less llama.cpp's own {most.n_engine_bytes / MIB:.0f} MiB "
        f"| {beyond:.0f} MiB |"
    )


_POOLED_THREADS = 2
"""A pool begins a thread when it first needs one more; each of thousands of requests that left one
would be seen all the same."""


def not_returned(start: Sample, end: Sample, allowed: int) -> list[str]:
    """What the end has more of than the start; memory may differ by `allowed` bytes."""
    left = []
    if end.worker_pid != start.worker_pid:
        left.append("the worker is another one")
    if end.n_cells_used or end.n_running or end.n_waiting:
        left.append(f"{end.n_cells_used} cells of {end.n_running} running requests")
    for name in ("daemon", "worker"):
        before, after = getattr(start, name), getattr(end, name)
        if after.resident > before.resident + allowed:
            left.append(
                f"the {name}'s memory, by {(after.resident - before.resident) / MIB:.1f} MiB"
            )
        if after.n_files > before.n_files:
            left.append(f"{after.n_files - before.n_files} open files of the {name}")
        if after.n_threads > before.n_threads + _POOLED_THREADS:
            left.append(f"{after.n_threads - before.n_threads} threads of the {name}")
    return left


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file or demo; a generated llama otherwise")
    parser.add_argument("--port", type=int, help="of a daemon that runs, instead of a new one")
    parser.add_argument("--state-dir", type=Path, default=load_settings({}).state_dir)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--warm-up", type=float, default=60, help="seconds of load before the start"
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cancel", type=float, default=0.35, help="share of clients that hang up")
    parser.add_argument("--words", type=int, default=120, help="of the longest prompts")
    parser.add_argument("--ctx", type=int, default=16384)
    parser.add_argument("--allowed-mib", type=float, default=16, help="growth that is no leak")
    parser.add_argument("--start", nargs=argparse.REMAINDER, default=[], help="for kvserve start")
    return parser.parse_args()


@contextlib.contextmanager
def daemon(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The URL and process of the daemon to ask; one that was started here ends with the block."""
    if args.port is not None:
        instance = find_instance(args.state_dir, args.port)
        yield instance.url, instance.pid
        return
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        model = args.model or str(
            write_model(state / "tiny.gguf", n_layer=4, n_ctx_train=args.ctx, seed=3)
        )
        common = ["--state-dir", folder, "--port", str(PORT)]
        command = [sys.executable, "-m", "kvserve"]
        subprocess.run(
            [*command, "start", "--model", model, "--ctx", str(args.ctx), "--detach", "--parallel",
             str(args.streams), "--adapt", "off", "--cache-ram", "32MiB", *common, *args.start],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{PORT}", find_instance(state, PORT).pid
        finally:
            subprocess.run([*command, "stop", *common], check=False, stdout=sys.stderr)


def main() -> int:
    """Returns 1 where a request failed or something did not come back."""
    args = read_arguments()
    with daemon(args) as (url, pid):
        return asyncio.run(soak(url.removesuffix("/v1"), pid, args.api_key, args))


if __name__ == "__main__":
    sys.exit(main())
