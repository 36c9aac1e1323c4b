"""Sequences go from one worker's cache into the next one's, and their answers go on there."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvserve.ipc.messages import Load, Loaded, Pause, Paused, TokenPrompt, Transcode, Transcoded
from tests.worker.conftest import Answer, Peer, Workers
from tests.worker.test_reuse import some_tokens

pytest.importorskip("gguf")

KINDS = ("llama", "gemma3", "qwen35", "mamba2", "deepseek2")
Paths = tuple[str, ...]
WINDOW = 64
PLENTY = 2**30
RUNNING = 6
"""Tokens that a running request has when its worker is paused."""
MORE = 15
TOLERANCES = {"f16": 0.02, "q8_0": 0.1}


@dataclass
class Files:
    """What the daemon does with exported states: holds them by descriptors of its own."""

    held: list[int] = field(default_factory=list)
    paths: dict[tuple[Peer, int], str] = field(default_factory=dict)

    def adopt(self, peer: Peer, paused: Paused) -> tuple[Paths, ...]:
        return tuple(
            tuple(self.hold(peer, fd) for fd in (*state.ahead, state.fd)) for state in paused.states
        )

    def hold(self, peer: Peer, fd: int) -> str:
        path = f"/proc/{peer.process.pid}/fd/{fd}"
        if (peer, fd) not in self.paths:
            self.held.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self.paths[peer, fd] = f"/proc/{os.getpid()}/fd/{self.held[-1]}"
        return self.paths[peer, fd]


@pytest.fixture
def files() -> Iterator[Files]:
    held = Files()
    yield held
    for descriptor in held.held:
        os.close(descriptor)


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import write_model

    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    write_model(path, request.param, n_layer=4, window=WINDOW, seed=3)
    return path


@dataclass
class House:
    """Starts workers on one model; they see what earlier ones left."""

    workers: Workers
    load_message: Callable[..., Load]
    path: Path
    files: Files

    def start(self, kv_type: str, **fields: object) -> tuple[Peer, Loaded]:
        peer = self.workers.start()
        types = {"type_k": kv_type, "type_v": kv_type}
        load = self.load_message(model_path=str(self.path), **(types | fields))
        loaded = peer.load(load)
        assert isinstance(loaded, Loaded), loaded
        return peer, loaded

    def pause(self, peer: Peer, limit: int = PLENTY) -> tuple[Paused, tuple[Paths, ...]]:
        peer.send(Pause(export_bytes=limit))
        paused = peer.until(Paused)
        assert isinstance(paused, Paused)
        paths = self.files.adopt(peer, paused)
        peer.process.kill()
        peer.process.wait()
        return paused, paths


@pytest.fixture
def house(workers, load_message, path, files) -> House:
    return House(workers, load_message, path, files)


def ask(peer: Peer, tokens: list[int], n_answer: int = 30, **fields: object) -> int:
    usual = {"max_tokens": n_answer, "ignore_eos": True, "n_logprobs": 2}
    return peer.ask(TokenPrompt(tuple(tokens)), **(usual | fields))


def begin(peer: Peer, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Let requests run until each has some tokens; returns these."""
    requests = [ask(peer, prompt, n_answer=150) for prompt in prompts]
    while min(len(peer.answers[request].tokens) for request in requests) < RUNNING:
        peer.receive()
    return [tuple(peer.answers[request].tokens) for request in requests]


def assert_alike(answer: Answer, native: Answer, tolerance: float) -> None:
    """An answer's rest is that of a prefill in the same types, up to a choice between equals."""
    for mine, theirs in zip(answer.logprobs, native.logprobs, strict=True):
        if mine.drawn.token != theirs.drawn.token:
            assert mine.drawn.logprob == pytest.approx(theirs.drawn.logprob, abs=tolerance)
            return
        assert mine.drawn.logprob == pytest.approx(theirs.drawn.logprob, abs=tolerance)


