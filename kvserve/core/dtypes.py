"""KV-cache element types and the K-V pairs that kvserve chooses among."""

from dataclasses import dataclass
from enum import StrEnum

BLOCK_ELEMENTS = 32


class KvType(StrEnum):
    """A ggml type that a KV cache can have (ggml/src/ggml-common.h)."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"
    IQ4_NL = "iq4_nl"

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 elements, the block scales included."""
        return _BLOCK_BYTES[self]

    @property
    def quantized(self) -> bool:
        """Whether elements are stored in blocks with a scale."""
        return self not in (KvType.F32, KvType.F16, KvType.BF16)

    @property
    def precision(self) -> int:
        """Rank by fidelity, higher is better: the order of the types' bits for each element."""
        return _PRECISION[self]


_BLOCK_BYTES = {
    KvType.F32: 128,
    KvType.F16: 64,
    KvType.BF16: 64,
    KvType.Q8_0: 34,
    KvType.Q5_1: 24,
    KvType.Q5_0: 22,
    KvType.Q4_1: 20,
    KvType.Q4_0: 18,
    KvType.IQ4_NL: 18,
}
_PRECISION = {
    KvType.F32: 9,
    KvType.F16: 8,
    KvType.BF16: 7,
    KvType.Q8_0: 6,
    KvType.Q5_1: 5,
    KvType.Q5_0: 4,
    KvType.Q4_1: 3,
    KvType.IQ4_NL: 2,
    KvType.Q4_0: 1,
}


def row_bytes(kv_type: KvType, n_elements: int) -> int:
    """Bytes of one cache row of `n_elements` (ggml_row_size; quantized rows are whole blocks).

    Raises ValueError where a quantized row does not divide into blocks of 32.
    """
    if kv_type.quantized and n_elements % BLOCK_ELEMENTS:
        raise ValueError(f"a {kv_type} row needs a multiple of 32 elements, not {n_elements}")
    return n_elements * kv_type.block_bytes // BLOCK_ELEMENTS


@dataclass(frozen=True, slots=True)
class CachePair:
    """The types of the K and the V cache."""

    k: KvType
    v: KvType

    def __str__(self) -> str:
        return f"{self.k}:{self.v}"

    @property
    def quantized(self) -> bool:
        """Whether either half is quantized."""
        return self.k.quantized or self.v.quantized


LADDER: tuple[CachePair, ...] = (
    CachePair(KvType.F16, KvType.F16),
    CachePair(KvType.Q8_0, KvType.Q8_0),
    CachePair(KvType.Q8_0, KvType.Q5_1),
    CachePair(KvType.Q8_0, KvType.Q4_0),
    CachePair(KvType.Q5_1, KvType.Q4_0),
    CachePair(KvType.Q4_0, KvType.Q4_0),
)
"""Best first. K never stands below V: every study finds keys the more sensitive half."""


def parse_pair(text: str) -> CachePair:
    """Read `q8_0` (both halves) or `q8_0:q4_0` (K:V).

    Raises ValueError that lists the known types.
    """
    k, colon, v = text.strip().lower().partition(":")
    try:
        return CachePair(KvType(k), KvType(v if colon else k))
    except ValueError:
        known = ", ".join(KvType)
        raise ValueError(
            f"{text!r} is not a cache type: write one of {known}, or K:V such as q8_0:q4_0"
        ) from None
