"""What is expected of a pair before anything was measured; docs/quality.md has the sources."""

from dataclasses import dataclass

from kvserve.core.dtypes import CachePair, KvType, parse_pair
from kvserve.core.loss import REFERENCE_PAIR

PRIOR_KLD: dict[CachePair, float] = {
    REFERENCE_PAIR: 0.0,
    parse_pair("q8_0"): 0.007,
    parse_pair("q8_0:q5_1"): 0.008,
    parse_pair("q8_0:q4_0"): 0.011,
    parse_pair("q5_1:q4_0"): 0.027,
    parse_pair("q4_0"): 0.086,
}
"""Mean KLD in nats on Gemma 3 270M, Q4_K_M, at 1,024 tokens, rounding included (docs/quality.md).
For Qwen 3.5 and 3.6 0.004 to 0.007 are reported at q8_0."""


@dataclass(frozen=True, slots=True)
class ArchitecturePrior:
    """What the literature says of an architecture. `lowest_k` is the worst K type that may be
    chosen unmeasured; `q8_0_kld` the KLD that was reported for q8_0, None where it is as usual."""

    source: str
    lowest_k: KvType | None = None
    q8_0_kld: float | None = None


_QWEN2 = ArchitecturePrior(
    "Qwen2's keys carry a large bias and break below q8_0", lowest_k=KvType.Q8_0
)
ARCHITECTURE_PRIORS: dict[str, ArchitecturePrior] = {
    "qwen2": _QWEN2,
    "qwen2moe": _QWEN2,
    "qwen2vl": _QWEN2,
    "gpt-oss": ArchitecturePrior(
        "gpt-oss-20b loses KLD 0.055 at q8_0, with 74.9 % same top tokens", q8_0_kld=0.055
    ),
    "gemma4": ArchitecturePrior("Gemma 4 loses KLD 0.1 to 0.4 at q8_0", q8_0_kld=0.25),
}


def prior_kld(architecture: str, pair: CachePair) -> float | None:
    """The mean KLD that is expected; None where nothing is known. Where an architecture is known
    to lose more at q8_0, all lower types lose at least that."""
    usual = PRIOR_KLD.get(pair)
    known = ARCHITECTURE_PRIORS.get(architecture)
    if usual is None or known is None or not pair.quantized:
        return usual
    if known.lowest_k is not None and pair.k.precision < known.lowest_k.precision:
        return None
    return usual if known.q8_0_kld is None else max(usual, known.q8_0_kld)
