"""Draws and their preparation against llama.cpp's own samplers over the whole row."""

import ctypes
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from kvserve.ipc.messages import Sampling
from kvserve.worker.sequences import Generation, Limits

llama = pytest.importorskip("kvserve.worker.llama")

import llama_cpp.llama_cpp as ll  # noqa: E402

from kvserve.worker.dice import Dice  # noqa: E402
from kvserve.worker.mirostat import Mirostat  # noqa: E402
from kvserve.worker.penalties import Dry  # noqa: E402
from kvserve.worker.sampling import Sampler  # noqa: E402

N_VOCAB = 5000
NONE = np.empty(0, dtype=np.int64)


def some_row(seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, N_VOCAB).astype(np.float32)


def sampler(answer: tuple[int, ...] = (), **fields: object) -> Sampler:
    generation = Generation(np.array([1], dtype=np.int32), Limits(max_tokens=400))
    generation.replay(answer, lambda token: b"x", lambda token: False)
    return Sampler(
        Sampling(**({"seed": 5, "top_k": 0, "temperature": 0.8} | fields)),
        generation,
        forbidden=NONE,
        end_tokens=NONE,
        piece=lambda token: b"x",
    )


class WholeRow:
    """llama.cpp's chain over all tokens, in its order, without the draw."""

    def __init__(self, fields: dict[str, float]) -> None:
        makers = {
            "top_k": ll.llama_sampler_init_top_k,
            "typical_p": lambda value: ll.llama_sampler_init_typical(value, 1),
            "top_p": lambda value: ll.llama_sampler_init_top_p(value, 1),
            "min_p": lambda value: ll.llama_sampler_init_min_p(value, 1),
            "xtc_threshold": lambda value: ll.llama_sampler_init_xtc(1.0, value, 1, 1),
            "temperature": ll.llama_sampler_init_temp,
        }
        self._chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        for name, make in makers.items():
            if name in fields:
                ll.llama_sampler_chain_add(self._chain, make(fields[name]))

    def chances(self, row: np.ndarray) -> dict[int, float]:
        """The tokens that are left, with their probabilities."""
        tokens = (ll.llama_token_data * len(row))(*((i, x, 0.0) for i, x in enumerate(row)))
        left = ll.llama_token_data_array(tokens, len(row), -1, False)
        ll.llama_sampler_apply(self._chain, ctypes.byref(left))
        logits = {left.data[i].id: left.data[i].logit for i in range(left.size)}
        weights = np.exp(np.array(list(logits.values())) - max(logits.values()))
        return dict(zip(logits, (weights / weights.sum()).tolist(), strict=True))

    def __del__(self) -> None:
        ll.llama_sampler_free(self._chain)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 4000},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"min_p": 0.1},
        {"xtc_threshold": 0.03},
        {"top_k": 40, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.1, "xtc_threshold": 0.1},
        {"typical_p": 0.9, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_llama_cpp_lets_them(fields: dict[str, float]) -> None:
    row = some_row(1, spread=3.0)
    chances = WholeRow({"temperature": 0.8, **fields}).chances(row)
    xtc = {"xtc_probability": 1.0} if "xtc_threshold" in fields else {}
    one = sampler(**fields, **xtc)
    n = 4000
    counts = Counter(one.sample(row.copy()) for _ in range(n))
    assert counts.keys() <= chances.keys()
    for token, chance in chances.items():
        assert abs(counts[token] - n * chance) < 5 * np.sqrt(n * chance + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 4},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"min_p": 0.01},
        {"top_k": 2000, "xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repeat_penalty": 1.3, "top_k": 4},
        {"dry_multiplier": 0.8, "top_k": 4},
    ],
    ids=str,
)
def test_a_resumed_generation_goes_on_with_its_seed(fields: dict[str, float]) -> None:
    tokens: tuple[int, ...] = ()
    generation = Generation(np.array([1], dtype=np.int32), Limits(max_tokens=400))
    whole = Sampler(
        Sampling(**({"seed": 5, "top_k": 0, "temperature": 0.8} | fields)),
        generation,
        forbidden=NONE,
        end_tokens=NONE,
        piece=lambda token: b"x",
    )
    for seed in range(60):
        tokens += (whole.sample(some_row(seed)),)
        generation.take(tokens[-1])
    for n in (1, 30, 59):
        assert sampler(tokens[:n], **fields).sample(some_row(n)) == tokens[n]


@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"typical_p": 0.9}], ids=str)
def test_rounding_hardly_ever_changes_a_draw(fields: dict[str, float]) -> None:
    """As where a batch of another size is computed by another kernel."""
    one, other = sampler(**fields), sampler(**fields)
    n_changed = 0
    for seed in range(300):
        row = some_row(seed, spread=1.0)
        noise = np.random.default_rng(1000 + seed).normal(0, 1e-4, N_VOCAB).astype(np.float32)
        n_changed += one.sample(row + noise) != other.sample(row)
    assert n_changed <= 6


@pytest.mark.parametrize("value", [-np.inf, np.nan, -np.nan])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.1},
        {"mirostat": 1},
        {"mirostat": 2},
    ],
    ids=str,
)
def test_a_row_without_logits_is_survived(fields: dict[str, float], value: float) -> None:
    """A grammar that cannot be followed leaves nothing, and a broken model NaN; the worker must
    not die of either."""
    token = sampler(**fields).sample(np.full(N_VOCAB, value, dtype=np.float32))
    assert 0 <= token < N_VOCAB


