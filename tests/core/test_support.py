"""What a build can do, read from llama.cpp's own description."""

from kvserve.core.dtypes import CachePair, KvType, parse_pair
from kvserve.core.machine import Backend, Build
from kvserve.core.support import parse_fa_quants, why_slow

CUDA_INFO = (
    "CUDA : ARCHS = 900 | USE_GRAPHS = 1 | FA_QUANTS = f16-f16,bf16-bf16,q8_0-q8_0,q8_0-q4_0 | "
    "CPU : SSE3 = 1 | AVX2 = 1 | REPACK = 1 | "
)


def test_the_compiled_pairs_are_read() -> None:
    pairs = parse_fa_quants(CUDA_INFO)
    assert pairs == {parse_pair(p) for p in ("f16", "bf16", "q8_0", "q8_0:q4_0")}


def test_a_build_that_says_nothing_or_something_new_is_read_too() -> None:
    assert parse_fa_quants("CPU : SSE3 = 1 | ") is None
    assert parse_fa_quants("CUDA : FA_QUANTS = q8_0-q8_0,q3_9-q3_9 | ") == {parse_pair("q8_0")}


def test_every_pair_runs_on_the_cpu() -> None:
    build = Build("x", cuda=False)
    assert why_slow(CachePair(KvType.IQ4_NL, KvType.Q4_1), Backend.CPU, build) is None


def test_an_uncompiled_pair_is_converted_and_iq4_nl_leaves_the_gpu() -> None:
    build = Build("x", cuda=True, kv_pairs=parse_fa_quants(CUDA_INFO))
    assert why_slow(parse_pair("q8_0:q4_0"), Backend.CUDA, build) is None
    assert "converted to f16" in (why_slow(parse_pair("q5_1"), Backend.CUDA, build) or "")
    assert "on the CPU" in (why_slow(parse_pair("iq4_nl"), Backend.CUDA, build) or "")
