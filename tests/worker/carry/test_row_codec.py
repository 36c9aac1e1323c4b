import gguf
import numpy as np
import pytest

from kvserve.core.dtypes import KvType, row_bytes
from kvserve.worker.carry.row_codec import _portable_writer, row_codec
from kvserve.worker.carry.structure import GGML_TYPES
from kvserve.worker.llama import library

N = 32 * 640
LEVELS = {
    KvType.Q8_0: 254,
    KvType.Q5_1: 31,
    KvType.Q5_0: 31,
    KvType.Q4_1: 15,
    KvType.Q4_0: 15,
}
"""Steps from the lowest to the highest value of a block."""


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(N).astype(np.float32)


def write(write_rows, kv_type: KvType, rows: np.ndarray) -> np.ndarray:
    out = np.zeros(row_bytes(kv_type, len(rows)), dtype=np.uint8)
    write_rows(rows.ctypes.data, out.ctypes.data, len(rows))
    return out


def read(kv_type: KvType, data: np.ndarray) -> np.ndarray:
    out = np.empty(len(data) * 32 // kv_type.block_bytes, dtype=np.float32)
    row_codec().to_f32[kv_type](data.ctypes.data, out.ctypes.data, len(out))
    return out


@pytest.mark.parametrize("kv_type", KvType)
def test_what_is_read_is_what_gguf_reads(kv_type: KvType) -> None:
    data = write(row_codec().from_f32[kv_type], kv_type, values())
    kind = gguf.GGMLQuantizationType(GGML_TYPES[kv_type])
    np.testing.assert_array_equal(read(kv_type, data), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kv_type", [one for one in KvType if one is not KvType.IQ4_NL])
def test_the_portable_routines_are_those_of_gguf(kv_type: KvType) -> None:
    kind = gguf.GGMLQuantizationType(GGML_TYPES[kv_type])
    data = write(_portable_writer(library(), kv_type), kv_type, values())
    np.testing.assert_array_equal(data, gguf.quants.quantize(values(), kind).view(np.uint8))


@pytest.mark.parametrize("kv_type", LEVELS)
def test_fast_and_portable_routines_differ_by_a_rounding_at_most(kv_type: KvType) -> None:
    rows = values()
    fast = read(kv_type, write(row_codec().from_f32[kv_type], kv_type, rows))
    portable = read(kv_type, write(_portable_writer(library(), kv_type), kv_type, rows))
    step = 2 * np.abs(rows.reshape(-1, 32)).max(axis=1) / LEVELS[kv_type]
    assert (np.abs(fast - portable).reshape(-1, 32) <= 1.02 * step[:, None]).all()
    assert (fast != portable).mean() < 0.001


@pytest.mark.parametrize("kv_type", [KvType.F32, KvType.F16, KvType.BF16])
def test_floats_survive(kv_type: KvType) -> None:
    rows = values().astype(np.float16).astype(np.float32)
    data = write(row_codec().from_f32[kv_type], kv_type, rows)
    tolerance = 2**-8 if kv_type is KvType.BF16 else 0
    np.testing.assert_allclose(read(kv_type, data), rows, rtol=tolerance)