def test_streams_of_one_seed_differ() -> None:
    assert len({Dice(7, 0, stream).uniform() for stream in range(3)}) == 3
    later, all_along = Dice(7, 5), Dice(7)
    assert [all_along.uniform() for _ in range(8)][5:] == [later.uniform() for _ in range(3)]


def test_numbers_that_were_given_back_come_again() -> None:
    dice, expected = Dice(5), [Dice(5, n).uniform() for n in range(8)]
    taken = [dice.uniform() for _ in range(5)]
    dice.give_back(taken[2:])
    dice.give_back([])
    again = [dice.uniform() for _ in range(2)]
    dice.give_back(again[1:])
    assert [dice.uniform() for _ in range(5)] == expected[3:]


@pytest.mark.parametrize("probability", [1e-9, 0.25, 1.0])
def test_what_happens(probability: float) -> None:
    dice = Dice(3)
    n = sum(dice.happens(probability) for _ in range(2000))
    assert abs(n - 2000 * probability) < 100


def test_mirostat_keeps_to_what_it_may_surprise_with() -> None:
    row = some_row(3, spread=3.0)
    logprobs = row - np.log(np.exp(row.astype(np.float64)).sum())
    dice = Dice(1)
    one = Mirostat(2, tau=3.0, eta=0.1, temperature=1.0)
    for _ in range(300):
        limit = one.max_surprise
        token = one.sample(row.copy(), dice.uniform())
        assert -logprobs[token] / np.log(2) <= max(limit, -logprobs.max() / np.log(2)) + 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_reaches_its_target(version: int) -> None:
    """The mean surprise among the tokens that were kept, in bits."""
    dice = Dice(1)
    one = Mirostat(version, tau=3.0, eta=0.1, temperature=1.0)
    spent = []
    for n in range(600):
        before = one.max_surprise
        one.sample(some_row(n % 7, spread=1.5), dice.uniform())
        spent.append((before - one.max_surprise) / 0.1 + 3.0)
    assert np.mean(spent[200:]) == pytest.approx(3.0, abs=0.2)


def test_mirostat_takes_the_place_of_what_shortens_the_list() -> None:
    free, bound = sampler(mirostat=2), sampler(mirostat=2, top_k=1)
    drawn = [free.sample(some_row(seed)) for seed in range(50)]
    assert drawn == [bound.sample(some_row(seed)) for seed in range(50)]
    assert drawn != [int(some_row(seed).argmax()) for seed in range(50)]


@pytest.fixture(scope="module")
def vocab(model_path: str) -> Iterator[object]:
    """llama.cpp's own, from the file."""
    params = ll.llama_model_default_params()
    params.vocab_only = True
    model = ll.llama_model_load_from_file(model_path.encode(), params)
    yield ll.llama_model_get_vocab(model)
    ll.llama_model_free(model)


@pytest.mark.parametrize("breakers", [(), ("\n", ":"), ("two words",)], ids=str)
def test_dry_is_llama_cpps(vocab: object, breakers: tuple[str, ...]) -> None:
    """Random texts of few tokens, full of repetitions; some of the tokens are breakers."""
    known = llama.Vocab(vocab)
    words = [
        known.tokenize(text, add_special=False, parse_special=False).tolist()
        for text in ("\n", ":", " two words", " one", " three", "a", "b")
    ]
    random = np.random.default_rng(len(breakers))
    n_penalized = 0
    c_breakers = (ctypes.c_char_p * max(len(breakers), 1))(*(one.encode() for one in breakers))
    theirs = ll.llama_sampler_init_dry(vocab, 0.8, 1.75, 2, 64, c_breakers, len(breakers))
    for _ in range(120):
        order = random.choice(
            len(words), random.integers(3, 60), p=[0.05, 0.05, 0.1, 0.2, 0.2, 0.2, 0.2]
        )
        tokens = np.array([token for n in order for token in words[n]], dtype=np.int32)
        ll.llama_sampler_reset(theirs)
        for token in tokens.tolist():
            ll.llama_sampler_accept(theirs, token)
        ids = np.unique(tokens)
        choice = (ll.llama_token_data * len(ids))(*((int(i), 0.0, 0.0) for i in ids))
        array = ll.llama_token_data_array(choice, len(ids), -1, False)
        ll.llama_sampler_apply(theirs, ctypes.byref(array))
        expected = {one.id: one.logit for one in choice}

        row = np.zeros(known.n_tokens, dtype=np.float32)
        sampling = Sampling(
            dry_multiplier=0.8, dry_penalty_last_n=64, dry_sequence_breakers=breakers
        )
        Dry(sampling, tokens, known.piece).apply(row, tokens)
        assert {int(i): row[i] for i in ids} == pytest.approx(expected, rel=1e-4)
        assert not row[np.setdiff1d(np.arange(len(row)), ids)].any()
        n_penalized += int((row < 0).sum())
    ll.llama_sampler_free(theirs)
    assert n_penalized > 50


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("row", [some_row(1), np.zeros(N_VOCAB, dtype=np.float32)])
def test_mirostat_survives_targets_out_of_reach(version: int, row: np.ndarray) -> None:
    dice = Dice(1)
    one = Mirostat(version, tau=100.0, eta=1.0, temperature=1.0)
    assert all(0 <= one.sample(row.copy(), dice.uniform()) < N_VOCAB for _ in range(50))
