"""What is written into a row of logits before a token is drawn. No model, no llama.cpp."""

import math

import numpy as np
import pytest

from kvserve.ipc.messages import Sampling
from kvserve.worker.penalties import bounded
from kvserve.worker.sampling import Sampler, fold_seed
from kvserve.worker.sequences import Generation, Limits

N_VOCAB = 16
END = np.array([0, 1])


def sampler(
    prompt: list[int], answer: tuple[int, ...] = (), limits: Limits | None = None, **fields: object
) -> Sampler:
    generation = Generation(np.array(prompt, dtype=np.int32), limits or Limits(max_tokens=8))
    generation.replay(answer, lambda token: b"x", lambda token: False)
    return Sampler(
        Sampling(**({"temperature": 0.0} | fields)),
        generation,
        forbidden=np.array([15]),
        end_tokens=END,
        piece=lambda token: b"x",
    )


def edited(*arguments: object, **fields: object) -> np.ndarray:
    row = np.full(N_VOCAB, 4.0, dtype=np.float32)
    row[7] = -4.0
    sampler(*arguments, **fields).edit(row)
    return row


def test_a_plain_row_loses_only_forbidden_tokens() -> None:
    row = edited([3])
    assert row[15] == -1e9
    assert (row[:7] == 4.0).all()


def test_bias_is_added_and_kept_finite() -> None:
    row = edited([3], logit_bias={2: 1.5, 3: -100.0, 4: -math.inf, 5: math.nan})
    assert row[2:6].tolist() == [5.5, -96.0, 4.0, 4.0]


def test_repeat_penalty_looks_at_prompt_and_answer_in_its_window() -> None:
    row = edited([3, 4, 7, 7], (5,), repeat_penalty=2.0, repeat_last_n=3)
    assert (row[3], row[4], row[5], row[7]) == (4.0, 4.0, 2.0, -8.0)


def test_repeat_window_of_minus_one_is_everything_and_zero_is_off() -> None:
    assert edited([3, 4], repeat_penalty=2.0, repeat_last_n=-1)[3] == 2.0
    assert edited([3, 4], repeat_penalty=2.0, repeat_last_n=0)[3] == 4.0


def test_presence_and_frequency_count_the_answer_alone() -> None:
    row = edited([3, 3], (5, 5, 6), presence_penalty=1.0, frequency_penalty=0.25)
    assert (row[3], row[5], row[6]) == (4.0, 2.5, 2.75)


def test_end_tokens_are_banned_up_to_min_tokens() -> None:
    limits = Limits(max_tokens=8, min_tokens=2)
    assert edited([3], (5,), limits=limits)[0] == -1e9
    assert edited([3], (5, 5), limits=limits)[0] == 4.0


def test_ignore_eos_bans_end_tokens_for_good() -> None:
    limits = Limits(max_tokens=8, ignore_eos=True)
    assert (edited([3], (5, 5), limits=limits)[END] == -1e9).all()


def test_greedy_takes_the_highest_and_counts_it() -> None:
    row = np.zeros(N_VOCAB, dtype=np.float32)
    row[6] = 1.0
    greedy = sampler([3], presence_penalty=2.0)
    assert greedy.greedy
    assert greedy.sample(row.copy()) == 6
    assert greedy.sample(row.copy()) != 6


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0.5), (-1.0, 0.0), (7.0, 2.0), (math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0)],
)
def test_bounded(value: float, expected: float) -> None:
    assert bounded(value, 0.0, 2.0, 1.0) == expected


def test_seeds_fold_to_32_bits_and_avoid_the_random_one() -> None:
    assert fold_seed(7) == 7
    assert fold_seed(0xFFFFFFFF) == 0
    assert 0 <= fold_seed(2**63 + 5) < 0xFFFFFFFF
    assert 0 <= fold_seed(-1) < 0xFFFFFFFF
    assert fold_seed(None) != fold_seed(None)
