"""How a launch is laid out: padded context, micro-batch, cells of each cache, where layers lie."""

from kvserve.core.machine import Backend
from kvserve.core.plan import N_CTX_PADDING, Launch
from kvserve.core.shape import ModelShape


def pad_context(n_ctx: int) -> int:
    """`n_ctx` as llama.cpp allocates it: the next multiple of 256 (src/llama-context.cpp)."""
    return -(-n_ctx // N_CTX_PADDING) * N_CTX_PADDING


def ubatch_tokens(launch: Launch) -> int:
    """The micro-batch that llama.cpp ends up with; each running sequence needs a place in it."""
    n_batch = max(launch.n_batch, launch.n_parallel)
    return min(launch.n_ubatch, n_batch, pad_context(launch.n_ctx))


def cache_cells(window: int | None, launch: Launch) -> int:
    """Cells of one layer's cache: the context, or the sliding window's need where that is less
    (src/llama-kv-cache-iswa.cpp, unified cache)."""
    n_ctx = pad_context(launch.n_ctx)
    if window is None:
        return n_ctx
    return pad_context(min(n_ctx, window * launch.n_parallel + ubatch_tokens(launch)))


def uses_gpu(launch: Launch) -> bool:
    """Whether any layer runs on a GPU."""
    return launch.backend is Backend.CUDA and launch.n_gpu_layers > 0


def first_gpu_layer(shape: ModelShape, launch: Launch) -> int:
    """Index of the first layer on the GPU; the output counts as layer n_layer, and n_layer + 1
    means none (llama_model_base::load_tensors)."""
    if launch.backend is Backend.CPU:
        return shape.n_layer + 1
    return max(shape.n_layer + 1 - launch.n_gpu_layers, 0)


def is_split(shape: ModelShape, launch: Launch) -> bool:
    """Whether the GPU and the host both hold weights of layers."""
    return uses_gpu(launch) and (launch.n_gpu_layers <= shape.n_layer or launch.n_cpu_moe > 0)
