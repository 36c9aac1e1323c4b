"""Reused prefixes on models of every kind of memory: the answers are those of a cold run.

Batches of different sizes use different kernels, so a token may differ where the best two are
nearly equal; everything up to there, and its likelihood, is the same.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvserve.ipc.messages import Load, Loaded, TokenPrompt
from tests.worker.conftest import Answer, Peer, Workers

pytest.importorskip("gguf")

WINDOW = 64
KINDS = ("llama", "gemma3", "qwen35", "mamba2")
TOLERANCE = 0.02
REAL_TOLERANCE = 0.2
"""Quantized weights round the activations: the place of a cell alone, without any reuse, moves a
logarithm by up to 0.03 at some tokens (llama.cpp on the CPU, this model)."""
_salts = map(str, itertools.count())


@dataclass
class Model:
    """One loaded worker. `cold` answers are computed in it too, sharing nothing."""

    arch: str
    peer: Peer

    def ask(self, tokens: list[int], n_answer: int = 12, **fields: object) -> int:
        usual = {"max_tokens": n_answer, "ignore_eos": True, "n_logprobs": 3}
        return self.peer.ask(TokenPrompt(tuple(tokens)), **(usual | fields))

    def warm(self, tokens: list[int], **fields: object) -> Answer:
        return self.peer.finish(self.ask(tokens, **fields))[0]

    def cold(self, tokens: list[int], n_answer: int = 12) -> Answer:
        answer = self.warm(tokens, n_answer=n_answer, cache_salt=next(_salts))
        assert answer.end.n_cached_tokens == 0
        return answer


def generated(
    arch: str, workers: Workers, load_message: Callable[..., Load], folder: Path, **fields: object
) -> Model:
    """A worker that has loaded a small model of the architecture."""
    from tests.models import write_model

    path = folder / "model.gguf"
    write_model(path, arch, n_layer=4, window=WINDOW, seed=3)
    peer = workers.start()
    assert isinstance(peer.load(load_message(model_path=str(path), **fields)), Loaded)
    return Model(arch, peer)


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest,
    worker_factory: Workers,
    load_message: Callable[..., Load],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("models")
    model = generated(request.param, worker_factory, load_message, folder)
    yield model
    model.peer.process.kill()


def some_tokens(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 280), k=n)


def assert_same(answer: Answer, cold: Answer, tolerance: float = TOLERANCE) -> None:
    assert answer.end.n_generated_tokens == cold.end.n_generated_tokens
    for mine, theirs in zip(answer.logprobs, cold.logprobs, strict=True):
        if mine.drawn.token != theirs.drawn.token:
            assert abs(theirs.top[0].logprob - theirs.top[1].logprob) < tolerance
            return
        assert mine.drawn.logprob == pytest.approx(theirs.drawn.logprob, abs=tolerance)
    assert answer.tokens == cold.tokens


def test_a_conversation_prefills_only_its_new_turns(model: Model) -> None:
    tokens = some_tokens(100, seed=1)
    for turn in range(4):
        answer = model.warm(tokens)
        n_before = len(tokens) - 30 - 1
        assert answer.end.n_cached_tokens == (n_before if turn else 0)
        assert_same(answer, model.cold(tokens))
        tokens += answer.tokens + some_tokens(30, seed=10 + turn)


def test_prompts_that_part_share_what_their_memory_allows(model: Model) -> None:
    beginning = some_tokens(100, seed=2)
    prompts = [beginning + some_tokens(20, seed=20 + n) for n in range(4)]
    answers = [model.warm(prompt) for prompt in prompts]
    n_cached = [answer.end.n_cached_tokens for answer in answers]
    match model.arch:
        case "llama":
            assert n_cached == [0, 100, 100, 100]
        case "gemma3":
            assert set(n_cached) <= {0, 100}
        case _:
            assert n_cached == [0, 0, 0, 0]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert_same(answer, model.cold(prompt))


def test_the_same_prompt_again_decodes_one_token(model: Model) -> None:
    prompt = some_tokens(100, seed=3)
    answers = [model.warm(prompt) for _ in range(3)]
    if model.arch == "llama":
        assert [answer.end.n_cached_tokens for answer in answers] == [0, 99, 99]
    cold = model.cold(prompt)
    for answer in answers:
        assert_same(answer, cold)


def test_a_beginning_matters_more_than_the_tolerance(model: Model) -> None:
    """What the comparisons of this file would see if a wrong prefix were reused."""
    one, other = (model.cold([*some_tokens(60, seed=40 + n), 9], 1) for n in range(2))
    likelihoods = [{top.token: top.logprob for top in a.logprobs[0].top} for a in (one, other)]
    assert likelihoods[0].keys() != likelihoods[1].keys() or any(
        abs(likelihoods[0][token] - likelihoods[1][token]) > TOLERANCE for token in likelihoods[0]
    )


def test_answers_under_pressure_are_those_of_cold_runs(model: Model) -> None:
    """Many requests with common beginnings, cancelled and preempted, on 512 cells."""
    chance = random.Random(5)
    beginnings = [some_tokens(n, seed=n) for n in (40, 90, 150)]
    prompts = []
    for n in range(30):
        older = chance.choice(prompts) if prompts and chance.random() < 0.5 else None
        base = older[: chance.randint(20, len(older))] if older else chance.choice(beginnings)
        prompts.append(base + some_tokens(chance.randint(1, 40), seed=100 + n))
    lengths = [chance.randint(1, 60) for _ in prompts]
    requests = [model.ask(prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
    cancelled = set(requests[3::7])
    for request in cancelled:
        model.peer.cancel(request)
    alive = [request for request in requests if request not in cancelled]
    answers = dict(zip(alive, model.peer.finish(*alive), strict=True))
    assert max(step.n_cells_used + step.n_cells_kept for step in model.peer.steps) <= 512
    if model.arch == "llama":
        assert sum(answer.end.n_cached_tokens for answer in answers.values()) > 500
    for request, prompt, n_answer in zip(requests, prompts, lengths, strict=True):
        if request in answers:
            assert_same(answers[request], model.cold(prompt, n_answer))


def test_a_salt_shares_with_its_own_alone(model: Model) -> None:
    prompt = some_tokens(80, seed=6)
    answer = model.warm(prompt, cache_salt="mine")
    longer = [*prompt, *answer.tokens, 7]
    assert model.warm(longer, cache_salt="mine").end.n_cached_tokens == 91
    assert model.warm([*longer, 8], cache_salt="yours").end.n_cached_tokens == 0
    assert model.warm([*longer, 8]).end.n_cached_tokens == 0


def test_broken_and_cancelled_requests_leave_nothing_wrong_behind(model: Model) -> None:
    prompt = some_tokens(200, seed=9)
    for n in range(5):
        request = model.ask(prompt[: 60 + 20 * n] + some_tokens(40, seed=90 + n), 100)
        while not model.peer.answers[request].tokens:
            model.peer.receive()
        model.peer.cancel(request)
    assert_same(model.warm(prompt), model.cold(prompt))


def test_turns_longer_than_the_window_of_a_real_model(
    workers: Workers, load_message: Callable[..., Load]
) -> None:
    """Gemma looks back 512 tokens in most of its layers."""
    peer = workers.start()
    assert isinstance(peer.load(load_message(n_ctx=2048, n_seq_max=2)), Loaded)
    gemma = Model("gemma3", peer)
    tokens = [2, *(236770, 236744, 236743) * 230]
    n_known = 0
    for _ in range(2):
        answer = gemma.warm(tokens)
        assert answer.end.n_cached_tokens == n_known
        assert_same(answer, gemma.cold(tokens), REAL_TOLERANCE)
        n_known = len(tokens) + len(answer.tokens) - 1
        tokens += [*answer.tokens, *(236770, 236744, 236743) * 20]
    # The window before token 400 is gone: its beginning is of no use.
    assert gemma.warm([*tokens[:400], 9]).end.n_cached_tokens == 0
