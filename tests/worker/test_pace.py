"""How long steps become on machines of known speed, while prompts come in beside streams."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvserve.worker.pace import Pace

N_BATCH = 512


@dataclass(frozen=True)
class Machine:
    """Seconds of a step with `n_decoding` generated and `n_prefill` prompt tokens."""

    name: str
    seconds: Callable[[int, int], float]


def gpu(n_decoding: int, n_prefill: int) -> float:
    """Reading the weights takes 3.7 ms and hides the first 20 tokens' arithmetic."""
    n_tokens = n_decoding + n_prefill
    return max(0.0037 + 0.00009 * min(n_tokens, 60), 0.000125 * n_tokens) + 0.0002 * n_decoding


def laptop(n_decoding: int, n_prefill: int) -> float:
    return 0.004 + 0.012 * n_decoding + 0.001 * n_prefill


def slow(n_decoding: int, n_prefill: int) -> float:
    """A large model on a CPU."""
    return 0.4 + 0.05 * n_decoding + 0.1 * n_prefill


MACHINES = (Machine("gpu", gpu), Machine("laptop", laptop), Machine("slow", slow))


def warm(machine: Machine, n_decoding: int) -> Pace:
    """After prompts that were read alone and some steps of the streams."""
    pace = Pace(N_BATCH)
    for _ in range(5):
        n = pace.limit(0)
        pace.observe(n, n, machine.seconds(0, n))
    for _ in range(20):
        pace.observe(0, n_decoding, machine.seconds(n_decoding, 0))
    return pace


def read(machine: Machine, pace: Pace, n_decoding: int, n_prompt: int) -> list[float]:
    """The steps in which a prompt is read."""
    steps = []
    while n_prompt:
        n = min(pace.limit(n_decoding), n_prompt)
        steps.append(machine.seconds(n_decoding, n))
        pace.observe(n, n + n_decoding, steps[-1])
        n_prompt -= n
    return steps


@pytest.mark.parametrize("n_decoding", [1, 4, 16])
@pytest.mark.parametrize("machine", MACHINES[:2], ids=lambda machine: machine.name)
def test_a_long_prompt_makes_no_step_three_times_as_long(machine: Machine, n_decoding: int) -> None:
    idle = machine.seconds(n_decoding, 0)
    steps = read(machine, warm(machine, n_decoding), n_decoding, 16_384)
    assert max(steps) < 3 * idle
    alone = 16_384 / N_BATCH * machine.seconds(0, N_BATCH)
    assert sum(steps) < 3.5 * alone


@pytest.mark.parametrize("held_up_s", [0.0, 0.004, 0.005])
def test_what_holds_steps_up_is_taken_off_the_prompts_share(held_up_s: float) -> None:
    """One gap in fifty is longer than its step, whatever the step's size: the host does that."""
    rng = random.Random(5)
    pace, idle = warm(MACHINES[0], 4), gpu(4, 0)
    gaps, sizes = [], []
    for _ in range(6000):
        n = pace.limit(4)
        gaps.append(gpu(4, n) + (held_up_s if rng.random() < 0.02 else 0.0))
        sizes.append(n)
        pace.observe(n, n + 4, gpu(4, n), gaps[-1])
    assert sum(gap > 3 * idle for gap in gaps[1000:]) <= 0.01 * 5000
    quiet = warm(MACHINES[0], 4)
    assert (sum(sizes[-100:]) > 100 * quiet.limit(4)) == (held_up_s < 0.001)


def grown(pace: Pace, gap: Callable[[int], float | None], n_waiting: int = 1) -> int:
    """Prompt tokens for a step beside four streams, after some with such gaps."""
    for _ in range(40):
        n = pace.limit(4, n_waiting)
        pace.observe(n, n + 4, gpu(4, n), gap(n))
    return pace.limit(4)


