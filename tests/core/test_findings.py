"""llama.cpp's figures go before the formulas', and what is doubtful is asked about."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.core.findings import NOTHING_FOUND, Findings, doubtful, likely
from kvserve.core.memory import DEFAULT_OVERHEADS, HOPPER_OVERHEADS, estimate
from kvserve.core.plan import Estimate, Launch, Plan, Request
from kvserve.core.selector import select
from kvserve.units import MIB
from tests.core.shapes import hybrid_4b, llama3_8b, machine, qwen25_32b


def plan(findings: Findings = NOTHING_FOUND, **request: object) -> Plan:
    asked = Request(**({"n_ctx": 32768, "n_ubatch": 512} | request))  # type: ignore[arg-type]
    return select(llama3_8b(), machine(7.6), asked, findings=findings)


def shifted(launch: Launch, compute_bytes: int) -> Mapping[Launch, Estimate]:
    """The formula's figures with another compute buffer."""
    bill = estimate(llama3_8b(), launch, HOPPER_OVERHEADS, 1)
    more = replace(bill.gpu, compute_bytes=bill.gpu.compute_bytes + compute_bytes)
    return {launch: replace(bill, gpu=more)}


def test_a_plan_is_confirmed_by_figures_that_fit() -> None:
    first = plan()
    assert not first.confirmed
    second = plan(Findings(shifted(first.chosen.launch, 0)))
    assert second.confirmed
    assert second.chosen.memory == first.chosen.memory
    assert second.chosen.formula_error == 0
    assert second.differences == ()


def test_exact_figures_decide_and_the_difference_stays_on_the_candidate() -> None:
    first = plan()
    second = plan(Findings(shifted(first.chosen.launch, 2**30)))
    assert second.chosen.launch.pair != first.chosen.launch.pair
    loser = next(c for c in second.candidates if c.launch == first.chosen.launch)
    assert not loser.fits
    assert "too big" in loser.reason
    assert second.differences == (loser,)
    assert loser.formula_error is not None
    assert loser.formula_error < -0.2


def test_a_launch_that_llama_cpp_refuses_is_not_chosen() -> None:
    launch = plan().chosen.launch
    second = plan(Findings(refused={launch: "no such head size"}))
    assert second.chosen.launch.pair != launch.pair
    loser = next(c for c in second.candidates if c.launch == launch)
    assert loser.reason == "llama.cpp refuses it: no such head size"


def test_rounding_in_the_log_is_no_difference() -> None:
    first = plan()
    second = plan(Findings(shifted(first.chosen.launch, 5000)))
    assert second.chosen.memory == first.chosen.memory


def test_the_chosen_launch_is_doubtful_until_it_is_known() -> None:
    first = plan()
    assert doubtful(first, NOTHING_FOUND) == (first.chosen.launch,)
    assert doubtful(first, Findings(shifted(first.chosen.launch, 0))) == ()


def test_a_better_pair_that_lost_by_next_to_nothing_is_doubtful_too() -> None:
    box, request = machine(7.6), Request(n_ctx=32768, n_ubatch=512, reserve_bytes=0)
    better = next(
        c
        for c in select(llama3_8b(), box, request).candidates
        if c.launch.pair == parse_pair("f16")
    )
    needed = better.memory.total_bytes
    gpu = replace(box.gpus[0], free_bytes=needed - MIB, total_bytes=2 * needed)
    first = select(llama3_8b(), replace(box, gpus=(gpu,)), request)
    assert first.chosen.launch.pair != parse_pair("f16")
    assert better.launch in doubtful(first, NOTHING_FOUND)


def test_a_split_plan_doubts_its_neighbours() -> None:
    first = select(qwen25_32b(), machine(7.6), Request(n_ctx=8192))
    n = first.chosen.launch.n_gpu_layers
    counts = {launch.n_gpu_layers for launch in doubtful(first, NOTHING_FOUND)}
    assert {n - 2, n - 1, n, n + 1, n + 2} <= counts


def test_a_split_takes_one_more_layer_when_llama_cpp_says_that_it_fits() -> None:
    shape, box, request = qwen25_32b(), machine(7.6), Request(n_ctx=8192, n_ubatch=512)
    first = select(shape, box, request).chosen.launch
    more = replace(first, n_gpu_layers=first.n_gpu_layers + 1)
    bill = estimate(shape, more, HOPPER_OVERHEADS, 1)
    less = replace(bill.gpu, compute_bytes=0, kv_bytes=bill.gpu.kv_bytes // 2)
    found = Findings({more: replace(bill, gpu=less)})
    assert select(shape, box, request, findings=found).chosen.launch == more


@pytest.mark.parametrize(("shape", "some"), [(llama3_8b(), True), (hybrid_4b(), False)])
def test_reloads_are_foreseen_where_that_is_cheap(shape: object, *, some: bool) -> None:
    first = select(shape, machine(7.6), Request(n_ctx=8192))  # type: ignore[arg-type]
    ahead = likely(first)
    assert bool(ahead) is some
    lengths = {launch.n_ctx for launch in ahead if launch.pair == first.chosen.launch.pair}
    assert lengths == ({2**n for n in range(11, 18)} if some else set())


@pytest.mark.parametrize("off_mib", [-40, 0, 40])
def test_the_longest_context_is_right_by_llama_cpps_figures_too(off_mib: int) -> None:
    shape, box, request = llama3_8b(), machine(7.6), Request(n_ctx=None, n_ubatch=512)

    def real(launch: Launch) -> int:
        bill = estimate(shape, launch, DEFAULT_OVERHEADS, 1)
        return bill.gpu.total_bytes + off_mib * MIB

    findings = Findings()
    for _ in range(4):
        chosen = select(shape, box, request, findings=findings).chosen
        if findings.knows(chosen.launch):
            break
        bill = estimate(shape, chosen.launch, DEFAULT_OVERHEADS, 1)
        gpu = replace(bill.gpu, compute_bytes=bill.gpu.compute_bytes + off_mib * MIB)
        findings = findings.joined(Findings({chosen.launch: replace(bill, gpu=gpu)}))
    assert chosen.exact
    assert real(chosen.launch) <= chosen.free_bytes
    assert real(replace(chosen.launch, n_ctx=chosen.launch.n_ctx + 256)) > chosen.free_bytes