@pytest.mark.parametrize("pair", [("f16", "f16"), ("f16", "q8_0"), ("q8_0", "f16")], ids="-".join)
def test_running_answers_go_on_in_the_next_cache(house: House, pair: tuple[str, str]) -> None:
    source, target = pair
    first, _ = house.start(source)
    prompts = [some_tokens(100, seed=1), some_tokens(40, seed=2)]
    befores = begin(first, prompts)
    _, paths = house.pause(first)
    befores = [tuple(first.answers[request].tokens) for request in (1, 2)]

    second, loaded = house.start(target, n_ctx=1024, carried=paths)
    assert loaded.carried is not None
    assert loaded.carried.refused == ()
    assert loaded.carried.n_sequences == 2
    resumed = [
        ask(second, prompt, n_answer=len(before) + MORE, resume=before)
        for prompt, before in zip(prompts, befores, strict=True)
    ]
    answers = second.finish(*resumed)
    # Nothing but the pending token was decoded before the first new one.
    assert sum(step.n_prefilled for step in second.steps) == 2
    tolerance = max(TOLERANCES[source], TOLERANCES[target])
    for prompt, before, answer in zip(prompts, befores, answers, strict=True):
        n_answer = len(before) + MORE
        again = ask(second, prompt, n_answer, resume=before, cache_salt="alone")
        native = second.finish(again)[0]
        assert native.end.n_cached_tokens == 0
        assert len(answer.tokens) == len(native.tokens) == MORE
        assert_alike(answer, native, tolerance)


def test_finished_conversations_come_along_with_their_salt(house: House) -> None:
    first, _ = house.start("f16")
    prompt = some_tokens(80, seed=4)
    answer = first.finish(ask(first, prompt, cache_salt="mine"))[0]
    paused, paths = house.pause(first)
    assert [state.n_tokens for state in paused.states] == [109]

    second, _ = house.start("q8_0", carried=paths)
    longer = [*prompt, *answer.tokens, 7]
    other = second.finish(ask(second, longer, cache_salt="yours"))[0]
    assert other.end.n_cached_tokens == 0
    mine = second.finish(ask(second, longer, cache_salt="mine"))[0]
    assert mine.end.n_cached_tokens == 109


@pytest.mark.parametrize("guess", ["q8_0", "f16"])
def test_transcoding_may_begin_before_the_load(house: House, guess: str) -> None:
    first, _ = house.start("f16")
    prompt = some_tokens(80, seed=4)
    first.finish(ask(first, prompt))
    _, paths = house.pause(first)
    peer = house.workers.start()
    peer.send(Transcode(paths, guess, guess))
    peer.until(Transcoded)
    load = house.load_message(
        model_path=str(house.path), type_k="q8_0", type_v="q8_0", carried=paths
    )
    loaded = peer.load(load)
    assert isinstance(loaded, Loaded)
    assert loaded.carried is not None
    assert (loaded.carried.n_sequences, loaded.carried.refused) == (1, ())


def test_what_is_over_the_limit_stays_behind_and_is_prefilled(house: House) -> None:
    first, _ = house.start("f16")
    prompts = [some_tokens(100, seed=1), some_tokens(40, seed=2)]
    begin(first, prompts)
    paused, paths = house.pause(first, limit=1)
    assert paused.states == ()
    assert len(paused.refused) == 2
    assert "carry_ram" in paused.refused[0]
    assert paths == ()


def test_too_long_for_the_next_context_is_refused_and_the_rest_is_read(house: House) -> None:
    first, _ = house.start("f16")
    begin(first, [some_tokens(300, seed=1), some_tokens(40, seed=2)])
    _, paths = house.pause(first)
    second, loaded = house.start("f16", n_ctx=256, carried=paths)
    assert loaded.carried is not None
    assert loaded.carried.n_sequences == 1
    assert "256" in loaded.carried.refused[0]
    fresh = second.finish(ask(second, some_tokens(60, seed=9), n_answer=10))[0]
    assert fresh.end.n_generated_tokens == 10


def test_files_that_are_no_states_are_refused(house: House, tmp_path: Path) -> None:
    other = tmp_path / "state"
    other.write_bytes(b"kvserve1" + bytes(5000))
    missing = f"/proc/{os.getpid()}/fd/987654"
    peer, loaded = house.start("f16", carried=((str(other),), (missing,)))
    assert loaded.carried is not None
    assert loaded.carried.n_sequences == 0
    assert len(loaded.carried.refused) == 2
    assert peer.finish(ask(peer, some_tokens(30, seed=3)))[0].end.n_generated_tokens == 30
