"""Mutated headers: each is read or refused, within bounds, and nothing else ever happens."""

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvserve.errors import BadModelFile
from kvserve.gguf.model import read_model
from tests.gguf.raw import LLAMA, STRING, U32, RawFile, array, pair, string, u32
from tests.models import write_model

FUZZ = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PER_LAYER = pair("llama.attention.head_count_kv", 9, array(U32, [u32(1)]))
TEMPLATE = pair("tokenizer.chat_template", STRING, string("{{ messages }}"))
SMALL = bytes(RawFile(pairs=(*LLAMA, PER_LAYER, TEMPLATE)))
SMALL_HEADER_BYTES = len(RawFile(pairs=(*LLAMA, PER_LAYER, TEMPLATE)).header())

INTERESTING = st.sampled_from(
    [0, 1, 2, 8, 9, 31, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
)
PLACES = st.integers(0, SMALL_HEADER_BYTES)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("word"), PLACES, INTERESTING),
        st.tuples(st.just("half"), PLACES, INTERESTING),
        st.tuples(st.just("byte"), PLACES, st.integers(0, 255)),
        st.tuples(st.just("cut"), PLACES, st.integers(0, 64)),
        st.tuples(st.just("repeat"), PLACES, st.integers(0, 64)),
        st.tuples(st.just("end"), PLACES, st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, mutations: list[tuple[str, int, int]]) -> bytes:
    raw = bytearray(content)
    for kind, place, number in mutations:
        if kind == "word":
            raw[place : place + 8] = number.to_bytes(8, "little")
        elif kind == "half":
            raw[place : place + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
        elif kind == "byte":
            raw[place : place + 1] = bytes([number])
        elif kind == "cut":
            del raw[place : place + number]
        elif kind == "repeat":
            raw[place:place] = raw[place : place + number]
        else:
            del raw[place:]
    return bytes(raw)


def read_or_refuse(path: Path) -> None:
    try:
        shape = read_model(path).shape
    except BadModelFile as error:
        refusal = error.message
    else:
        assert 1 <= shape.n_layer <= 512
        assert shape.input_bytes > 0
        return
    assert refusal.startswith(str(path))
    assert refusal.isprintable()


@FUZZ
@given(mutations=MUTATIONS)
def test_mutated_headers(mutations: list[tuple[str, int, int]], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated(SMALL, mutations))
    read_or_refuse(path)


@settings(FUZZ, max_examples=100)
@given(content=st.binary(max_size=256))
def test_bytes_after_the_magic(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    read_or_refuse(path)


@settings(FUZZ, max_examples=60)
@given(mutations=MUTATIONS)
def test_memory_and_time_are_bounded(mutations: list[tuple[str, int, int]], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated(SMALL, mutations))
    begun = time.perf_counter()
    tracemalloc.start()
    try:
        read_or_refuse(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**19
    assert time.perf_counter() - begun < 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_model(tmp_path_factory.mktemp("fuzz") / "m.gguf", "qwen35", n_embd=64, n_ff=64)
    return path.read_bytes()


@settings(FUZZ, max_examples=60)
@given(place=st.floats(0, 1), number=INTERESTING)
def test_a_written_model(place: float, number: int, written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header_bytes = written.index(b"blk.1.") + 2000
    path.write_bytes(mutated(written, [("word", int(place * header_bytes), number)]))
    read_or_refuse(path)
