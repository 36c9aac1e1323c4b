import numpy as np
import pytest

from kvserve.worker.carry.hadamard import rotate


def sylvester(size: int) -> np.ndarray:
    """By the sign of the bits that row and column have in common."""
    index = np.arange(size)
    signs = [[(-1) ** (int(row) & int(column)).bit_count() for column in index] for row in index]
    return np.array(signs) / np.sqrt(size)


@pytest.mark.parametrize("chunk", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("n_chunks", [1, 7, 40])
def test_it_multiplies_each_chunk_by_the_hadamard_matrix(chunk: int, n_chunks: int) -> None:
    values = np.random.default_rng(chunk).standard_normal(n_chunks * chunk).astype(np.float32)
    expected = values.astype(np.float64).reshape(-1, chunk) @ sylvester(chunk)
    result, free = rotate(values.copy(), chunk, np.empty_like(values))
    assert free is not result
    np.testing.assert_allclose(result, expected.ravel(), atol=1e-5)


@pytest.mark.parametrize("chunk", [64, 128, 256])
def test_twice_is_nothing(chunk: int) -> None:
    values = np.random.default_rng(0).standard_normal(chunk * 50).astype(np.float32)
    once, free = rotate(values.copy(), chunk, np.empty_like(values))
    twice, _ = rotate(once, chunk, free)
    np.testing.assert_allclose(twice, values, atol=1e-5)
