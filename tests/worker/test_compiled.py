"""Machine code draws the tokens that NumPy draws."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker import compiled, together
from kvserve.worker.together import Plain, Settings

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "kvserve/worker/compiled/draws.c"

needs_compiled = pytest.mark.skipif(
    not compiled.AVAILABLE, reason="kvserve was installed without a C compiler"
)

PLAIN = st.builds(
    Plain,
    top_k=st.integers(1, 100),
    top_p=st.sampled_from((1.0, 1.0, 0.99, 0.7, 0.2, 0.0)),
    depth=st.sampled_from((-np.inf, -np.inf, -5.0, -0.7, 0.0)),
    temperature=st.sampled_from((0.2, 0.8, 1.0, 3.0)),
)


def rows_of(seed: int, n: int, n_vocab: int, n_values: int | None, n_ruled_out: int) -> np.ndarray:
    """Rows of logits; with `n_values` many are equal; some are banned or ruled out."""
    dice = np.random.default_rng(seed)
    rows = dice.normal(0, 3, size=(n, n_vocab)).astype(np.float32)
    if n_values is not None:
        rows = np.round(rows * n_values / 12) * np.float32(12 / n_values)
    for row in rows:
        row[dice.integers(0, n_vocab, n_ruled_out)] = -np.inf
        row[dice.integers(0, n_vocab, n_ruled_out)] = -1e9
    return rows


def with_numpy(rows: np.ndarray, index: np.ndarray, chosen: Settings, numbers: list) -> list:
    found = together.candidates(rows, index, chosen.top_k)
    return together.draw(found, chosen, np.array(numbers)).tolist()


def quick_draws(index: np.ndarray, chosen: Settings) -> compiled.Draws:
    quick = together.compiled_draws(index, chosen)
    assert quick is not None
    return quick


@needs_compiled
@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    plain=st.lists(PLAIN, min_size=1, max_size=9),
    n_vocab=st.sampled_from((1600, 2000, 2048, 5003, 32_000)),
    n_values=st.sampled_from((None, None, 1, 5, 40, 400)),
    n_ruled_out=st.sampled_from((0, 0, 50, 3000)),
    n_threads=st.integers(1, 3),
)
def test_same_tokens_as_numpy(
    seed: int,
    plain: list[Plain],
    n_vocab: int,
    n_values: int | None,
    n_ruled_out: int,
    n_threads: int,
) -> None:
    n = len(plain)
    rows = rows_of(seed, n + 2, n_vocab, n_values, n_ruled_out)
    dice = np.random.default_rng(seed)
    index, numbers = dice.permutation(n + 2)[:n], dice.random(n).tolist()
    chosen = Settings.of(plain)
    quick = quick_draws(index, chosen)
    drawn, expected = quick(rows, numbers, n_threads), with_numpy(rows, index, chosen, numbers)
    # Where many are equal, the two look at more than they can hold at different times.
    both = [
        (one, other) for one, other in zip(drawn, expected, strict=True) if -1 not in (one, other)
    ]
    assert all(one == other for one, other in both)
    if n_values is None:
        assert drawn == expected


@needs_compiled
@pytest.mark.parametrize("n_vocab", [31_999, 128_256, 262_144])
def test_the_whole_range_of_numbers(n_vocab: int) -> None:
    rows = rows_of(3, 1, n_vocab, None, 100)
    index, chosen = np.array([0]), Settings.of([Plain(40, 0.95, -4.0, 0.9)])
    quick = quick_draws(index, chosen)
    numbers = [0.0, *np.linspace(0, 1, 200)[1:-1].tolist(), float(np.nextafter(1, 0))]
    drawn = [quick(rows, [number], 1)[0] for number in numbers]
    assert drawn == [with_numpy(rows, index, chosen, [number])[0] for number in numbers]
    assert len(set(drawn)) > 5
    assert drawn == sorted(drawn), "along the vocabulary"


@needs_compiled
@pytest.mark.parametrize("n_vocab", [64, 255, 256, 257, 1000, 70_001])
def test_the_best_wherever_it_stands(n_vocab: int) -> None:
    chosen = Settings.of([Plain(1, 1.0, -np.inf, 1.0)])
    quick = quick_draws(np.array([0]), chosen)
    places = {0, 1, 63, n_vocab // 2, n_vocab - 2, n_vocab - 1, *range(0, n_vocab, 997)}
    for place in places:
        row = np.full((1, n_vocab), -3.0, dtype=np.float32)
        row[0, place] = 2.0
        assert quick(row, [0.5], 1) == [place]


@needs_compiled
@pytest.mark.parametrize(("begin", "end", "others"), [(1024, 3072, -9.0), (5000, 6110, -np.inf)])
def test_the_likeliest_side_by_side(begin: int, end: int, others: float) -> None:
    """In fewer columns than there are of them, as under a grammar."""
    row = np.full((1, 128_256), others, dtype=np.float32)
    row[0, begin:end] = np.random.default_rng(2).permutation(end - begin) / np.float32(500)
    index, chosen = np.array([0]), Settings.of([Plain(40, 0.95, -np.inf, 1.0)])
    quick = quick_draws(index, chosen)
    for number in np.linspace(0, 0.999, 25).tolist():
        drawn = quick(row, [number], 1)
        assert drawn == with_numpy(row, index, chosen, [number])
        assert drawn != [-1]


@needs_compiled
def test_what_would_be_read_beyond_the_rows_is_refused() -> None:
    rows, chosen = rows_of(1, 3, 2000, None, 0), Settings.of([Plain(9, 1.0, -np.inf, 1.0)] * 2)
    quick = quick_draws(np.array([0, 3]), chosen)
    with pytest.raises(ValueError, match="too few"):
        quick(rows, [0.1, 0.2], 1)
    with pytest.raises(ValueError, match="too few"):
        quick(np.vstack((rows, rows)), [0.1], 1)


@needs_compiled
def test_a_library_of_another_source_is_not_called(build: types.ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "draws.c"
    source.write_bytes(SOURCE.read_bytes())
    with pytest.raises(OSError, match=r"draws\.so"):
        compiled.load(source)
    assert build.compile_library(source, source.with_suffix(".so")) is None
    assert compiled.load(source) is not None
    source.write_text(source.read_text() + "/* newer */\n")
    with pytest.raises(OSError, match=r"made of another draws\.c"):
        compiled.load(source)
    other = tmp_path / "else.c"
    other.write_text("int answer = 42;\n")
    assert build.compile_library(other, other.with_suffix(".so")) is None
    with pytest.raises(OSError, match="something else"):
        compiled.load(other)


@needs_compiled
def test_rows_that_leave_no_choice() -> None:
    rows = np.zeros((6, 3000), dtype=np.float32)
    rows[0], rows[1], rows[2], rows[3] = -np.inf, np.nan, -1e9, np.nan
    rows[3, 2999] = 1.0
    rows[4, 7] = np.inf
    chosen = Settings.of([Plain(5, 0.9, -1.0, 1.0)] * 6)
    quick = quick_draws(np.arange(6), chosen)
    assert quick(rows, [0.5] * 6, 2) == [-1, -1, -1, 2999, -1, -1]


@needs_compiled
def test_rows_that_do_not_lie_side_by_side() -> None:
    rows = rows_of(5, 4, 4000, None, 0)
    chosen = Settings.of([Plain(9, 0.9, -3.0, 1.0)] * 2)
    quick = quick_draws(np.array([1, 0]), chosen)
    expected = quick(rows[::2].copy(), [0.3, 0.6], 1)
    assert quick(rows[::2], [0.3, 0.6], 1) == expected
    assert quick(rows[::2].astype(np.float64), [0.3, 0.6], 1) == expected


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The build's script, without hatchling."""
    name = "hatchling.builders.hooks.plugin.interface"
    for part in range(1, name.count(".") + 2):
        module = types.ModuleType(".".join(name.split(".")[:part]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[name].BuildHookInterface = object
    path = ROOT / "scripts/build_compiled.py"
    spec = importlib.util.spec_from_file_location("build_compiled", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@needs_compiled
def test_compiles_without_openmp_too(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = tmp_path / "picky"
    picky.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    picky.chmod(0o755)
    monkeypatch.setenv("CC", str(picky))
    monkeypatch.setenv("CFLAGS", "-Wall -Wextra -Werror -Wno-unknown-pragmas")
    assert build.compile_library(SOURCE, tmp_path / "draws.so") is None
    assert [path.name for path in tmp_path.glob("draws*")] == ["draws.so"]


def test_says_why_it_was_not_compiled(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.compile_library(SOURCE, tmp_path / "draws.so") == "there is no C compiler"
    monkeypatch.setenv("CC", "false")
    assert "false failed" in build.compile_library(SOURCE, tmp_path / "draws.so")
    assert not list(tmp_path.iterdir())
