"""KV types against the block structs of ggml-common.h."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import LADDER, CachePair, KvType, parse_pair, row_bytes


@pytest.mark.parametrize("kv_type", list(KvType))
def test_block_bytes_are_ggmls(kv_type: KvType) -> None:
    elements, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kv_type.name]]
    assert kv_type.block_bytes * elements == size_bytes * 32


def test_quantized_types_are_not_a_half_and_a_quarter() -> None:
    # The seed article takes 0.5 and 0.25; the block scales make it more.
    f16 = row_bytes(KvType.F16, 1024)
    assert row_bytes(KvType.Q8_0, 1024) / f16 == pytest.approx(0.53125)
    assert row_bytes(KvType.Q4_0, 1024) / f16 == pytest.approx(0.28125)


def test_a_quantized_row_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        row_bytes(KvType.Q4_0, 80)
    assert row_bytes(KvType.F16, 80) == 160


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("q8_0", CachePair(KvType.Q8_0, KvType.Q8_0)),
        (" Q8_0:q4_0 ", CachePair(KvType.Q8_0, KvType.Q4_0)),
        ("f16", CachePair(KvType.F16, KvType.F16)),
    ],
)
def test_pairs_are_read(text: str, pair: CachePair) -> None:
    assert parse_pair(text) == pair


@pytest.mark.parametrize("text", ["", "q9_0", "q8_0:", ":q8_0", "q8_0:q4_0:f16", "auto"])
def test_other_text_is_refused_with_the_known_types(text: str) -> None:
    with pytest.raises(ValueError, match="q8_0:q4_0"):
        parse_pair(text)


@given(st.sampled_from(list(KvType)), st.sampled_from(list(KvType)))
def test_a_pair_reads_back_as_itself(k: KvType, v: KvType) -> None:
    assert parse_pair(str(CachePair(k, v))) == CachePair(k, v)


def test_the_ladder_descends_and_keeps_keys_above_values() -> None:
    assert all(pair.k.precision >= pair.v.precision for pair in LADDER)
    sizes = [row_bytes(p.k, 1024) + row_bytes(p.v, 1024) for p in LADDER]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
