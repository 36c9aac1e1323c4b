"""Decode speed that a plan should give: a bandwidth model, used until a measurement exists."""

from kvserve.core.dtypes import LADDER, CachePair
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import kv_bytes, recurrent_bytes
from kvserve.core.plan import Launch
from kvserve.core.shape import LayerShape, ModelShape

HOST_BANDWIDTH = 40e9
"""Bytes/s of a desktop's dual-channel memory as decode gets it; a prior."""

_GPU_EFFICIENCY = 0.85
_SECONDS_PER_GPU_LAYER = 70e-6
"""Launch and synchronisation of one layer: with it the model gives 259 tokens/s for an 8B Q4_K_M
at depth 0 on an H100, where 261 were measured."""


def predict_tps(shape: ModelShape, launch: Launch, machine: Machine) -> float | None:
    """Tokens/s of one stream with a full context; None where that cannot be told.

    Every weight in use and the whole cache are read once for each token. Dequantization costs
    nothing in this model, so the figure flatters quantized types on GPUs that are not bound by
    bandwidth. On the CPU it would be wrong altogether: only f16 has a fast path there
    (ggml-cpu/ops.cpp), so nothing is said of the other types.
    """
    if launch.backend is Backend.CPU and launch.pair.quantized:
        return None
    if launch.backend is Backend.CPU:
        gpu_bandwidth: float | None = HOST_BANDWIDTH
    else:
        known = [gpu.bandwidth for gpu in machine.gpus]
        bandwidths = [b for b in known if b is not None]
        gpu_bandwidth = min(bandwidths) if known and len(bandwidths) == len(known) else None
    if gpu_bandwidth is None:
        return None
    first_on_gpu = shape.n_layer + 1 - launch.n_gpu_layers
    gpu_read, host_read, n_gpu_layers = 0, 0, 0
    for layer in shape.layers:
        dense = layer.weights_bytes - layer.expert_bytes + kv_bytes(layer, launch)
        dense += recurrent_bytes(layer, launch) // max(1, launch.n_parallel)
        experts = _expert_bytes_read(shape, layer)
        if launch.backend is Backend.CUDA and layer.index >= first_on_gpu:
            n_gpu_layers += 1
            gpu_read += dense
            if layer.index < launch.n_cpu_moe:
                host_read += experts
            else:
                gpu_read += experts
        else:
            host_read += dense + experts
    if launch.backend is Backend.CUDA and launch.n_gpu_layers > 0:
        gpu_read += shape.output_bytes
    else:
        host_read += shape.output_bytes
    seconds = gpu_read / (gpu_bandwidth * _GPU_EFFICIENCY) + host_read / HOST_BANDWIDTH
    return 1 / (seconds + n_gpu_layers * _SECONDS_PER_GPU_LAYER)


ARTICLE_TPS = {"f16": 30, "q8_0": 39, "q4_0": 46}
"""What a published estimate gives for Llama-3-8B Q4_K_M at 32K: 272 GB/s (an RTX 4060) over 4.9 GB
of weights and 4, 2 or 1 GB of cache. It is the reason why quantized caches are thought faster."""


def bandwidth_ratio(shape: ModelShape, pair: CachePair, depth: int) -> float:
    """Decode speed of `pair` over f16's with `depth` tokens in the cache, if a token took the time
    in which weights and cache are read once: the idea behind `ARTICLE_TPS`, with the types' real
    sizes. Measured speeds beside it show how far bandwidth is what counts."""
    weights = sum(
        layer.weights_bytes - layer.expert_bytes + _expert_bytes_read(shape, layer)
        for layer in shape.layers
    )
    read = []
    for each in (LADDER[0], pair):
        launch = Launch(Backend.CUDA, each, max(1, depth), 1, 512, 512, shape.n_layer + 1)
        cache = sum(kv_bytes(layer, launch) for layer in shape.layers) if depth else 0
        read.append(weights + shape.output_bytes + cache)
    return read[0] / read[1]


def _expert_bytes_read(shape: ModelShape, layer: LayerShape) -> int:
    if not shape.n_expert:
        return layer.expert_bytes
    return layer.expert_bytes * shape.n_expert_used // shape.n_expert
