"""The rotation of quantized caches: multiplication by an orthonormal Hadamard matrix, in chunks.

The matrix is Sylvester's, divided by the root of its size (ggml_gen_hadamard in llama.cpp's
src/llama-kv-cache.cpp). It is symmetric and its own inverse: the same call rotates and undoes.
"""

import functools

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]

_LARGEST_MATRIX = 128
_LARGEST_PRODUCT = 2**17
"""Multiplications of one product. OpenBLAS spreads larger ones than 2^18 over threads of its own
(interface/gemm.c), which would fight with ours."""


def rotate(values: Values, chunk: int, other: Values) -> tuple[Values, Values]:
    """Multiply each `chunk` elements of `values` by the Hadamard matrix of that size.

    Both arrays are flat, contiguous and of one length, a multiple of `chunk` (a power of two).
    Returns the array that holds the result, and the one that is free; both are overwritten.
    """
    size = min(chunk, _LARGEST_MATRIX)
    _multiply(values, _scaled_matrix(size, chunk), other)
    values, other = other, values
    while size < chunk:
        # H(2n) is [[H(n), H(n)], [H(n), -H(n)]].
        halves, out = values.reshape(-1, 2, size), other.reshape(-1, 2, size)
        np.add(halves[:, 0], halves[:, 1], out=out[:, 0])
        np.subtract(halves[:, 0], halves[:, 1], out=out[:, 1])
        values, other = other, values
        size *= 2
    return values, other


def _multiply(values: Values, matrix: Values, out: Values) -> None:
    size = len(matrix)
    n_rows = _LARGEST_PRODUCT // size**2
    whole = len(values) // (n_rows * size) * n_rows * size
    shape = (-1, n_rows, size)
    np.matmul(values[:whole].reshape(shape), matrix, out=out[:whole].reshape(shape))
    if whole < len(values):
        np.matmul(values[whole:].reshape(-1, size), matrix, out=out[whole:].reshape(-1, size))


@functools.cache
def _scaled_matrix(size: int, chunk: int) -> Values:
    matrix: Values = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(np.float32(chunk))
    return matrix
