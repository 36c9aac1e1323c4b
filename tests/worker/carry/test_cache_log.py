from pathlib import Path

import pytest

from kvserve.core.dtypes import KvType
from kvserve.worker.carry.cache_log import CacheLog
from kvserve.worker.carry.layout import CacheLayout, StateLayout

SIZE = (
    "llama_kv_cache: size =    0.13 MiB (   512 cells, {layers:3d} layers,  4/1 seqs), "
    "K ({k}):    0.07 MiB, V ({v}):    0.07 MiB\n"
)
ROTATION = (
    "llama_kv_cache: attn_rot_k = {k}, n_embd_head_k_all = {head_k}\n"
    "llama_kv_cache: attn_rot_v = {v}, n_embd_head_k_all = {head_v}\n"
)
RECURRENT = "llama_memory_recurrent: size =    0.27 MiB (     4 cells,   2 layers,  4 seqs)\n"


def cache(k: str = "q8_0", v: str = "q8_0", head_k: int = 128, head_v: int = 128) -> str:
    rotation = ROTATION.format(
        k=int(k[0] == "q" and head_k % 64 == 0),
        v=int(v[0] == "q" and head_v > 0 and head_v % 64 == 0),
        head_k=head_k,
        head_v=head_v,
    )
    return SIZE.format(layers=2, k=k, v=v) + rotation


def read(text: str, cell_ext_bytes: int = 0) -> StateLayout | None:
    log = CacheLog()
    for begin in range(0, len(text), 7):
        log.feed(text[begin : begin + 7])
    return log.layout(cell_ext_bytes)


def sliding(base: str, swa: str) -> str:
    return (
        "llama_kv_cache_iswa: creating non-SWA KV cache, size = 512 cells\n"
        + base
        + "llama_kv_cache_iswa: creating     SWA KV cache, size = 512 cells\n"
        + swa
    )


def test_a_plain_cache() -> None:
    assert read(cache("q8_0", "q4_0", 256, 256)) == StateLayout(
        (CacheLayout(2, KvType.Q8_0, KvType.Q4_0, 256, 256, 256, 64),)
    )


@pytest.mark.parametrize(
    ("head", "chunk"), [(64, 64), (128, 128), (192, 64), (320, 64), (512, 512)]
)
def test_the_chunk_of_k_is_the_largest_power_of_two_in_the_head(head: int, chunk: int) -> None:
    layout = read(cache(head_k=head, head_v=head))
    assert layout is not None
    assert (layout.caches[0].rot_k, layout.caches[0].rot_v) == (chunk, 64)


def test_unrotated_caches() -> None:
    f16 = read(cache("f16", "f16"))
    assert f16 == StateLayout((CacheLayout(2, KvType.F16, KvType.F16, 128, 128),))
    odd = read(cache(head_k=80, head_v=80))
    assert odd == StateLayout((CacheLayout(2, KvType.Q8_0, KvType.Q8_0, 80, 80),))


def test_heads_that_differ_between_layers_have_no_size() -> None:
    layout = read(cache(head_k=-1, head_v=-1).replace("rot_k = 1", "rot_k = 0"))
    assert layout == StateLayout((CacheLayout(2, KvType.Q8_0, KvType.Q8_0),))


def test_latent_attention_is_not_rotated_though_it_says_so() -> None:
    text = cache(head_k=576, head_v=0)
    assert "attn_rot_k = 1" in text
    assert read(text) == StateLayout((CacheLayout(2, KvType.Q8_0, None, 576),))


def test_sliding_windows_have_a_layout_each() -> None:
    layout = read(sliding(cache(head_k=512, head_v=512), cache(head_k=256, head_v=256)))
    assert layout is not None
    assert [part.rot_k for part in layout.caches] == [512, 256]


def test_recurrent_alone_and_hybrid() -> None:
    assert read(RECURRENT) == StateLayout((), recurrent=True)
    hybrid = read(cache() + RECURRENT, cell_ext_bytes=12)
    assert hybrid is not None
    assert (len(hybrid.caches), hybrid.recurrent, hybrid.cell_ext_bytes) == (1, True, 12)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(SIZE.format(layers=2, k="f16", v="f16"), id="no rotation lines"),
        pytest.param(cache().replace("q8_0", "q9_9"), id="unknown type"),
        pytest.param(cache(head_k=80).replace("rot_k = 0", "rot_k = 1"), id="odd rotation"),
        pytest.param(cache() + cache(), id="two caches without windows"),
        pytest.param(sliding(cache(), ""), id="one cache with windows"),
        pytest.param(sliding(cache(), cache()) + cache(), id="a third cache"),
        pytest.param(RECURRENT + RECURRENT, id="two recurrent memories"),
        pytest.param(
            "llama_kv_cache_dsa: creating main KV cache, size = 512 cells\n" + cache(), id="DSA"
        ),
        pytest.param(
            cache() + "llama_memory_hybrid_idx: creating indexer KV cache, size = 512 cells\n",
            id="indexer",
        ),
        pytest.param(
            "llama_kv_cache_dsv4: creating DSV4 raw KV cache\n" + sliding(cache(), cache()),
            id="DSV4",
        ),
    ],
)
def test_an_unknown_memory_has_no_layout(text: str) -> None:
    assert read(text) is None


def test_the_words_are_those_of_this_llama_cpp(backend, small_model) -> None:
    path: Path = small_model("gpt-oss")
    layout = backend.context(path, "q8_0:q4_0").state_layout
    part = CacheLayout(1, KvType.Q8_0, KvType.Q4_0, 64, 64, 64, 64)
    assert layout == StateLayout((part, part))
