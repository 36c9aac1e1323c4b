"""Conversations that left the KV cache for host memory and come back: answers as of a cold run."""

from collections.abc import Callable, Iterator

import pytest

from kvserve.ipc.messages import Load
from tests.worker.conftest import Workers
from tests.worker.test_reuse import KINDS, Model, assert_same, generated, some_tokens

pytest.importorskip("gguf")

LONG = 400


@pytest.fixture(scope="module", params=[*KINDS, "deepseek2"])
def model(
    request: pytest.FixtureRequest,
    worker_factory: Workers,
    load_message: Callable[..., Load],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("models")
    fields = {"n_ctx": 512, "n_seq_max": 1, "cache_ram_bytes": 2**26}
    model = generated(request.param, worker_factory, load_message, folder, **fields)
    yield model
    model.peer.process.kill()


def test_a_conversation_that_was_pushed_out_is_restored(model: Model) -> None:
    conversations = [some_tokens(LONG, seed=n) for n in (31, 32, 33)]
    first = [model.warm(tokens) for tokens in conversations]
    assert all(answer.end.n_cached_tokens == 0 for answer in first)
    for tokens, answer in zip(conversations, first, strict=True):
        longer = [*tokens, *answer.tokens, 9, 8, 7]
        again = model.warm(longer, n_answer=6)
        assert again.end.n_cached_tokens == LONG + len(answer.tokens) - 1
        assert_same(again, model.cold(longer, n_answer=6))


def test_nothing_is_restored_for_another_tenant(model: Model) -> None:
    tokens = some_tokens(LONG, seed=41)
    answer = model.warm(tokens, cache_salt="mine")
    model.warm(some_tokens(LONG, seed=42))
    longer = [*tokens, *answer.tokens, 5]
    assert model.warm(longer, cache_salt="yours").end.n_cached_tokens == 0
    assert model.warm(longer, cache_salt="mine").end.n_cached_tokens >= LONG


def test_beside_streams_a_conversation_comes_back_between_their_tokens(
    workers: Workers, load_message: Callable[..., Load], tmp_path
) -> None:
    fields = {"n_ctx": 1024, "n_seq_max": 3, "cache_ram_bytes": 2**28}
    model = generated("llama", workers, load_message, tmp_path, **fields)
    peer = model.peer
    conversations = [some_tokens(LONG, seed=n) for n in (61, 62, 63)]
    # Each of them twice: reuse pays, so what must go is stored.
    first = [(model.warm(tokens), model.warm(tokens))[0] for tokens in conversations]
    stream = some_tokens(20, seed=65)
    running = model.ask(stream, n_answer=300)
    longer = [*conversations[0], *first[0].tokens, 9, 8, 7]
    back = model.ask(longer, n_answer=6)
    streamed, again = peer.finish(running, back)
    assert again.end.n_cached_tokens == LONG + len(first[0].tokens) - 1
    ended = [n for n, step in enumerate(peer.steps) for end in step.ends if end.id == back]
    assert ended[0] < len(peer.steps) - 100, "it does not wait until the stream ends"
    n_read = [step.n_prefilled for step in peer.steps]
    assert sum(n_read) == 3 * (LONG + 1) + len(stream) + 4, "it was not read again"
    assert_same(again, model.cold(longer, n_answer=6))
    assert_same(streamed, model.cold(stream, n_answer=300))


def test_a_preempted_request_goes_on_where_it_was(
    workers: Workers, load_message: Callable[..., Load], tmp_path
) -> None:
    fields = {"n_ctx": 768, "n_seq_max": 2, "cache_ram_bytes": 2**26}
    model = generated("llama", workers, load_message, tmp_path, **fields)
    peer = model.peer
    prompts = [some_tokens(300, seed=n) for n in (51, 52)]
    answers = peer.finish(*[model.ask(tokens, n_answer=150) for tokens in prompts])
    assert max(step.n_cells_used for step in peer.steps) <= 768
    n_prefilled = sum(step.n_prefilled for step in peer.steps)
    assert 600 < n_prefilled <= 610
    for tokens, answer in zip(prompts, answers, strict=True):
        assert_same(answer, model.cold(tokens, n_answer=150))
