"""The choice by measured losses and speeds, and by priors where nothing was measured."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import LADDER, CachePair, parse_pair
from kvserve.core.loss import NOTHING_MEASURED, Quality, Speed, TaskResult
from kvserve.core.plan import Candidate, Plan, Request, Task
from kvserve.core.selector import select
from kvserve.errors import DoesNotFit, UsageError
from tests.core.measured import NOISE, measured
from tests.core.shapes import llama3_8b, machine, plain, qwen25_32b

CTX = 8192


def quality(speeds: dict[str, float] | None = None, **klds: float) -> Quality:
    """Losses by pair, written `q8_0` or `q8_0__q4_0`; the control shows `NOISE`."""
    losses = [measured("f16", NOISE)]
    losses += [measured(pair.replace("__", ":"), kld) for pair, kld in klds.items()]
    timed = [Speed(parse_pair(pair), 4096, 100.0, tps) for pair, tps in (speeds or {}).items()]
    return Quality(tuple(losses), speeds=tuple(timed))


def plan(found: Quality, gib: float | None = 70.0, **request: object) -> Plan:
    box = machine(gib, total_gib=80)
    asked = Request(n_ctx=CTX, n_ubatch=512, **request)  # type: ignore[arg-type]
    return select(llama3_8b(), box, asked, quality=found)


def chosen(found: Plan) -> str:
    return str(found.chosen.launch.pair)


def candidate(found: Plan, pair: str) -> Candidate:
    return next(c for c in found.candidates if str(c.launch.pair) == str(parse_pair(pair)))


def test_unmeasured_the_ladder_stands() -> None:
    assert chosen(plan(NOTHING_MEASURED)) == "f16:f16"
    assert chosen(plan(quality())) == "f16:f16"


def test_within_the_noise_the_smaller_wins() -> None:
    found = plan(quality(q8_0=0.006, q4_0=0.05))
    assert chosen(found) == "q8_0:q8_0"
    assert found.chosen.reason == "chosen: within the measured noise of f16:f16, and smaller"
    assert candidate(found, "f16").reason == "fits; q8_0:q8_0 was measured to be as good"
    assert candidate(found, "q4_0").reason == "fits, but of lower quality than q8_0:q8_0"


def test_outside_the_noise_the_better_stays() -> None:
    assert chosen(plan(quality(q8_0=0.0081))) == "f16:f16"


def test_of_equals_the_faster_wins_over_the_smaller() -> None:
    slow = quality({"f16": 100.0, "q8_0": 70.0}, q8_0=0.005)
    assert chosen(plan(slow)) == "f16:f16"
    fast = quality({"f16": 100.0, "q8_0": 130.0}, q8_0=0.005)
    assert plan(fast).chosen.reason.endswith("and faster")
    assert plan(fast).chosen.predicted_tps == 130.0


def test_on_the_cpu_an_untimed_smaller_pair_does_not_win() -> None:
    assert chosen(plan(quality(q8_0=0.005), None)) == "f16:f16"
    timed = quality({"f16": 10.0, "q8_0": 10.1}, q8_0=0.005)
    assert chosen(plan(timed, None)) == "q8_0:q8_0"


def test_a_pair_that_measures_better_than_the_ladder_says_is_taken() -> None:
    # f16 is too big here; the cheap values cost less than the dear ones on this model.
    tight = plan(quality(q8_0__q5_1=0.09, q8_0__q4_0=0.01), 5.6)
    assert not candidate(tight, "f16").fits
    assert chosen(tight) == "q8_0:q4_0"
    assert tight.chosen.reason == "chosen: the least measured loss that fits"


# Floors by number.


def test_floors_by_number_hold_for_measured_and_unmeasured_pairs() -> None:
    found = plan(quality(q8_0=0.006, q4_0=0.05), max_kld=0.01)
    assert chosen(found) == "q8_0:q8_0"
    assert candidate(found, "q4_0").reason == "measured KLD 0.0500 is over --max-kld 0.01"
    assert "not measured, which --max-kld needs" in candidate(found, "q5_1:q4_0").reason
    top = plan(quality(q8_0=0.03), min_top1=0.98)
    assert candidate(top, "q8_0").reason == "97.0% same top tokens are under --min-top1 98.0%"
    assert chosen(top) == "f16:f16"


def test_weights_leave_the_gpu_before_a_measured_floor_is_broken() -> None:
    shape, box = llama3_8b(), machine(7.6)
    asked = Request(n_ctx=32768, max_kld=0.01)
    kept = select(shape, box, asked, quality=quality(q8_0=0.05))
    assert chosen(kept) == "f16:f16"
    assert kept.chosen.launch.n_gpu_layers < 33
    with pytest.raises(DoesNotFit):
        select(shape, machine(None, host_gib=6), replace(asked, n_ctx=65536), quality=quality())


def test_of_splits_about_as_fast_the_one_that_lost_least_is_taken() -> None:
    shape, box, asked = qwen25_32b(), machine(7.6), Request(n_ctx=8192)
    unmeasured = select(replace(shape, architecture="llama"), box, asked)
    worst = {str(pair).replace(":", "__"): 0.5 for pair in LADDER[1:]}
    worst["q5_1__q4_0"] = 0.0
    better = select(replace(shape, architecture="llama"), box, asked, quality=quality(**worst))
    assert 0 < better.chosen.launch.n_gpu_layers < shape.n_layer + 1
    assert unmeasured.chosen.launch.pair != better.chosen.launch.pair
    loss = better.chosen.loss
    assert loss is not None
    assert loss.mean_kld == 0.0


# Tasks.


def test_a_measurement_opens_a_task_to_a_pair_that_the_prior_bars() -> None:
    barred = plan(NOTHING_MEASURED, task=Task.MATH)
    assert candidate(barred, "q8_0").reason == "below the floor f16:f16 of --task math"
    opened = plan(quality(q8_0=NOISE + 0.001), task=Task.MATH)
    assert chosen(opened) == "q8_0:q8_0"


def test_a_measurement_bars_a_pair_that_the_prior_lets_in() -> None:
    assert candidate(plan(NOTHING_MEASURED, task=Task.CHAT), "q8_0").may_be_chosen
    found = candidate(plan(quality(q8_0=0.1), task=Task.CHAT), "q8_0")
    assert not found.may_be_chosen
    assert found.reason == "measured: KLD 0.0960 above the noise, over 0.02 for --task chat"


def test_a_task_that_was_measured_to_suffer_bars_the_pair() -> None:
    lost = TaskResult("arithmetic", parse_pair("q8_0"), 40, 30, 18, 13, 1, 0.002, 0.0, True)
    found = replace(quality(q8_0=NOISE), tasks=(lost,))
    reason = candidate(plan(found, task=Task.MATH), "q8_0").reason
    assert reason == "measured: 18 of 40 right at arithmetic, 30 at f16 (p 0.002)"
    assert candidate(plan(found, task=Task.CHAT), "q8_0").may_be_chosen
    noise = replace(found, tasks=(replace(lost, measurable=False),))
    assert candidate(plan(noise, task=Task.MATH), "q8_0").may_be_chosen


# Architectures.


def qwen2(found: Quality, **request: object) -> Plan:
    shape = replace(plain(), architecture="qwen2")
    asked = Request(n_ctx=CTX, n_ubatch=512, **request)  # type: ignore[arg-type]
    return select(shape, machine(70.0, total_gib=80), asked, quality=found)


def test_keys_of_qwen2_stay_above_q5_1_until_measured() -> None:
    assert candidate(qwen2(NOTHING_MEASURED), "q4_0").reason.startswith("prior: Qwen2's keys")
    assert candidate(qwen2(NOTHING_MEASURED), "q8_0:q4_0").may_be_chosen
    assert candidate(qwen2(quality(q4_0=0.03)), "q4_0").may_be_chosen
    forced = qwen2(NOTHING_MEASURED, pair=parse_pair("q4_0"))
    assert chosen(forced) == "q4_0:q4_0"
    asked = qwen2(NOTHING_MEASURED, floor=parse_pair("q4_0"))
    assert candidate(asked, "q4_0").may_be_chosen


def test_gpt_oss_loses_too_much_at_q8_0_for_a_chat_until_measured() -> None:
    shape = replace(plain(), architecture="gpt-oss")
    box, asked = machine(70.0, total_gib=80), Request(n_ctx=CTX, task=Task.CHAT)
    unmeasured = select(shape, box, asked)
    assert "74.9 %" in candidate(unmeasured, "q8_0").reason
    known = select(shape, box, asked, quality=quality(q8_0=0.01))
    assert candidate(known, "q8_0").may_be_chosen


# What is shown.


def test_each_candidate_carries_its_measured_or_expected_loss() -> None:
    found = plan(quality(q8_0=0.006))
    known, guessed = candidate(found, "q8_0").loss, candidate(found, "q4_0").loss
    assert known is not None
    assert (known.mean_kld, known.measured) == (0.006, True)
    assert guessed is not None
    assert not guessed.measured
    assert all(candidate(plan(NOTHING_MEASURED), str(pair)).loss for pair in LADDER)


def test_the_deepest_measurement_within_the_context_counts() -> None:
    rows = [measured("q8_0", kld, depth=d) for d, kld in ((1024, 0.1), (4096, 0.2), (16384, 0.3))]
    found = Quality(tuple(rows))
    at = {n: found.loss(parse_pair("q8_0"), n) for n in (512, 2048, 4096, 65536)}
    assert [at[n].mean_kld for n in at] == [0.1, 0.1, 0.2, 0.3]  # type: ignore[union-attr]


def test_the_worse_of_prefill_and_decode_counts_and_carried_does_not() -> None:
    rows = [
        measured("q8_0", 0.01),
        measured("q8_0", 0.02, mode="decode"),
        measured("q8_0", 0.5, mode="carried"),
    ]
    loss = Quality(tuple(rows)).loss(parse_pair("q8_0"), CTX)
    assert loss is not None
    assert loss.mean_kld == 0.02


klds = st.dictionaries(st.sampled_from(LADDER[1:]), st.floats(0.0, 1.0))
speeds = st.dictionaries(st.sampled_from(LADDER), st.floats(1.0, 1000.0))


@settings(max_examples=60, deadline=None)
@given(klds, speeds, st.sampled_from([5.0, 5.6, 6.5, 70.0]), st.none() | st.floats(0.0, 0.5))
def test_the_choice_is_never_further_than_the_noise_from_the_best(
    losses: dict[CachePair, float],
    timed: dict[CachePair, float],
    gib: float,
    max_kld: float | None,
) -> None:
    rows = [measured("f16", NOISE), *(measured(str(pair), kld) for pair, kld in losses.items())]
    rates = tuple(Speed(pair, 4096, 1.0, tps) for pair, tps in timed.items())
    known = Quality(tuple(rows), speeds=rates)
    try:
        found = plan(known, gib, max_kld=max_kld)
    except (DoesNotFit, UsageError):
        return
    pair = found.chosen.launch.pair
    excess = known.excess(pair, CTX)
    if max_kld is not None:
        loss = known.loss(pair, CTX)
        assert loss is not None
        assert loss.mean_kld <= max_kld
    if found.chosen.launch.n_gpu_layers < found.shape.n_layer + 1:
        return  # a split is chosen by speed first
    fitting = [c.launch.pair for c in found.candidates if c.fits and c.may_be_chosen]
    rivals = [known.excess(other, CTX) for other in fitting]
    if excess is not None and None not in rivals:
        assert excess <= min(r for r in rivals if r is not None) + NOISE
