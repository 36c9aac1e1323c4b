"""Real contexts of small models, in this process."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvserve.core.dtypes import parse_pair
from kvserve.ipc.messages import Load
from kvserve.worker import llama
from kvserve.worker.carry.canary import next_distribution
from kvserve.worker.carry.memory_file import LogProbs, Tokens
from kvserve.worker.load_log import LoadLog

N_BATCH = 256


@dataclass(frozen=True, slots=True)
class Backend:
    """llama.cpp with its log; one for the process."""

    log: LoadLog

    def context(
        self,
        path: Path | str,
        pair: str = "f16",
        *,
        n_ctx: int = 512,
        n_threads: int = 1,
        flash_attn: bool = True,
        n_draft: int = 0,
    ) -> llama.Context:
        types = parse_pair(pair)
        load = Load(
            model_path=str(path),
            type_k=types.k,
            type_v=types.v,
            n_ctx=n_ctx,
            n_seq_max=4,
            n_batch=N_BATCH,
            n_ubatch=N_BATCH,
            n_gpu_layers=0,
            n_cpu_moe=0,
            flash_attn=flash_attn,
            n_draft=n_draft,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            extra_buffers=False,
        )
        return llama.Context(load, self.log, lambda _share: None)


def decode(context: llama.Context, slot: int, tokens: Tokens, start: int = 0) -> None:
    """Prefill tokens at positions `start` and on."""
    batch = llama.Batch(N_BATCH)
    for begin in range(0, len(tokens), N_BATCH):
        batch.clear()
        part = tokens[begin : begin + N_BATCH]
        batch.add(part, start + begin, slot, last=True)
        context.decode(batch)


def score(context: llama.Context, slot: int, tokens: Tokens, start: int) -> list[LogProbs]:
    """Decode tokens one by one; what comes after each."""
    return [
        next_distribution(context, slot, int(token), start + index)
        for index, token in enumerate(tokens)
    ]


def random_tokens(n: int, seed: int = 0) -> Tokens:
    """Tokens of a generated model's vocabulary that are plain bytes."""
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)
