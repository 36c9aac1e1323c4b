"""GGUF bytes made by hand, for files that no writer would write."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10
F32, Q4_K = 0, 12


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def array(element_type: int, elements: Iterable[bytes], count: int | None = None) -> bytes:
    every = list(elements)
    return u32(element_type) + u64(len(every) if count is None else count) + b"".join(every)


def pair(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return string(key) + u32(value_type) + value


def tensor(
    name: str | bytes,
    dims: Iterable[int] = (32, 8),
    kind: int = F32,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    every = list(dims)
    count = len(every) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(map(u64, every)) + u32(kind) + u64(offset)


LLAMA = (
    pair("general.architecture", STRING, string("llama")),
    pair("llama.block_count", U32, u32(1)),
    pair("llama.embedding_length", U32, u32(32)),
    pair("llama.context_length", U32, u32(512)),
    pair("llama.feed_forward_length", U32, u32(64)),
    pair("llama.attention.head_count", U32, u32(1)),
    pair("tokenizer.ggml.tokens", ARRAY, array(STRING, [string(f"t{i}") for i in range(8)])),
    pair("tokenizer.ggml.scores", ARRAY, array(6, [struct.pack("<f", 0.5)] * 8)),
)
TENSORS = (
    tensor("token_embd.weight"),
    tensor("output_norm.weight", (32,), offset=1024),
    tensor("blk.0.attn_q.weight", (32, 32), offset=1024 + 128),
)
DATA_BYTES = 1024 + 128 + 4096


@dataclass(frozen=True, slots=True)
class RawFile:
    """The fields of a GGUF file; the defaults make a small model that can be read."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    pairs: tuple[bytes, ...] = LLAMA
    tensors: tuple[bytes, ...] = TENSORS
    alignment: int = 32
    data: bytes = field(default=bytes(DATA_BYTES))

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.pairs) if self.n_keys is None else self.n_keys
        start = self.magic + u32(self.version) + u64(n_tensors) + u64(n_keys)
        return start + b"".join(self.pairs) + b"".join(self.tensors)

    def __bytes__(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data
