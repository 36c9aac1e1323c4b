"""A draft model's place in the plan."""

from dataclasses import replace

import pytest

from kvserve.core.draft import draft_model
from kvserve.core.machine import Backend
from kvserve.core.memory import CPU_OVERHEADS, estimate
from kvserve.core.plan import Launch, Request
from kvserve.core.selector import select
from kvserve.core.shape import ModelShape
from kvserve.units import GIB, MIB
from tests.core.shapes import hybrid_4b, llama3_8b, machine


def half_b() -> ModelShape:
    """An eighth of the 8B model's layers."""
    whole = llama3_8b()
    return replace(whole, layers=whole.layers[:4])


@pytest.mark.parametrize("n_ctx", [256, 4096, 5120, 32768, 99840, 131072])
def test_it_takes_what_a_launch_of_its_own_would(n_ctx: int) -> None:
    shape, cost = half_b(), draft_model(half_b(), n_parallel=4, n_batch=512)
    alone = Launch(Backend.CPU, _f16(), n_ctx, 4, 512, 512, 0)
    bill = estimate(shape, alone, CPU_OVERHEADS, 1)
    taken = bill.host.total_bytes - bill.host.runtime_bytes
    assert cost.on_host(n_ctx) == pytest.approx(taken, rel=0.02)
    on_gpu = replace(alone, backend=Backend.CUDA, n_gpu_layers=5)
    taken = estimate(shape, on_gpu, CPU_OVERHEADS, 1).gpu.total_bytes
    assert cost.on_gpu(n_ctx) == pytest.approx(taken, rel=0.02)


def test_the_plan_makes_room_for_it() -> None:
    cost = draft_model(half_b(), n_parallel=4, n_batch=512)
    bare = Request(n_ctx=16384)
    for there in (machine(7.6), machine(None, host_gib=12)):
        plain = select(llama3_8b(), there, bare).chosen
        drafted = select(llama3_8b(), there, replace(bare, draft_model=cost)).chosen
        assert drafted.memory.draft_bytes > 500 * MIB
        assert drafted.memory.total_bytes - drafted.memory.draft_bytes <= plain.memory.total_bytes
        assert drafted.fits
        assert drafted.max_ctx < plain.max_ctx
    assert str(select(llama3_8b(), machine(7.6), bare).chosen.launch.pair) == "f16:f16"
    on_gpu = select(llama3_8b(), machine(7.6), replace(bare, draft_model=cost)).chosen
    assert str(on_gpu.launch.pair) != "f16:f16"


def test_drafted_tokens_have_logits_and_recurrent_models_none() -> None:
    plain = select(llama3_8b(), machine(24), Request(n_ctx=8192)).chosen
    many = select(llama3_8b(), machine(24), Request(n_ctx=8192, n_draft=512)).chosen
    assert many.launch.n_outputs == 516
    row_bytes = 4 * llama3_8b().n_vocab
    assert 0 < many.memory.compute_bytes - plain.memory.compute_bytes <= 512 * row_bytes
    added = many.host_memory.runtime_bytes - plain.host_memory.runtime_bytes
    assert added == 512 * row_bytes
    assert (
        select(hybrid_4b(), machine(24), Request(n_ctx=8192, n_draft=16)).chosen.launch.n_draft == 0
    )
    assert many.memory.total_bytes < 24 * GIB


def _f16():
    from kvserve.core.dtypes import LADDER

    return LADDER[0]
