"""The choice: the seed's own cases, the floors, splits, refusals, and properties over all of it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import LADDER, parse_pair
from kvserve.core.floors import TASK_FLOORS
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import DEFAULT_OVERHEADS, estimate
from kvserve.core.plan import Candidate, Plan, Request, Task
from kvserve.core.selector import default_reserve, select
from kvserve.core.shape import ModelShape
from kvserve.errors import DoesNotFit, UsageError
from kvserve.units import GIB, MIB
from tests.core.shapes import hybrid_4b, llama3_8b, machine, plain, qwen25_32b


def pair_of(plan: Plan) -> str:
    return str(plan.chosen.launch.pair)


def candidate(plan: Plan, pair: str) -> Candidate:
    return next(c for c in plan.candidates if str(c.launch.pair) == pair)


# The seed's four configurations on an 8 GB card, 7.6 GiB of it free.


def test_an_8b_model_at_32k_takes_q8_0_because_f16_is_1_5_gib_too_big() -> None:
    plan = select(llama3_8b(), machine(7.6), Request(n_ctx=32768))
    assert pair_of(plan) == "q8_0:q8_0"
    f16 = candidate(plan, "f16:f16")
    assert not f16.fits
    assert f16.reason == "1.53 GiB too big"
    assert f16.memory.kv_bytes == 4 * GIB
    # The seed counts q8_0 as exactly half of f16; its scales add 128 MiB here.
    assert candidate(plan, "q8_0:q8_0").memory.kv_bytes == 2 * GIB + 128 * MIB


def test_an_8b_model_at_16k_keeps_f16() -> None:
    plan = select(llama3_8b(), machine(7.6), Request(n_ctx=16384))
    assert pair_of(plan) == "f16:f16"
    assert candidate(plan, "q8_0:q8_0").reason == "fits, but of lower quality than f16:f16"


def test_beside_an_embedding_model_of_1_2_gib_a_lower_type_is_taken() -> None:
    plan = select(llama3_8b(), machine(7.6 - 1.2), Request(n_ctx=32768))
    assert pair_of(plan) == "q4_0:q4_0"
    assert candidate(plan, "q8_0:q8_0").reason == "924 MiB too big"
    assert candidate(plan, "q5_1:q4_0").reason == "92 MiB too big"


def test_a_32b_model_is_split_and_its_layers_counted() -> None:
    plan = select(qwen25_32b(), machine(7.6), Request(n_ctx=8192))
    launch = plan.chosen.launch
    assert launch.backend is Backend.CUDA
    assert 15 <= launch.n_gpu_layers <= 24
    assert plan.chosen.fits
    one_more = replace(launch, n_gpu_layers=launch.n_gpu_layers + 1)
    request = Request(
        n_ctx=8192, pair=launch.pair, n_gpu_layers=one_more.n_gpu_layers, n_ubatch=512
    )
    with pytest.raises(DoesNotFit):
        select(qwen25_32b(), machine(7.6), request)


def test_the_hybrid_keeps_f16_at_32k_with_half_a_gib_of_cache() -> None:
    plan = select(hybrid_4b(), machine(7.6), Request(n_ctx=32768))
    assert pair_of(plan) == "f16:f16"
    assert plan.chosen.memory.kv_bytes == GIB // 2


# Floors.


@pytest.mark.parametrize("task", list(Task))
def test_a_task_never_gets_less_than_its_floor(task: Task) -> None:
    plan = select(llama3_8b(), machine(7.0), Request(n_ctx=32768, task=task))
    floor = TASK_FLOORS[task]
    assert plan.chosen.launch.pair.k.precision >= floor.k.precision
    assert plan.chosen.launch.pair.v.precision >= floor.v.precision


def test_weights_leave_the_gpu_before_a_floor_is_broken() -> None:
    plan = select(llama3_8b(), machine(7.6), Request(n_ctx=32768, task=Task.MATH))
    assert pair_of(plan) == "f16:f16"
    assert 0 < plan.chosen.launch.n_gpu_layers < 33
    assert candidate(plan, "q8_0:q8_0").reason == "below the floor f16:f16 of --task math"


def test_a_floor_that_nothing_reaches_is_refused_with_what_fits() -> None:
    with pytest.raises(DoesNotFit) as caught:
        select(
            llama3_8b(),
            machine(7.6, host_gib=0.5),
            Request(n_ctx=32768, floor=parse_pair("f16")),
        )
    assert caught.value.options == ("--ctx 20224 fits with f16:f16",)
    assert caught.value.needed_bytes > caught.value.free_bytes
    assert "nearest: --ctx 20224 fits with f16:f16" in caught.value.message
    assert "the host would need" in caught.value.message


# What the build can do.


def test_pairs_without_a_kernel_are_passed_over_unless_forced() -> None:
    box = machine(6.4)
    box = replace(box, build=replace(box.build, kv_pairs=None))
    plan = select(llama3_8b(), box, Request(n_ctx=20000, n_ubatch=512))
    assert pair_of(plan) == "q4_0:q4_0"
    assert "no compiled kernel" in candidate(plan, "q8_0:q5_1").reason
    forced = select(llama3_8b(), box, Request(n_ctx=20000, pair=parse_pair("q8_0:q5_1")))
    assert pair_of(forced) == "q8_0:q5_1"


def test_head_sizes_that_do_not_divide_by_32_leave_f16_alone() -> None:
    plan = select(plain(head_size=80), machine(7.6), Request(n_ctx=8192))
    assert pair_of(plan) == "f16:f16"
    assert "multiple of 32" in candidate(plan, "q8_0:q8_0").reason


def test_mla_takes_equal_types_only() -> None:
    plan = select(plain(mla=True), machine(7.6), Request(n_ctx=8192))
    assert "K only" in candidate(plan, "q8_0:q4_0").reason


def test_without_attention_layers_there_is_nothing_to_choose() -> None:
    shape = plain(attention_every=99)
    plan = select(shape, machine(7.6), Request(n_ctx=8192))
    assert [str(c.launch.pair) for c in plan.candidates] == ["f16:f16"]


# Machines.


def test_without_a_gpu_the_host_decides() -> None:
    plan = select(llama3_8b(), machine(None, host_gib=16), Request(n_ctx=32768))
    assert plan.chosen.launch.backend is Backend.CPU
    assert plan.chosen.launch.n_gpu_layers == 0
    assert plan.chosen.memory == plan.chosen.host_memory
    assert pair_of(plan) == "f16:f16"


@pytest.mark.parametrize(
    ("box", "backend", "says"),
    [
        (machine(7.6, cuda=False), None, "llama.cpp was built without CUDA"),
        (machine(None), None, "no GPU is visible"),
        (machine(7.6), Backend.CPU, "--device cpu uses no GPU"),
    ],
)
def test_layers_on_a_gpu_that_is_not_there_are_refused(box, backend, says) -> None:
    with pytest.raises(UsageError, match=f"--gpu-layers 10: {says}; leave it out"):
        select(llama3_8b(), box, Request(n_ctx=4096, n_gpu_layers=10, backend=backend))
    none = Request(n_ctx=4096, n_gpu_layers=0, backend=backend)
    assert select(llama3_8b(), box, none).chosen.launch.backend is Backend.CPU


def test_a_build_without_cuda_uses_the_host_and_says_so_when_cuda_was_asked_for() -> None:
    box = machine(7.6, cuda=False)
    assert select(llama3_8b(), box, Request(8192)).chosen.launch.backend is Backend.CPU
    with pytest.raises(UsageError, match="built without CUDA"):
        select(llama3_8b(), box, Request(8192, backend=Backend.CUDA))
    with pytest.raises(UsageError, match="no GPU is visible"):
        select(llama3_8b(), machine(None), Request(8192, backend=Backend.CUDA))


def test_experts_leave_first_where_that_keeps_more_speed() -> None:
    shape = plain(
        n_layer=48,
        n_embd=2048,
        n_ff=6144,
        n_head_kv=4,
        layer_bytes=370 * MIB,
        expert_bytes=355 * MIB,
        n_expert=128,
        n_expert_used=8,
    )
    plan = select(shape, machine(7.6), Request(n_ctx=8192))
    assert plan.chosen.launch.n_cpu_moe > 0
    assert plan.chosen.launch.n_gpu_layers == 49


def test_two_gpus_share_the_layers_by_their_free_memory() -> None:
    box = machine(6.0, n_gpus=2)
    box = replace(box, gpus=(box.gpus[0], replace(box.gpus[1], free_bytes=3 * GIB)))
    plan = select(llama3_8b(), box, Request(n_ctx=16384))
    first, second = plan.chosen.launch.tensor_split
    assert first + second == 33
    assert first > 2 * second * 0.95


def test_two_gpus_hold_what_neither_holds_alone_and_each_has_room() -> None:
    box = machine(6.0, n_gpus=2)
    plan = select(llama3_8b(), box, Request(n_ctx=32768))
    assert pair_of(plan) == "f16:f16"
    bill = estimate(llama3_8b(), plan.chosen.launch, DEFAULT_OVERHEADS, 2)
    free = int(6.0 * GIB) - 256 * MIB
    assert [memory.total_bytes <= free for memory in bill.each] == [True, True]
    assert plan.chosen.headroom_bytes == min(free - memory.total_bytes for memory in bill.each)
    assert plan.chosen.memory.total_bytes == sum(memory.total_bytes for memory in bill.each)


def test_the_gpu_that_is_too_full_is_named() -> None:
    box = machine(6.0, n_gpus=2)
    box = replace(box, gpus=(box.gpus[0], replace(box.gpus[1], free_bytes=GIB)))
    plan = select(llama3_8b(), box, Request(n_ctx=32768))
    f16 = candidate(plan, "f16:f16")
    assert "too big for GPU" in f16.reason


def test_what_the_user_keeps_free_stays_free() -> None:
    plan = select(llama3_8b(), machine(7.6), Request(n_ctx=8192, reserve_bytes=GIB))
    assert plan.chosen.free_bytes == int(7.6 * GIB) - GIB
    assert default_reserve(8 * GIB) == 256 * MIB
    assert default_reserve(100 * GIB) == 3 * GIB


# Contexts.


def test_a_context_above_the_models_is_refused_with_the_models() -> None:
    with pytest.raises(UsageError, match="--ctx 131072 or less"):
        select(llama3_8b(), machine(24.0), Request(n_ctx=131073))


def test_max_is_the_longest_that_fits_at_the_floor() -> None:
    free = machine(7.6)
    longest = select(llama3_8b(), free, Request(n_ctx=None)).chosen
    assert str(longest.launch.pair) == "q4_0:q4_0"
    assert longest.launch.n_ctx == longest.max_ctx == 65792
    floored = select(llama3_8b(), free, Request(n_ctx=None, floor=parse_pair("q8_0"))).chosen
    assert str(floored.launch.pair) == "q8_0:q8_0"
    assert floored.launch.n_ctx == 36864
    small = select(plain(n_layer=4, n_ctx_train=4096), free, Request(n_ctx=None)).chosen
    assert (str(small.launch.pair), small.launch.n_ctx) == ("f16:f16", 4096)


def test_nothing_fits_on_a_tiny_host() -> None:
    with pytest.raises(DoesNotFit, match="use a smaller model"):
        select(llama3_8b(), machine(None, host_gib=2), Request(n_ctx=8192))


requests = st.builds(
    Request,
    n_ctx=st.none() | st.integers(1, 131072),
    n_parallel=st.integers(1, 32),
    floor=st.none() | st.sampled_from(LADDER),
    task=st.none() | st.sampled_from(Task),
)
machines = st.builds(
    machine,
    st.none() | st.floats(0.1, 80),
    host_gib=st.floats(0.1, 64),
    total_gib=st.just(80.0),
    n_gpus=st.sampled_from((1, 1, 1, 2, 3)),
)
shapes = st.sampled_from([llama3_8b(), qwen25_32b(), hybrid_4b(), plain(window_every=6)])


@settings(max_examples=300, deadline=None)
@given(shapes, machines, requests)
def test_a_plan_fits_is_allowed_and_nothing_better_fits(
    shape: ModelShape, box: Machine, request: Request
) -> None:
    try:
        plan = select(shape, box, request)
    except DoesNotFit:
        return
    chosen = plan.chosen
    assert chosen.fits
    assert chosen in plan.candidates
    spare = chosen.free_bytes - chosen.memory.total_bytes
    # Of several GPUs the fullest one counts.
    several = len(chosen.launch.tensor_split) > 1
    assert 0 <= chosen.headroom_bytes <= spare if several else chosen.headroom_bytes == spare >= 0
    assert sum(c.reason.startswith("chosen") for c in plan.candidates) == 1
    assert all(c.reason for c in plan.candidates)
    whole = [c for c in plan.candidates if c.launch.n_gpu_layers == chosen.launch.n_gpu_layers]
    for better in whole[: whole.index(chosen)]:
        # Every candidate that stands before the chosen one is too big, or was ruled out.
        out = ("below the floor", "no compiled", "too big", "short of host", "slower or of lower")
        assert any(words in better.reason for words in out)
    if request.n_ctx is not None:
        assert chosen.launch.n_ctx >= request.n_ctx


@settings(max_examples=100, deadline=None)
@given(st.floats(4, 12), st.floats(0, 4), st.integers(2048, 65536))
def test_more_memory_never_gives_a_worse_plan(free: float, more: float, n_ctx: int) -> None:
    small = select(llama3_8b(), machine(free), Request(n_ctx=n_ctx)).chosen
    large = select(llama3_8b(), machine(free + more), Request(n_ctx=n_ctx)).chosen
    if small.launch.n_gpu_layers == 33:
        assert large.launch.n_gpu_layers == 33
        assert LADDER.index(large.launch.pair) <= LADDER.index(small.launch.pair)


# Micro-batches.


def test_a_better_pair_in_smaller_micro_batches_is_taken() -> None:
    shape, usual = llama3_8b(), Request(n_ctx=32768, n_ubatch=512)
    q8 = candidate(select(shape, machine(9.0), usual), "q8_0:q8_0")
    free = q8.memory.total_bytes / GIB + 0.25 - 0.01
    assert pair_of(select(shape, machine(free), usual)) != "q8_0:q8_0"
    plan = select(shape, machine(free), Request(n_ctx=32768))
    assert pair_of(plan) == "q8_0:q8_0"
    assert plan.chosen.launch.n_ubatch in (128, 256)
    assert f"micro-batches of {plan.chosen.launch.n_ubatch}" in plan.chosen.reason
    assert plan.chosen.fits


def test_micro_batches_stay_as_they_are_where_that_helps_no_better_pair() -> None:
    plan = select(llama3_8b(), machine(7.6), Request(n_ctx=32768))
    assert {c.launch.n_ubatch for c in plan.candidates} == {512}
    small = select(llama3_8b(), machine(7.6), Request(n_ctx=32768, n_batch=64))
    assert small.chosen.launch.n_ubatch == 64


# What the user says twice.


@pytest.mark.parametrize("other", [{"task": Task.MATH}, {"floor": parse_pair("q8_0")}])
def test_a_fixed_type_below_a_floor_is_a_contradiction(other: dict[str, object]) -> None:
    request = Request(n_ctx=8192, pair=parse_pair("q8_0:q4_0"), **other)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave one of the two out"):
        select(llama3_8b(), machine(7.6), request)


def test_layers_that_do_not_fit_are_answered_with_fewer_layers() -> None:
    request = Request(n_ctx=8192, n_gpu_layers=33, pair=parse_pair("f16"))
    with pytest.raises(DoesNotFit, match="fewer --gpu-layers than 33, or auto"):
        select(llama3_8b(), machine(3.0), request)


def test_a_gpu_too_full_for_a_single_layer_is_left_alone() -> None:
    plan = select(llama3_8b(), machine(0.5), Request(n_ctx=None))
    assert plan.chosen.launch.backend is Backend.CPU
    assert (pair_of(plan), plan.chosen.launch.n_ctx) == ("f16:f16", 131072)
    asked = Request(n_ctx=8192, backend=Backend.CUDA)
    assert select(llama3_8b(), machine(2.0), asked).chosen.launch.backend is Backend.CUDA


# Split plans in smaller micro-batches.


def test_a_smaller_micro_batch_that_keeps_a_layer_of_a_small_model_on_the_gpu_is_taken() -> None:
    request = Request(n_ctx=16384)
    plan = select(llama3_8b(), machine(4.5), request)
    usual = select(llama3_8b(), machine(4.5), replace(request, n_ubatch=512))
    assert plan.chosen.launch.n_ubatch < 512
    assert plan.chosen.launch.n_gpu_layers == usual.chosen.launch.n_gpu_layers + 1
    assert plan.chosen.fits
    assert f"micro-batches of {plan.chosen.launch.n_ubatch}" in plan.chosen.reason


def test_a_layer_of_65_is_not_worth_a_smaller_micro_batch() -> None:
    plan = select(qwen25_32b(), machine(7.6), Request(n_ctx=8192))
    assert plan.chosen.launch.n_ubatch == 512
    assert any(c.launch.n_ubatch < 512 for c in plan.candidates)


@given(
    vram_gib=st.floats(2.0, 7.0),
    shape=st.sampled_from((llama3_8b(), plain(n_expert=64, n_expert_used=4))),
)
@settings(max_examples=15, deadline=None)
def test_split_candidates_fit_and_one_more_layer_does_not(
    vram_gib: float, shape: ModelShape
) -> None:
    box = machine(vram_gib)
    try:
        plan = select(shape, box, Request(n_ctx=8192))
    except DoesNotFit:
        return
    at_work = {(c.launch.pair, c.launch.n_gpu_layers, c.launch.n_cpu_moe) for c in plan.candidates}
    for pair, n, away in at_work:
        if 0 < n <= shape.n_layer and not away:
            fewest = min(
                c.launch.n_ubatch for c in plan.candidates if c.launch.n_gpu_layers == n
                and c.launch.pair == pair
            )  # fmt: skip
            more = Request(n_ctx=8192, pair=pair, n_gpu_layers=n + 1, n_ubatch=128)
            assert fewest >= 128
            if n == max(m for p, m, a in at_work if p == pair and m <= shape.n_layer and not a):
                with pytest.raises(DoesNotFit):
                    select(shape, box, more)
