"""Draws from shortlists against llama.cpp's own steps over the whole row, with the same seed."""

import ctypes
from collections import Counter

import numpy as np
import pytest

from kvserve.ipc.messages import Sampling
from kvserve.worker.sequences import Generation, Limits

llama = pytest.importorskip("kvserve.worker.llama")

from kvserve.worker.chains import Chain, Steps  # noqa: E402
from kvserve.worker.mirostat import Mirostat  # noqa: E402
from kvserve.worker.penalties import Dry  # noqa: E402
from kvserve.worker.sampling import Sampler  # noqa: E402

N_VOCAB = 5000
EVERYTHING = np.arange(N_VOCAB)
NONE = np.empty(0, dtype=np.int64)


def some_row(seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, N_VOCAB).astype(np.float32)


def sampler(answer: tuple[int, ...] = (), **fields: object) -> Sampler:
    generation = Generation(np.array([1], dtype=np.int32), Limits(max_tokens=400))
    generation.replay(answer, lambda token: b"x", lambda token: False)
    return Sampler(
        Sampling(**({"seed": 5, "top_k": 0} | fields)),
        generation,
        n_vocab=N_VOCAB,
        forbidden=NONE,
        end_tokens=NONE,
        piece=lambda token: b"x",
    )


def drawn(n: int, first: int = 0, answer: tuple[int, ...] = (), **fields: object) -> list[int]:
    one = sampler(answer, **fields)
    return [one.sample(some_row(first + seed)) for seed in range(n)]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 4, "top_p": 0.7, "min_p": 0.2, "typical_p": 0.9, "temperature": 1.5},
        {"top_k": 2000, "temperature": 0.7},
        {"min_p": 0.01, "temperature": 2.0},
        {"xtc_probability": 0.5, "xtc_threshold": 0.02},
        {"min_p": 0.01, "xtc_probability": 1.0, "xtc_threshold": 0.02},
    ],
    ids=str,
)
def test_a_shortlist_draws_what_the_whole_row_draws(fields: dict[str, float]) -> None:
    whole = Chain(Steps(**fields), seed=5)
    expected = [whole.draw(EVERYTHING, some_row(seed)) for seed in range(200)]
    assert drawn(200, **fields) == expected


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.5}, {"typical_p": 0.5}], ids=str)
def test_draws_come_as_often_as_llama_cpp_draws_them(fields: dict[str, float]) -> None:
    """The order of equal chances is another one, so the numbers of one seed mean other tokens."""
    row = some_row(1, spread=4.0)
    whole = Chain(Steps(temperature=0.8, **fields), seed=5)
    mine = sampler(temperature=0.8, **fields)
    n = 6000
    counts = Counter(mine.sample(row.copy()) for _ in range(n))
    theirs = Counter(whole.draw(EVERYTHING, row) for _ in range(n))
    for token, count in theirs.most_common(8):
        assert abs(counts[token] - count) < 5 * np.sqrt(2 * count)
    if fields:
        assert counts.keys() == theirs.keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 4},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"min_p": 0.01},
        {"temperature": 0.8},
        {"top_k": 2000, "xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repeat_penalty": 1.3, "top_k": 4},
        {"dry_multiplier": 0.8, "top_k": 4},
    ],
    ids=str,
)
def test_a_resumed_generation_goes_on_with_its_seed(fields: dict[str, float]) -> None:
    generation = Generation(np.array([1], dtype=np.int32), Limits(max_tokens=400))
    whole = Sampler(
        Sampling(**({"seed": 5, "top_k": 0} | fields)), generation,
        n_vocab=N_VOCAB, forbidden=NONE, end_tokens=NONE, piece=lambda token: b"x",
    )  # fmt: skip
    tokens = []
    for seed in range(60):
        tokens.append(whole.sample(some_row(seed)))
        generation.accept(tokens[-1], b"x", ends=False)
    resumed = sampler(tuple(tokens[:40]), **fields)
    assert resumed.sample(some_row(40)) == tokens[40]


def test_xtc_leaves_the_last_of_the_top_choices() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04] + [1e-9] * (N_VOCAB - 5), dtype=np.float32))
    one = sampler(xtc_probability=1.0, xtc_threshold=0.1, min_p=0.01)
    assert {one.sample(row.copy()) for _ in range(300)} == {2, 3, 4}


def test_mirostat_keeps_to_what_it_may_surprise_with() -> None:
    row = some_row(3, spread=3.0)
    logprobs = row - np.log(np.exp(row.astype(np.float64)).sum())
    one = Mirostat(2, tau=3.0, eta=0.1, temperature=1.0, seed=1, n_drawn=0)
    for _ in range(300):
        limit = one.max_surprise
        token = one.sample(row.copy())
        assert -logprobs[token] / np.log(2) <= max(limit, -logprobs.max() / np.log(2)) + 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_reaches_its_target(version: int) -> None:
    """The mean surprise among the tokens that were kept, in bits."""
    one = Mirostat(version, tau=3.0, eta=0.1, temperature=1.0, seed=1, n_drawn=0)
    spent = []
    for n in range(600):
        before = one.max_surprise
        one.sample(some_row(n % 7, spread=1.5))
        spent.append((before - one.max_surprise) / 0.1 + 3.0)
    assert np.mean(spent[200:]) == pytest.approx(3.0, abs=0.2)


def test_mirostat_ignores_what_shortens_the_list() -> None:
    usual = {"mirostat": 2, "temperature": 1.0}
    assert drawn(50, **usual, top_k=1) == drawn(50, **usual)


@pytest.fixture(scope="module")
def vocab(model_path: str):
    """llama.cpp's own, from the file."""
    import llama_cpp.llama_cpp as ll

    params = ll.llama_model_default_params()
    params.vocab_only = True
    model = ll.llama_model_load_from_file(model_path.encode(), params)
    yield ll, ll.llama_model_get_vocab(model)
    ll.llama_model_free(model)


@pytest.mark.parametrize("breakers", [(), ("\n", ":"), ("two words",)], ids=str)
def test_dry_is_llama_cpps(vocab, breakers: tuple[str, ...]) -> None:
    """Random texts of few tokens, full of repetitions; some of the tokens are breakers."""
    ll, raw = vocab
    known = llama.Vocab(raw)
    words = [
        known.tokenize(text, add_special=False, parse_special=False).tolist()
        for text in ("\n", ":", " two words", " one", " three", "a", "b")
    ]
    random = np.random.default_rng(len(breakers))
    n_penalized = 0
    c_breakers = (ctypes.c_char_p * max(len(breakers), 1))(*(one.encode() for one in breakers))
    theirs = ll.llama_sampler_init_dry(raw, 0.8, 1.75, 2, 64, c_breakers, len(breakers))
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