def test_a_step_between_those_of_a_prompt_says_nothing_of_the_others() -> None:
    """It has no graph, and takes longer."""
    pace = warm(MACHINES[0], 4)
    before = pace.seconds_beside(4)
    for _ in range(20):
        n = pace.limit(4)
        pace.observe(n, n + 4, gpu(4, n))
        pace.observe(0, 4, 3 * gpu(4, 0))
    assert pace.seconds_beside(4) == before
    for _ in range(10):
        pace.observe(0, 4, gpu(4, 0))
        for _ in range(20):
            n = pace.limit(4)
            pace.observe(n, n + 4, gpu(4, n))
            pace.observe(0, 4, 3 * gpu(4, 0))
    assert pace.seconds_beside(4) == before
    for _ in range(20):
        pace.observe(0, 4, 3 * gpu(4, 0))
    assert pace.seconds_beside(4) == pytest.approx(3 * before)


@pytest.mark.parametrize("times", [1.0, 1.5, 4.0])
def test_steps_between_those_of_prompts_count_where_there_are_no_others(times: float) -> None:
    """A short prompt in every second step, while the streams' own steps come to take longer."""

    def learned(n_between: int) -> Pace:
        pace = warm(MACHINES[0], 4)
        for _ in range(300):
            n = pace.limit(4)
            pace.observe(n, n + 4, times * gpu(4, n), times * gpu(4, n))
            for _ in range(n_between):
                pace.observe(0, 4, times * gpu(4, 0), times * gpu(4, 0))
        return pace

    one, two = learned(1), learned(2)
    assert one.seconds_beside(4) == pytest.approx(two.seconds_beside(4), rel=0.2)
    assert one.limit(4) == pytest.approx(two.limit(4), rel=0.2)


def test_so_do_the_first_of_so_many_streams() -> None:
    pace = Pace(N_BATCH)
    for _ in range(30):
        n = pace.limit(4)
        pace.observe(n, n + 4, gpu(4, n))
        pace.observe(0, 4, gpu(4, 0))
    assert pace.seconds_beside(4) < 2 * gpu(4, 0)


def test_a_copy_that_makes_streams_wait_too_long_makes_the_next_one_smaller() -> None:
    pace = warm(MACHINES[0], 4)

    def copied(times: float) -> float:
        for _ in range(20):
            n = pace.limit(4)
            pace.observe(n, n + 4, gpu(4, n), 2 * gpu(4, 0))
            pace.observe(0, 4, gpu(4, 0), times * gpu(4, 0))
        return pace.seconds_beside(4)

    assert copied(2.0) > copied(3.0)
    before = pace.seconds_beside(4)
    pace.observe(0, 4, gpu(4, 0), 5 * gpu(4, 0))
    assert pace.seconds_beside(4) == before, "without a prompt it is something else"


def test_one_long_gap_changes_little() -> None:
    """A pause for a reload, say."""
    pace = warm(MACHINES[0], 4)
    before = grown(pace, lambda n: gpu(4, n))
    pace.observe(before, before + 4, gpu(4, before), 20.0)
    assert 0.8 * before <= grown(pace, lambda n: gpu(4, n)) <= before


def test_gaps_of_steps_for_several_prompts_say_nothing_of_one() -> None:
    def after(times: float) -> int:
        return grown(warm(MACHINES[0], 4), lambda n: times * gpu(4, n), n_waiting=8)

    assert after(3.0) == after(1.0)
    assert grown(warm(MACHINES[0], 4), lambda n: 3 * gpu(4, n)) < after(1.0)


def test_where_a_token_takes_long_a_prompt_still_moves() -> None:
    machine = MACHINES[2]
    steps = read(machine, warm(machine, 1), 1, 256)
    assert len(steps) <= 256 / 8
    assert max(steps) < 4 * machine.seconds(1, 0)


def test_more_that_wait_make_longer_steps_up_to_the_bound() -> None:
    def grown(n_waiting: int) -> int:
        pace = warm(MACHINES[0], 4)
        for _ in range(20):
            n = pace.limit(4, n_waiting)
            pace.observe(n, n + 4, gpu(4, n))
        return pace.limit(4, n_waiting)

    assert grown(3) > 2 * grown(1)
    assert gpu(4, grown(60)) < 0.06


