"""What a scrape of /metrics costs: pairs of runs under load, with and without scraping.

The order within a pair alternates. With --step-ms the daemon is the real one, and its worker the
scripted one, which answers 16 streams as steadily as a GPU would. Prints Markdown.
"""

import argparse
import asyncio
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

import kvserve.daemon
from kvserve.bench.load import Load, run
from kvserve.cli.app import main as cli
from kvserve.instance import Instance, find_instance
from kvserve.supervisor.process import ProcessSpawner

SCRAPES = 300


def processor_seconds(pid: int) -> float:
    """User and system time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


SCRAPER = """
import sys, time, urllib.request
while True:
    began = time.perf_counter()
    urllib.request.urlopen(sys.argv[1]).read()
    print(time.perf_counter() - began, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def measure(url: str, load: Load, interval: float | None, scrapes: list[float]) -> float:
    """Tokens a second. The scraper is another process, as Prometheus is."""
    if interval is None:
        return asyncio.run(run(f"{url}/v1", load)).tokens_per_second
    command = [sys.executable, "-c", SCRAPER, f"{url}/metrics", str(interval)]
    scraper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        return asyncio.run(run(f"{url}/v1", load)).tokens_per_second
    finally:
        scraper.terminate()
        scrapes += map(float, scraper.communicate()[0].splitlines())


def pairs(instance: Instance, options: argparse.Namespace) -> None:
    url = instance.url
    scrapes: list[float] = []
    ratios, without = [], []
    for pair in range(-1, options.pairs):  # the first one warms up
        load = Load(options.streams, 1, 48, options.max_tokens, seed=pair)
        rates: dict[bool, float] = {}
        for scraped in (False, True) if pair % 2 else (True, False):
            interval = options.interval if scraped else None
            rates[scraped] = measure(url, load, interval, scrapes)
        if pair >= 0:
            ratios.append(rates[True] / rates[False])
            without.append(rates[False])
        print(f"pair {pair}: {rates[True]:.2f}, {rates[False]:.2f} tokens/s", file=sys.stderr)
    with httpx.Client(trust_env=False) as client:
        page = (client.get(f"{instance.url}/metrics")).text
        before = processor_seconds(instance.pid)
        for _ in range(SCRAPES):
            client.get(f"{instance.url}/metrics")
        each = (processor_seconds(instance.pid) - before) / SCRAPES
    print("| figure | value |\n|---|---|")
    print(f"| streams, pairs | {options.streams}, {options.pairs} |")
    print(f"| tokens/s without scraping, median | {statistics.median(without):.1f} |")
    spread = f"{min(ratios):.3f}–{max(ratios):.3f}"
    print(f"| with / without, median (range) | {statistics.median(ratios):.3f} ({spread}) |")
    print(f"| a scrape under load, median | {1e3 * statistics.median(scrapes):.1f} ms |")
    print(f"| processor time of a scrape | {1e3 * each:.2f} ms |")
    print(f"| page | {len(page)} bytes, {page.count(chr(10))} lines |")


def serve(state: str, step_ms: float) -> int:
    """The daemon in this process, with a scripted worker."""
    script = json.dumps({"step_ms": step_ms})
    argv = (sys.executable, "-m", "kvserve.worker.fake", "--script", script)
    kvserve.daemon.ProcessSpawner = functools.partial(ProcessSpawner, argv=argv)
    sys.argv = ["kvserve", "start", "--model", "demo", "--port", "0", "--parallel", "16"]
    sys.argv += ["--state-dir", state, "--adapt", "off"]
    cli()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between scrapes")
    parser.add_argument("--step-ms", type=float, help="a scripted worker that is so fast")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.step_ms)
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "kvserve", "start", "--model", "demo", "--port", "0"]
        command += ["--parallel", str(options.streams), "--state-dir", state]
        if options.step_ms is not None:
            command = [sys.executable, __file__, "--serve", state, "--step-ms"]
            command.append(str(options.step_ms))
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert daemon.stdout is not None
        for line in daemon.stdout:
            if line.startswith("ask "):
                break
        try:
            pairs(find_instance(Path(state), None), options)
        finally:
            daemon.terminate()
            daemon.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
