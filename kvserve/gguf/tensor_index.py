"""The index of tensors in a GGUF header, checked as ggml's own reader checks it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvserve.gguf.refusal import CONVERT_AGAIN, DOWNLOAD_AGAIN, bad_file, shown
from kvserve.gguf.source import HeaderSource
from kvserve.gguf.tensor_types import REMOVED_TENSOR_TYPES, TENSOR_TYPES, TensorType

MAX_DIMENSIONS: Final = 4
MAX_TENSOR_NAME_BYTES: Final = 63

_MOST_ELEMENTS: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its dimensions (fastest first), type, and exact size in the file."""

    name: str
    dims: tuple[int, ...]
    type: TensorType
    offset: int
    size_bytes: int


def read_tensors(source: HeaderSource, n_tensors: int) -> tuple[TensorInfo, ...]:
    """Read the index from where `source` stands.

    Raises BadModelFile for a tensor that ggml's reader would not take.
    """
    tensors: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        name = source.name(f"name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        if name in tensors:
            raise bad_file(
                source.path,
                f"has the tensor {shown(name)} twice; it is damaged, {DOWNLOAD_AGAIN}",
            )
        tensors[name] = _read_tensor(source, name)
    return tuple(tensors.values())


def _read_tensor(source: HeaderSource, name: str) -> TensorInfo:
    path, what = source.path, f"tensor {shown(name)}"
    n_dims = source.u32(what)
    if n_dims > MAX_DIMENSIONS:
        raise bad_file(
            path, f"has {n_dims:,} dimensions in {what}, and {MAX_DIMENSIONS} are the most"
        )
    dims = tuple(source.u64(what) for _ in range(n_dims))
    tensor_type = _tensor_type(path, source.u32(what), what)
    n_elements = 1
    for dim in dims:
        n_elements *= dim
    if max((n_elements, *dims)) > _MOST_ELEMENTS:
        raise bad_file(
            path, f"has dimensions in {what} that overflow 64 bits; it is damaged, {DOWNLOAD_AGAIN}"
        )
    row = dims[0] if dims else 1
    if row % tensor_type.block_elements:
        raise bad_file(
            path,
            f"has rows of {row:,} elements in {what}, and {tensor_type.name} needs a multiple "
            f"of {tensor_type.block_elements}; it is damaged, {DOWNLOAD_AGAIN}",
        )
    size_bytes = n_elements // tensor_type.block_elements * tensor_type.block_bytes
    return TensorInfo(name, dims, tensor_type, source.u64(what), size_bytes)


def _tensor_type(path: Path, number: int, what: str) -> TensorType:
    known = TENSOR_TYPES.get(number)
    if known is not None:
        return known
    removed = REMOVED_TENSOR_TYPES.get(number)
    if removed is not None:
        raise bad_file(path, f"uses {removed} in {what}, which ggml has dropped: {CONVERT_AGAIN}")
    raise bad_file(path, f"has the unknown tensor type {number} in {what}; {DOWNLOAD_AGAIN}")


def check_places(
    source: HeaderSource, tensors: tuple[TensorInfo, ...], data_offset: int, alignment: int
) -> None:
    """Check that the tensors follow one another and end inside the file.

    Raises BadModelFile where they do not.
    """
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            raise bad_file(
                source.path,
                f"has tensor {shown(tensor.name)} at offset {tensor.offset:,} where {expected:,} "
                f"was due; it is damaged, {DOWNLOAD_AGAIN}",
            )
        expected += padded(tensor.size_bytes, alignment)
    if not tensors:
        return
    end = data_offset + tensors[-1].offset + tensors[-1].size_bytes
    if end > source.size_bytes:
        raise bad_file(
            source.path,
            f"is truncated: tensor {shown(tensors[-1].name)} ends at byte {end:,}, "
            f"the file has {source.size_bytes:,}; {DOWNLOAD_AGAIN}",
        )


def padded(size_bytes: int, alignment: int) -> int:
    """Round up to a multiple of the alignment."""
    return -(-size_bytes // alignment) * alignment
