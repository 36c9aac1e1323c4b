"""A load's settings as llama.cpp's parameter structs."""

import ctypes

import llama_cpp.llama_cpp as ll

from kvserve.core.dtypes import KvType
from kvserve.ipc.messages import Load

GGML_TYPES = {
    KvType.F32: ll.GGML_TYPE_F32,
    KvType.F16: ll.GGML_TYPE_F16,
    KvType.BF16: 30,  # ggml.h; the bindings leave it out
    KvType.Q8_0: ll.GGML_TYPE_Q8_0,
    KvType.Q5_1: ll.GGML_TYPE_Q5_1,
    KvType.Q5_0: ll.GGML_TYPE_Q5_0,
    KvType.Q4_1: ll.GGML_TYPE_Q4_1,
    KvType.Q4_0: ll.GGML_TYPE_Q4_0,
    KvType.IQ4_NL: ll.GGML_TYPE_IQ4_NL,
}


def model_params(load: Load) -> tuple[ll.llama_model_params, object]:
    """The model parameters of a load, and what must live as long as they do."""
    params = ll.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers
    params.use_extra_bufts = load.extra_buffers
    shares = (ctypes.c_float * max(ll.llama_max_devices(), len(load.tensor_split)))()
    if load.tensor_split:
        shares[: len(load.tensor_split)] = load.tensor_split
        params.tensor_split = shares
    overrides = _experts_on_host(load.n_cpu_moe)
    if load.n_cpu_moe > 0:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params, (shares, overrides)


def context_params(load: Load) -> ll.llama_context_params:
    """The context parameters of a load; sequences share its cache, sliding windows keep theirs."""
    params = ll.llama_context_default_params()
    params.n_ctx = load.n_ctx
    params.n_seq_max = load.n_seq_max
    # Each running sequence needs a place in every batch.
    params.n_batch = max(load.n_batch, load.n_seq_max)
    params.n_ubatch = load.n_ubatch
    # Without this the compute buffer holds logits for every token of a micro-batch.
    params.n_outputs_max = load.n_seq_max + load.n_draft
    params.n_outputs_max_per_seq = 1
    params.n_threads = load.n_threads
    params.n_threads_batch = load.n_threads_batch
    params.type_k = GGML_TYPES[KvType(load.type_k)]
    params.type_v = GGML_TYPES[KvType(load.type_v)]
    params.flash_attn_type = (
        ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if load.flash_attn else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.kv_unified = True
    params.offload_kqv = True
    params.swa_full = False
    params.no_perf = True
    return params  # type: ignore[no-any-return]


class _BufferOverride(ctypes.Structure):
    """`llama_model_tensor_buft_override`; the bindings leave it out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _experts_on_host(n_layers: int) -> "ctypes.Array[_BufferOverride]":
    """Overrides that keep the routed experts of the first layers in host memory, as llama.cpp's
    `--n-cpu-moe` does (common/common.h); ends with an empty one."""
    host_buffer_type = ll._lib.ggml_backend_cpu_buffer_type
    host_buffer_type.restype = ctypes.c_void_p
    overrides = (_BufferOverride * (n_layers + 1))()
    for layer in range(n_layers):
        pattern = rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
        overrides[layer] = _BufferOverride(pattern.encode(), host_buffer_type())
    return overrides
