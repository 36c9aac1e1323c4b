import math

import numpy as np
import pytest

from kvserve.core.dtypes import LADDER, KvType, parse_pair
from kvserve.worker.carry.canary import divergence, divergence_limit, log_softmax


def test_log_softmax() -> None:
    rows = np.array([1000.0, 999.0, -math.inf], dtype=np.float32)
    found = log_softmax(rows)
    assert np.exp(found).sum() == pytest.approx(1)
    assert found[0] - found[1] == pytest.approx(1)
    assert found[2] == -math.inf


def test_divergence() -> None:
    p = np.log(
        np.array([0.5, 0.25, 0.25, 0], dtype=np.float32),
        where=[True] * 3 + [False],
        out=np.full(4, -np.inf, np.float32),
    )
    q = np.log(np.full(4, 0.25, dtype=np.float32))
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2))
    assert divergence(q, p) == math.inf
    assert divergence(p, np.full(4, np.nan, np.float32)) == math.inf
    assert divergence(np.full(4, np.nan, np.float32), p) == math.inf


def test_a_worse_type_is_allowed_more() -> None:
    limits = [divergence_limit(pair) for pair in LADDER]
    assert limits == sorted(limits)
    assert divergence_limit(parse_pair("q8_0:q4_0")) < divergence_limit(parse_pair("q4_0"))
    assert all(divergence_limit(parse_pair(kv_type)) > 0 for kv_type in KvType)
