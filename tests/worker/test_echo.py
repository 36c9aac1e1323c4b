"""Prompts that come back with their likelihoods, from the real worker and generated models.

Their weights are not quantized: the same tokens have the same likelihoods in any batch.
"""

import random
from collections.abc import Iterator

import pytest

from kvserve.ipc.messages import Loaded, Sampling, TokenPrompt
from tests.worker.conftest import Answer, Peer

pytest.importorskip("gguf")

TOLERANCE = 0.02
PROMPTS = [random.Random(n).choices(range(5, 280), k=10 + 15 * n) for n in range(4)]


@pytest.fixture(scope="module", params=["llama", "gemma3", "mamba2"])
def worker(request, worker_factory, load_message, tmp_path_factory) -> Iterator[Peer]:
    """512 cells, 4 slots: a batch has 4 rows of logits."""
    from tests.models import write_model

    path = tmp_path_factory.mktemp("models") / "model.gguf"
    write_model(path, request.param, n_layer=4, window=64, seed=3)
    peer = worker_factory.start()
    assert isinstance(peer.load(load_message(model_path=str(path))), Loaded)
    yield peer
    peer.process.kill()


def ask(worker: Peer, tokens: list[int], **fields: object) -> int:
    usual = {"echo": True, "n_logprobs": 2, "max_tokens": 0, "ignore_eos": True}
    return worker.ask(TokenPrompt(tuple(tokens)), **(usual | fields))


def scored(worker: Peer, tokens: list[int], **fields: object) -> Answer:
    return worker.finish(ask(worker, tokens, **fields))[0]


def likelihoods(answer: Answer) -> list[float]:
    return [one.drawn.logprob for one in answer.echo.logprobs]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_has_the_likelihoods_that_it_has_as_an_answer(worker: Peer, prompt) -> None:
    answer = scored(worker, prompt, echo=False, max_tokens=10)
    both = scored(worker, prompt + answer.tokens).echo
    assert [one.drawn.token for one in both.logprobs] == prompt[1:] + answer.tokens
    for one, other in zip(both.logprobs[-10:], answer.logprobs, strict=True):
        assert one.drawn.logprob == pytest.approx(other.drawn.logprob, abs=TOLERANCE)
        assert one.top[0].logprob == pytest.approx(other.top[0].logprob, abs=TOLERANCE)


def test_likelihoods_hang_on_what_comes_before(worker: Peer) -> None:
    """What the comparisons of this file would see if rows were mixed up."""
    one, other = (scored(worker, [*PROMPTS[n], 9]) for n in (1, 2))
    assert likelihoods(one)[-1] != pytest.approx(likelihoods(other)[-1], abs=TOLERANCE)


def test_an_echo_has_all_pieces_and_no_answer(worker: Peer) -> None:
    answer = scored(worker, PROMPTS[1])
    assert len(answer.echo.pieces) == answer.n_prompt == len(answer.echo.logprobs) + 1
    assert [one.drawn.piece for one in answer.echo.logprobs] == list(answer.echo.pieces[1:])
    assert (answer.tokens, answer.text, answer.end.reason) == ([], "", "length")
    assert answer.end.n_generated_tokens == 0
    assert worker.steps[-1].n_cells_used == 0


def test_an_answer_follows_its_echo(worker: Peer) -> None:
    alone = scored(worker, PROMPTS[2], echo=False, max_tokens=6)
    answer = scored(worker, PROMPTS[2], max_tokens=6)
    assert answer.tokens == alone.tokens
    assert len(answer.logprobs) == 6
    assert len(answer.echo.logprobs) == answer.n_prompt - 1


def test_an_echo_without_likelihoods(worker: Peer) -> None:
    answer = scored(worker, PROMPTS[2], n_logprobs=None, max_tokens=2)
    assert (len(answer.echo.pieces), answer.echo.logprobs) == (answer.n_prompt, ())
    assert len(answer.tokens) == 2
    nothing = scored(worker, PROMPTS[2], n_logprobs=None)
    assert (nothing.echo.pieces, nothing.echo.logprobs) == (answer.echo.pieces, ())
    assert nothing.end.n_generated_tokens == 0


def test_a_single_token_has_no_likelihood(worker: Peer) -> None:
    for n_answer in (0, 2):
        answer = scored(worker, [7], max_tokens=n_answer)
        assert (answer.echo.logprobs, len(answer.tokens)) == ((), n_answer)


def test_a_cached_prompt_is_scored_again(worker: Peer) -> None:
    prompt = PROMPTS[3]
    first = likelihoods(scored(worker, prompt))
    assert scored(worker, prompt, echo=False, max_tokens=4).end.n_generated_tokens == 4
    assert likelihoods(scored(worker, prompt)) == pytest.approx(first, abs=TOLERANCE)


def test_many_at_a_time_under_pressure_are_scored_as_each_alone(worker: Peer) -> None:
    """More tokens than cells, so some are preempted while they are scored, between answers."""
    prompts = [random.Random(50 + n).choices(range(5, 280), k=100) for n in range(8)]
    alone = [likelihoods(scored(worker, prompt)) for prompt in prompts]
    drawn = Sampling(temperature=1.0, seed=1)
    busy = [ask(worker, PROMPTS[0], sampling=drawn, echo=False, max_tokens=150) for _ in range(4)]
    asked = [
        ask(worker, prompt, sampling=drawn, max_tokens=60 * (n % 2))
        for n, prompt in enumerate(prompts)
    ]
    together = worker.finish(*busy, *asked)[len(busy) :]
    for n, (answer, expected) in enumerate(zip(together, alone, strict=True)):
        assert likelihoods(answer) == pytest.approx(expected, abs=TOLERANCE)
        assert len(answer.tokens) == 60 * (n % 2)
