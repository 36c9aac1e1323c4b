"""Proof that a carried sequence still means the same: what the model says next.

The old worker decodes the sequence's pending token after its export and keeps the distribution;
the new one decodes the same token after the import, as it would anyway, and compares.
"""

import numpy as np

from kvserve.core.dtypes import CachePair, KvType
from kvserve.worker.carry.memory_file import LogProbs
from kvserve.worker.llama import Batch, Context

_K_LIMITS = {
    KvType.F32: 0.5,
    KvType.F16: 0.5,
    KvType.BF16: 0.5,
    KvType.Q8_0: 0.5,
    KvType.Q5_1: 1.0,
    KvType.Q5_0: 1.0,
    KvType.Q4_1: 2.0,
    KvType.IQ4_NL: 2.5,
    KvType.Q4_0: 2.5,
}
_V_LIMITS = {
    kv_type: 0.5 if kv_type.precision > KvType.Q4_1.precision else 1.0 for kv_type in KvType
}


def divergence_limit(pair: CachePair) -> float:
    """The KLD in nats, of one token, over which a sequence carried into `pair` is not trusted.

    About twice the largest that a carried cache showed, and below what a wrong one shows. Measured
    on Gemma 3 270M, 1,500 tokens of context, 256 positions, CPU, against f16. Largest carried: f16
    0.05 (the noise of another order of cells), q8_0 0.07, q8_0:q4_0 0.09, q5_1 0.37, q5_0 0.36,
    q4_1 1.1, q4_0 1.2. A q8_0 cache with the rotation left out: median 16 (K alone 4.3, V alone
    7.3); with K rotated in other chunks 4.4; all zeros 6.8. `scripts/bench-carry` repeats it.
    """
    return max(_K_LIMITS[pair.k], _V_LIMITS[pair.v])


def next_distribution(context: Context, slot: int, token: int, position: int) -> LogProbs:
    """Decode one token of a sequence; returns what comes after it. The token stays in the cache,
    and its logits are `context.logits(1)`. Raises CacheFull or DecodeError."""
    batch = Batch(1)
    batch.add(np.array([token], dtype=np.int32), position, slot, last=True)
    context.decode(batch)
    return log_softmax(context.logits(1)[0])


def log_softmax(logits: LogProbs) -> LogProbs:
    """Normalise logits, in float64; shape (n_vocab,)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted.astype(np.float32)


def divergence(reference: LogProbs, other: LogProbs) -> float:
    """KLD(reference || other) in nats; infinite where either is no distribution (NaN)."""
    p = reference.astype(np.float64)
    weight = np.exp(p)
    possible = ~(weight == 0)
    kld = float(np.sum(weight[possible] * (p[possible] - other[possible].astype(np.float64))))
    return float("inf") if np.isnan(kld) else max(kld, 0.0)