def test_many_prompts_at_once_are_read_about_as_fast_as_alone() -> None:
    """32 requests arrive while nothing but steps of a single stream is known."""
    n_prompt, n_requests = 115, 32
    pace = warm(MACHINES[0], 1)
    left = [n_prompt] * n_requests
    seconds, first_tokens = 0.0, []
    while left:
        n_decoding = n_requests - len(left)
        n = min(pace.limit(n_decoding, len(left)), sum(left))
        step = gpu(n_decoding, n)
        pace.observe(n, n + n_decoding, step)
        seconds += step
        while left and n:
            taken = min(n, left[0])
            left[0] -= taken
            n -= taken
            if not left[0]:
                left.pop(0)
                first_tokens.append(seconds)
    alone = n_prompt * n_requests / N_BATCH * gpu(0, N_BATCH)
    assert seconds < 1.5 * alone
    assert first_tokens[n_requests // 2] < 0.75 * alone


def test_a_short_rest_of_a_prompt_does_not_make_the_next_one_begin_slowly() -> None:
    pace = warm(MACHINES[1], 2)
    for _ in range(10):
        n = pace.limit(2)
        pace.observe(n, n + 2, laptop(2, n))
    n = pace.limit(2)
    pace.observe(3, 5, laptop(2, 3))
    assert pace.limit(2) >= n


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_no_row_of_a_batch_is_left_over(machine: Machine) -> None:
    for n_decoding in range(1, 12):
        pace = warm(machine, n_decoding)
        for _ in range(30):
            n = pace.limit(n_decoding)
            assert n == N_BATCH or (n + n_decoding) % 4 == 0
            pace.observe(n, n + n_decoding, machine.seconds(n_decoding, n))


def test_one_slow_step_is_forgotten() -> None:
    pace = warm(MACHINES[1], 2)
    before = pace.limit(2)
    pace.observe(0, 2, 5.0)
    assert pace.limit(2) == before


def test_follows_the_machine() -> None:
    pace = Pace(n_batch=2048)
    assert pace.limit(0) == 128
    pace.observe(n_prefilled=128, n_tokens=128, seconds=0.128)
    assert pace.limit(n_decoding=1) == 151
    assert pace.limit(n_decoding=0) == 1000
    pace.observe(n_prefilled=3, n_tokens=3, seconds=9.0)
    assert pace.limit(n_decoding=0) == 1000
    for _ in range(50):
        pace.observe(n_prefilled=512, n_tokens=512, seconds=60.0)
    assert pace.limit(n_decoding=1) == 11
    assert pace.limit(n_decoding=0) == 32
    for _ in range(50):
        pace.observe(n_prefilled=512, n_tokens=512, seconds=0.01)
    assert pace.limit(n_decoding=1) == 2047
    assert pace.limit(n_decoding=0) == 2048


def test_batches_stay_of_the_same_size() -> None:
    """Where the steps' times scatter a little, and grow."""
    pace = warm(MACHINES[0], 4)
    scatter = random.Random(3)
    chunks = []
    for n in range(300):
        chunks.append(pace.limit(4))
        seconds = gpu(4, chunks[-1]) * scatter.uniform(0.97, 1.03) * (1 + n / 1000)
        pace.observe(chunks[-1], chunks[-1] + 4, seconds)
    repeats = sum(one == other for one, other in itertools.pairwise(chunks))
    assert repeats > 0.7 * len(chunks)


@pytest.mark.parametrize("n_batch", [64, 128, N_BATCH])
@pytest.mark.parametrize("n_drafted", [0, 3])
@pytest.mark.parametrize("n_decoding", [1, 4, 7])
def test_on_a_gpu_batches_fill_tiles_and_are_never_captured(
    n_decoding: int, n_drafted: int, n_batch: int
) -> None:
    """Twice the same size is captured, and good for nothing a few steps later."""
    pace = Pace(n_batch, on_gpu=True)
    pace.observe(n_batch, n_batch, gpu(0, n_batch))
    for _ in range(20):
        pace.observe(0, n_decoding, gpu(n_decoding, 0))
    sizes = []
    for _ in range(40):
        n = pace.limit(n_decoding, n_drafted=n_drafted)
        sizes.append(n + n_decoding + n_drafted)
        pace.observe(n, sizes[-1], gpu(n_decoding + n_drafted, n))
    assert all(one != other for one, other in itertools.pairwise(sizes))
    assert all(size % 8 in {0, 7} for size in sizes)
    assert max(sizes) <= n_batch


@pytest.mark.parametrize("n_drafted", [0, 1, 9, 17])
def test_on_a_cpu_batches_stay_below_a_tile_of_attention_or_fill_two(n_drafted: int) -> None:
    for n_waiting in (1, 3, 20):
        pace = Pace(N_BATCH, tiles=True)
        pace.observe(N_BATCH, N_BATCH, laptop(0, N_BATCH))
        for n_decoding in range(2, 40):
            n_beside = n_decoding + n_drafted
            pace.observe(0, n_decoding, laptop(n_decoding, 0))
            for n_unread in (5, 70, 110, 2000):
                n = min(pace.limit(n_decoding, n_waiting, n_unread, n_drafted), n_unread)
                assert n == n_unread or n >= 8
                assert not 64 <= n + n_beside < 128 or n == 8
                pace.observe(n, n + n_beside, laptop(n_beside, n))


@pytest.mark.parametrize("n_drafted", [0, 1, 3, 9])
def test_no_row_is_left_over_beside_drafts(n_drafted: int) -> None:
    for seconds, on_gpu, n_together in ((gpu, True, 8), (laptop, False, 4)):
        for n_decoding in (1, 2, 7):
            pace = Pace(N_BATCH, on_gpu=on_gpu)
            pace.observe(N_BATCH, N_BATCH, seconds(0, N_BATCH))
            pace.observe(0, n_decoding, seconds(n_decoding, 0))
            n_rows = n_decoding + n_drafted + pace.limit(n_decoding, n_drafted=n_drafted)
            assert n_rows % n_together == 0
    full = Pace(64)
    full.observe(64, 64, 1e-3)
    assert full.limit(4, n_drafted=n_drafted) == 60 - n_drafted


def test_where_attention_is_not_in_tiles_no_batch_is_cut_for_them() -> None:
    pace = warm(MACHINES[1], 4)
    sizes = {4 + pace.limit(4, n_waiting) for n_waiting in range(1, 8)}
    assert any(64 <= size < 128 for size in sizes)


def test_each_of_several_prompts_may_take_more_than_one_alone() -> None:
    one, two = (warm(MACHINES[0], 16).limit(16, n_waiting) for n_waiting in (1, 2))
    assert two > 2.5 * one


def test_a_short_prompt_alone_does_not_make_tokens_look_dear() -> None:
    """Most of its time goes to the weights, which any step reads."""
    pace = Pace(N_BATCH, on_gpu=True)
    pace.observe(0, 1, gpu(1, 0))
    pace.observe(40, 40, gpu(0, 40))
    alone = gpu(0, 40) / 40
    step = gpu(1, 0)
    assert pace.limit(1, 7) > 1.5 * min(2.2 * 7 * step, 0.05) / alone


def test_the_few_new_tokens_of_a_conversation_say_nothing() -> None:
    """Nearly all of their time goes to the weights."""
    pace = warm(MACHINES[0], 4)
    before = pace.limit(4)
    for _ in range(20):
        pace.observe(10, 10, gpu(0, 10))
    assert pace.limit(4) == before


def test_few_streams_beside_many_that_wait_bear_the_steps_of_all() -> None:
    small = Machine("a small model on two cores", lambda n, m: 0.013 + 0.0058 * n + 0.0024 * m)

    def first(n_decoding: int, n_waiting: int) -> int:
        return warm(small, n_decoding).limit(n_decoding, n_waiting)

    assert first(1, 7) > 1.3 * first(1, 2)
