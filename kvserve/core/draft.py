"""What a draft model takes beside the model that it drafts for."""

from kvserve.core.dtypes import LADDER
from kvserve.core.machine import Backend
from kvserve.core.memory import Overheads, estimate
from kvserve.core.plan import N_CTX_PADDING, DraftModel, Launch
from kvserve.core.shape import ModelShape

_NO_OVERHEADS = Overheads(gpu_bytes=0, host_bytes=0)
MOST_BATCH = 512
"""A draft model reads a prompt in batches of so many tokens at most."""
MOST_VOCAB_DIFFERENCE = 128
"""Tokens that only one of two vocabularies may have (SPEC_VOCAB_MAX_SIZE_DIFFERENCE in llama.cpp's
common/speculative.cpp)."""
_N_LENGTHS = 13
"""Up to 1,048,576 tokens."""


def draft_model(shape: ModelShape, n_parallel: int, n_batch: int) -> DraftModel:
    """The bytes of a draft model's weights, cache (f16, as many tokens as the other model's) and
    buffers, on a GPU with all its layers or on the host."""
    n_batch = min(n_batch, MOST_BATCH)
    gpu, host = (
        tuple(
            _bytes(shape, backend, N_CTX_PADDING << doubled, n_parallel, n_batch)
            for doubled in range(_N_LENGTHS)
        )
        for backend in (Backend.CUDA, Backend.CPU)
    )
    return DraftModel(gpu, host)


def _bytes(shape: ModelShape, backend: Backend, n_ctx: int, n_parallel: int, n_batch: int) -> int:
    launch = Launch(
        backend=backend,
        pair=LADDER[0],
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_batch=n_batch,
        n_ubatch=n_batch,
        n_gpu_layers=shape.n_layer + 1 if backend is Backend.CUDA else 0,
    )
    bill = estimate(shape, launch, _NO_OVERHEADS, n_gpus=1)
    return (bill.gpu if backend is Backend.CUDA else bill.host).total_bytes
