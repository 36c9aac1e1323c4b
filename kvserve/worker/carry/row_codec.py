"""Rows of any KV type to f32 and back, by ggml's own code, at addresses in memory.

The CPU backend's vectorised routines are taken where the library has them: they are what its
caches are written with. Else the portable ones of ggml-base, which give the same values to within
the rounding of one step.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvserve.core.dtypes import KvType
from kvserve.worker import llama
from kvserve.worker.carry.structure import GGML_TYPES

Convert = Callable[[int, int, int], object]
"""Address to read, address to write, number of elements. Drops the GIL."""

_QUANTIZED = tuple(kv_type for kv_type in KvType if kv_type.quantized)
_ROW_TO_F32 = {
    KvType.F32: ("ggml_cpu_fp32_to_fp32",),
    KvType.F16: ("ggml_cpu_fp16_to_fp32", "ggml_fp16_to_fp32_row"),
    KvType.BF16: ("ggml_cpu_bf16_to_fp32", "ggml_bf16_to_fp32_row"),
} | {kv_type: (f"dequantize_row_{kv_type}",) for kv_type in _QUANTIZED}
_ROW = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class RowCodec:
    """How rows are read as f32, and written from f32, by type. Thread-safe."""

    to_f32: Mapping[KvType, Convert]
    from_f32: Mapping[KvType, Convert]


@functools.cache
def row_codec() -> RowCodec:
    """The codec of the library that this process has loaded."""
    library = llama.library()
    return RowCodec(
        {kv_type: _reader(library, kv_type) for kv_type in KvType},
        {kv_type: _writer(library, kv_type) for kv_type in KvType},
    )


def _reader(library: ctypes.CDLL, kv_type: KvType) -> Convert:
    for name in _ROW_TO_F32[kv_type]:
        address = _address(library, name)
        if address is not None:
            return _ROW(address)
    assert kv_type is KvType.F32
    return _copy_f32


def _writer(library: ctypes.CDLL, kv_type: KvType) -> Convert:
    return _cpu_writer(library, kv_type) or _portable_writer(library, kv_type)


class _CpuTraits(ctypes.Structure):
    """The front of `struct ggml_type_traits_cpu` (ggml/include/ggml-cpu.h)."""

    _fields_ = (("from_float", ctypes.c_void_p),)


def _cpu_writer(library: ctypes.CDLL, kv_type: KvType) -> Convert | None:
    if _address(library, "ggml_get_type_traits_cpu") is None:
        return None
    library.ggml_cpu_init()  # its tables; does nothing the second time
    get_traits = ctypes.CFUNCTYPE(ctypes.POINTER(_CpuTraits), ctypes.c_int)(
        ("ggml_get_type_traits_cpu", library)
    )
    from_float = get_traits(GGML_TYPES[kv_type]).contents.from_float
    return _ROW(from_float) if from_float else None


def _portable_writer(library: ctypes.CDLL, kv_type: KvType) -> Convert:
    quantize = ctypes.CFUNCTYPE(
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )(("ggml_quantize_chunk", library))
    ggml_type = GGML_TYPES[kv_type]

    def write(source: int, target: int, n_elements: int) -> None:
        quantize(ggml_type, source, target, 0, 1, n_elements, None)

    return write


def _copy_f32(source: int, target: int, n_elements: int) -> None:
    ctypes.memmove(target, source, 4 * n_elements)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None
