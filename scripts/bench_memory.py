"""Computed memory beside llama.cpp's own figures, as a Markdown table by architecture."""

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvserve.core.dtypes import parse_pair
from kvserve.core.machine import Backend
from kvserve.core.memory import HOPPER_OVERHEADS, deciding, estimate
from kvserve.core.plan import Launch, Memory
from kvserve.core.shape import ModelShape
from kvserve.gguf.model import read_model
from kvserve.supervisor.confirming import Oracle
from kvserve.supervisor.measurements import Measurements
from tests.gguf.full_size import FULL_SIZE
from tests.models import write_sparse_spec

CONTEXTS = (2048, 32768, 131072)
PAIRS = ("f16", "q8_0", "q8_0:q4_0")
PARALLEL = (1, 4, 16)
LOG_BYTES = 0.01 * 2**20
"""llama.cpp logs sizes to 0.01 MiB."""


@dataclass(frozen=True)
class Row:
    """One launch: the computed and the exact bytes of the device that decides."""

    launch: Launch
    computed: Memory
    exact: Memory

    @property
    def caches_exact(self) -> bool:
        return all(
            abs(a - b) <= 2 * LOG_BYTES
            for a, b in (
                (self.computed.kv_bytes, self.exact.kv_bytes),
                (self.computed.recurrent_bytes, self.exact.recurrent_bytes),
            )
        )

    @property
    def error(self) -> float:
        exact = self.exact.compute_bytes + self.exact.output_bytes
        return (self.computed.compute_bytes + self.computed.output_bytes) / exact - 1


def launches(shape: ModelShape, *, cuda: bool) -> Iterator[Launch]:
    for n_ctx, text, n_parallel in itertools.product(CONTEXTS, PAIRS, PARALLEL):
        pair = parse_pair(text)
        if shape.mla and pair.k is not pair.v:
            continue
        yield Launch(
            backend=Backend.CUDA if cuda else Backend.CPU,
            pair=pair,
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_batch=512,
            n_ubatch=512,
            n_gpu_layers=shape.n_layer + 1 if cuda else 0,
        )


def measure(name: str, folder: Path, *, cuda: bool) -> tuple[str, list[Row], int]:
    path = write_sparse_spec(folder / "model.gguf", name, FULL_SIZE[name])
    model = read_model(path)
    oracle = Oracle(str(path), Measurements(folder / "none" / "x.json", "", ""), timeout=600)
    asked = list(launches(model.shape, cuda=cuda))
    oracle.ask(asked)
    rows = []
    for launch in asked:
        exact = oracle.findings.exact.get(launch)
        if exact is not None:
            computed = estimate(model.shape, launch, HOPPER_OVERHEADS, 1)
            rows.append(Row(launch, deciding(computed, launch), deciding(exact, launch)))
    path.unlink()
    return model.shape.architecture, rows, len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="whole models on the GPU")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(FULL_SIZE)}; default: all")
    arguments = parser.parse_args()
    every: dict[str, list[Row]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    n_asked: dict[str, int] = defaultdict(int)
    for name in arguments.models or FULL_SIZE:
        with tempfile.TemporaryDirectory() as folder:
            architecture, rows, n = measure(name, Path(folder), cuda=arguments.cuda)
        names[architecture].append(name)
        every[architecture] += rows
        n_asked[architecture] += n
        print(name, len(rows), file=sys.stderr, flush=True)
    print("| architecture | models | launches | caches exact | compute within 2 % | worst error |")
    print("|---|---|---|---|---|---|")
    for architecture, rows in every.items():
        print(_line(architecture, ", ".join(names[architecture]), rows, n_asked[architecture]))
    together = [row for rows in every.values() for row in rows]
    print(_line("all", "", together, sum(n_asked.values())))


def _line(architecture: str, models: str, rows: list[Row], n_asked: int) -> str:
    exact = sum(row.caches_exact for row in rows)
    near = sum(abs(row.error) <= 0.02 for row in rows)
    worst = max((row.error for row in rows), key=abs, default=0.0)
    n = f"{len(rows)}" if len(rows) == n_asked else f"{len(rows)} of {n_asked}"
    return f"| {architecture} | {models} | {n} | {exact} | {near} | {100 * worst:+.2f} % |"


if __name__ == "__main__":
    main()
