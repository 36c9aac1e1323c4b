"""`kvserve bench`: load on a running server, or on kvserve and llama-server by turns."""

import asyncio
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from kvserve.bench import arrival as arrivals
from kvserve.bench import load as loads
from kvserve.bench import servers
from kvserve.bench.report import plot, table
from kvserve.cli.failing import writable
from kvserve.cli.models import open_model
from kvserve.core.dtypes import parse_pair
from kvserve.errors import UsageError
from kvserve.settings import load_settings

WARM_UP = loads.Load(streams=1, requests_per_stream=1, prompt_words=64, max_tokens=8, seed=99)
MOST_STREAMS = 1024
"""Streams of one load: each is a connection of its own."""
_TEMPLATE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured. `versus` are `llama-server=PATH` and further flags after it. With
    `arriving_words` the streams run through, and `requests` prompts of so many words arrive."""

    url: str | None
    model: str | None
    versus: tuple[str, ...]
    streams: tuple[int, ...]
    requests: int
    prompt_words: int
    shared_words: int
    max_tokens: int
    cache_type: str
    threads: int | None
    cpu: bool
    svg: Path | None
    as_json: bool
    arriving_words: int = 0


def bench(options: BenchOptions) -> None:
    """Measure and print. Servers that are started here take turns at each load, each alone.

    Raises UsageError, before anything is measured.
    """
    _check(options)
    series: dict[str, list[loads.Result]] = {}
    disturbed: dict[str, list[arrivals.Disturbance]] = {}

    def measure(name: str, url: str, load: loads.Load) -> None:
        asyncio.run(loads.run(url, WARM_UP))
        if options.arriving_words:
            arrival = arrivals.Arrival(load, options.arriving_words, options.requests)
            disturbed.setdefault(name, []).append(asyncio.run(arrivals.run(url, arrival)))
        else:
            series.setdefault(name, []).append(asyncio.run(loads.run(url, load)))

    for streams in options.streams:
        load = loads.Load(
            streams=streams,
            requests_per_stream=options.requests,
            prompt_words=options.prompt_words,
            shared_words=options.shared_words,
            max_tokens=options.max_tokens,
        )
        if options.url is not None:
            measure(options.url, options.url, load)
            continue
        for server in _servers(options, load):
            with servers.running(server) as url:
                measure(server.name, url, load)
    if options.as_json:
        found: dict[str, list[dict[str, object]]] = {
            name: [asdict(one) for one in results]
            for name, results in (disturbed or series).items()
        }
        print(json.dumps(found, indent=1))
    else:
        print(arrivals.table(disturbed) if disturbed else table(series))
    if options.svg is not None:
        options.svg.expanduser().write_text(plot(series))


def parse_streams(text: str) -> tuple[int, ...]:
    """The loads of `--streams`, numbers of streams by commas. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) if part.isascii() and part.isdigit() else 0 for part in parts]
    if not all(0 < number <= MOST_STREAMS for number in numbers):
        raise UsageError(
            f"--streams {text}: write numbers from 1 to {MOST_STREAMS} by commas, as 1,4,8",
            param="streams",
        )
    return tuple(numbers)


def _check(options: BenchOptions) -> None:
    least = {
        "requests": (options.requests, 1),
        "prompt_words": (options.prompt_words, 1),
        "shared_words": (options.shared_words, 0),
        "max_tokens": (options.max_tokens, 1),
        "arriving_words": (options.arriving_words, 0),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}: write {lowest} or more", param=name)
    if options.shared_words > options.prompt_words:
        raise UsageError(
            f"--shared-words {options.shared_words}: at most the {options.prompt_words} words of "
            "--prompt-words",
            param="shared_words",
        )
    if options.svg is not None:
        if options.arriving_words:
            raise UsageError("--svg: there is no plot of --arriving-words", param="svg")
        writable(options.svg, "svg")


def _servers(options: BenchOptions, load: loads.Load) -> list[servers.Server]:
    if options.model is None:
        raise UsageError("nothing to measure: add --url URL, or --model FILE", param="model")
    pair = parse_pair(options.cache_type)
    each = load.prompt_words + load.max_tokens + _TEMPLATE_TOKENS
    arriving = options.arriving_words and options.arriving_words + _TEMPLATE_TOKENS
    settings = servers.Settings(
        model=str(open_model(load_settings({"model": options.model})).file.path),
        n_ctx=-(-(each * load.streams + arriving) // 256) * 256,
        n_parallel=load.streams + (1 if arriving else 0),
        cache_type_k=pair.k,
        cache_type_v=pair.v,
        n_threads=options.threads,
        gpu_layers=0 if options.cpu else 999,
    )
    started = [servers.kvserve(settings)]
    for rival in options.versus:
        name, equals, rest = rival.partition("=")
        if name != "llama-server" or not equals:
            raise UsageError(
                f"--versus {rival}: write llama-server=PATH, with further flags after it",
                param="versus",
            )
        program, *modes = rest.split() or [""]
        if shutil.which(program) is None:
            raise UsageError(
                f"--versus {rival}: there is no program {program}: check the path", param="versus"
            )
        started.append(servers.llama_server(program, settings, modes))
    return started
