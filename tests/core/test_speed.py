"""The bandwidth model against the measurements it was fitted to and those it was not."""

import pytest

from kvserve.core.plan import Request
from kvserve.core.selector import select
from tests.core.shapes import llama3_8b, machine, qwen25_32b


def predicted(n_ctx: int, pair: str, **box: object) -> float | None:
    plan = select(llama3_8b(), machine(70.0, total_gib=80, **box), Request(n_ctx=n_ctx))  # type: ignore[arg-type]
    return next(c.predicted_tps for c in plan.candidates if str(c.launch.pair) == pair)


def test_an_h100_decodes_at_what_llama_bench_measured() -> None:
    # llama-bench, 8B Q4_K_M shape: 261 tokens/s at depth 0, 166 at 32,000 with f16.
    assert predicted(256, "f16:f16", bandwidth=3352e9) == pytest.approx(261, rel=0.05)
    assert predicted(32768, "f16:f16", bandwidth=3352e9) == pytest.approx(166, rel=0.15)


def test_nothing_is_said_where_it_cannot_be_known() -> None:
    assert predicted(8192, "f16:f16", bandwidth=None) is None
    on_cpu = select(llama3_8b(), machine(None), Request(n_ctx=8192)).candidates
    assert [c.predicted_tps is None for c in on_cpu] == [False] + [True] * 5


def test_layers_on_the_host_cost_what_the_host_is_slower() -> None:
    plan = select(qwen25_32b(), machine(7.6), Request(n_ctx=8192))
    assert plan.chosen.predicted_tps is not None
    assert 1 < plan.chosen.predicted_tps < 6
