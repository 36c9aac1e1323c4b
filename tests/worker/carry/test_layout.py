import pytest

from kvserve.core.dtypes import KvType, parse_pair
from kvserve.worker.carry.layout import CacheLayout, StateLayout, forecast

PAIRS = ("f16", "bf16", "q8_0", "q8_0:q5_1", "q8_0:q4_0", "q5_1:q4_0", "q5_0", "q4_1", "q4_0")
MODELS = [
    ("llama", {}),
    ("llama", {"head_dim": 192}),
    ("llama", {"head_dim": 256}),
    ("llama", {"head_dim": 96}),
    ("gemma3", {}),
    ("gpt-oss", {}),
    ("qwen35", {}),
    ("mamba2", {}),
]


@pytest.mark.parametrize(("arch", "dims"), MODELS)
def test_the_forecast_is_what_llama_cpp_then_logs(backend, small_model, arch, dims) -> None:
    path = small_model(arch, **dims)
    f16 = backend.context(path, "f16").state_layout
    assert f16 is not None
    for pair in PAIRS:
        layout = backend.context(path, pair).state_layout
        assert layout == forecast(f16, parse_pair(pair))
        assert f16 == forecast(layout, parse_pair("f16"))


@pytest.mark.parametrize("dims", [{}, {"kv_lora_rank": 96}])
def test_the_forecast_of_latent_attention(backend, small_model, dims) -> None:
    path = small_model("deepseek2", **dims)
    f16 = backend.context(path, "f16").state_layout
    for pair in ("q8_0", "q4_0"):
        assert backend.context(path, pair).state_layout == forecast(f16, parse_pair(pair))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layer": -1},
        {"n_layer": 10_000},
        {"head_k": 0},
        {"head_k": 10**9},
        {"head_k": 128, "rot_k": 32},
        {"head_k": 128, "rot_k": 256},
        {"head_k": 192, "rot_k": 192},
        {"rot_k": 64},
        {"type_v": None, "head_k": 128, "rot_k": 128},
    ],
)
def test_a_cache_that_cannot_be(fields) -> None:
    with pytest.raises(ValueError, match=r"cache|heads|memory|cells"):
        CacheLayout(**({"n_layer": 1, "type_k": KvType.Q8_0, "type_v": KvType.Q8_0} | fields))


def test_a_memory_that_cannot_be() -> None:
    part = CacheLayout(1, KvType.F16, KvType.F16)
    for fields in (
        {"caches": ()},
        {"caches": (part,) * 3},
        {"caches": (part,), "cell_ext_bytes": 8},
    ):
        with pytest.raises(ValueError, match=r"cache|heads|memory|cells"):
            StateLayout(**fields)
