"""Which K-V pairs a build can run well on a device with a given model."""

from kvserve.core.dtypes import CachePair, KvType, parse_pair
from kvserve.core.machine import Backend, Build
from kvserve.core.memory import supports_rows
from kvserve.core.shape import ModelShape

DEFAULT_CUDA_PAIRS = frozenset(
    CachePair(t, t) for t in (KvType.F16, KvType.BF16, KvType.Q8_0, KvType.Q4_0)
)
"""What ggml compiles where GGML_CUDA_FA_QUANTS is not set (ggml-cuda/CMakeLists.txt)."""

_CONVERTED = frozenset(
    (KvType.F16, KvType.BF16, KvType.Q4_0, KvType.Q4_1, KvType.Q5_0, KvType.Q5_1, KvType.Q8_0)
)


def parse_fa_quants(system_info: str) -> frozenset[CachePair] | None:
    """The compiled pairs out of `llama_print_system_info()`, None where it names none.

    The field reads `FA_QUANTS = f16-f16,q8_0-q4_0,…` (K first). Unknown types are skipped.
    """
    _, found, rest = system_info.partition("FA_QUANTS = ")
    if not found:
        return None
    pairs = set()
    for item in rest.split("|")[0].strip().split(","):
        try:
            pairs.add(parse_pair(item.strip().replace("-", ":")))
        except ValueError:
            continue
    return frozenset(pairs)


def why_impossible(pair: CachePair, shape: ModelShape) -> str | None:
    """Why llama.cpp would refuse this pair for this model; None where it would not."""
    for half, kv_type in (("K", pair.k), ("V", pair.v)):
        if not supports_rows(shape, kv_type):
            return f"{half} cannot be {kv_type}: the head size is no multiple of 32"
    if shape.mla and pair.k is not pair.v:
        return "this model's cache holds K only and needs one type for both"
    return None


def why_slow(pair: CachePair, backend: Backend, build: Build) -> str | None:
    """Why this pair runs badly on this build, though it runs; None where it is as fast as any."""
    if backend is Backend.CPU:
        return None
    compiled = DEFAULT_CUDA_PAIRS if build.kv_pairs is None else build.kv_pairs
    if pair in compiled:
        return None
    if pair.k in _CONVERTED and pair.v in _CONVERTED:
        return "no compiled kernel in this build: converted to f16 at every step"
    return "no CUDA kernel: attention would run on the CPU"
