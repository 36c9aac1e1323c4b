"""What a worker copies while it still answers, and the next one takes in before it is the last's
turn to stop."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvserve.ipc.messages import (
    Awake,
    CarryReport,
    CopiedAhead,
    CopyAhead,
    Loaded,
    Pause,
    Paused,
    TakeAhead,
    TakeIn,
    TakenAhead,
    TakenIn,
    Transcode,
    Transcoded,
)
from tests.worker.conftest import Answer, Peer
from tests.worker.test_carrying import (
    MORE,
    PLENTY,
    TOLERANCES,
    Files,
    House,
    Paths,
    ask,
    assert_alike,
    begin,
)
from tests.worker.test_reuse import some_tokens

pytest.importorskip("gguf")

KINDS = ("llama", "deepseek2")
PAIRS = [("f16", "f16"), ("f16", "q8_0"), ("q8_0", "f16")]
PROMPTS = (some_tokens(100, seed=1), some_tokens(40, seed=2))
WAYS = ("in order", "beside")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.models import write_model

    folder = tmp_path_factory.mktemp("models")
    kinds = (*KINDS, "gemma3", "qwen35")
    return {
        kind: write_model(folder / f"{kind}.gguf", kind, n_layer=4, window=64, seed=3)
        for kind in kinds
    }


@pytest.fixture
def files() -> Iterator[Files]:
    held = Files()
    yield held
    for descriptor in held.held:
        os.close(descriptor)


@pytest.fixture
def house(workers, load_message, written, files) -> House:
    return House(workers, load_message, written["llama"], files)


def copy(house: House, peer: Peer, limit: int = PLENTY) -> tuple[Paths, ...]:
    peer.send(CopyAhead(limit))
    copied = peer.until(CopiedAhead)
    assert isinstance(copied, CopiedAhead)
    return tuple(
        tuple(house.files.hold(peer, piece.fd) for piece in pieces) for pieces in copied.sequences
    )


def go_on(peer: Peer, n_steps: int) -> None:
    """Let the requests that run have some more tokens."""
    end = len(peer.steps) + n_steps
    while len(peer.steps) < end:
        peer.receive()


def next_worker(house: House, way: str, kv_type: str = "f16") -> Peer:
    """As far as it is before anything is copied for it."""
    if way == "beside":
        return house.start(kv_type, n_ctx=1024)[0]
    peer = house.workers.start()
    peer.until(Awake)
    return peer


def take_over(
    house: House, way: str, kv_type: str, copied: tuple[Paths, ...], old: Peer, new: Peer
) -> tuple[Paused, CarryReport]:
    """Have the new worker begin with what was copied, pause the old one, and go on to the end."""
    if way == "in order":
        new.send(Transcode(copied, kv_type, kv_type, ahead=True))
        new.until(Transcoded)
    else:
        new.send(TakeAhead(copied, kv_type, kv_type))
        new.until(TakenAhead)
    paused, paths = house.pause(old)
    if way == "in order":
        new.send(Transcode(paths, kv_type, kv_type))
        new.until(Transcoded)
        types = {"type_k": kv_type, "type_v": kv_type}
        load = {"model_path": str(house.path), "n_ctx": 1024, "carried": paths}
        loaded = new.load(house.load_message(**types, **load))
        assert isinstance(loaded, Loaded)
        report = loaded.carried
    else:
        new.send(TakeIn(paths, kv_type, kv_type))
        taken = new.until(TakenIn)
        assert isinstance(taken, TakenIn)
        report = taken.carried
    assert report is not None
    return paused, report


def resume(peer: Peer, befores: list[tuple[int, ...]], **fields: object) -> list[Answer]:
    return peer.finish(
        *(
            ask(peer, prompt, n_answer=len(before) + MORE, resume=before, **fields)
            for prompt, before in zip(PROMPTS, befores, strict=True)
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("way", WAYS)
def test_only_the_last_tokens_are_left_to_the_pause(
    house: House, written: dict[str, Path], kind: str, pair: tuple[str, str], way: str
) -> None:
    house.path = written[kind]
    source, target = pair
    old, _ = house.start(source)
    new = next_worker(house, way, target)
    begin(old, list(PROMPTS))
    copied = copy(house, old)
    assert len(copied) == 2
    go_on(old, 8)
    paused, report = take_over(house, way, target, copied, old, new)
    befores = [tuple(old.answers[request].tokens) for request in (1, 2)]
    for state in paused.states:
        assert len(state.ahead) == 1
        assert 8 <= state.n_tokens - state.n_tokens_ahead < 140
    assert (report.n_sequences, report.refused) == (2, ())
    assert report.n_tokens == sum(state.n_tokens for state in paused.states)
    assert report.n_tokens_ahead == sum(state.n_tokens_ahead for state in paused.states)

    answers = resume(new, befores)
    # Nothing but the pending token was decoded before the first new one.
    assert sum(step.n_prefilled for step in new.steps) == 2
    natives = resume(new, befores, cache_salt="alone")
    for answer, native in zip(answers, natives, strict=True):
        assert native.end is not None
        assert native.end.n_cached_tokens == 0
        assert_alike(answer, native, max(TOLERANCES[source], TOLERANCES[target]))


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_that_of_a_worker_that_never_stopped(house: House, way: str) -> None:
    def answers_of(peer: Peer) -> list[tuple[int, ...]]:
        return [tuple(peer.answers[request].tokens) for request in (1, 2)]

    alone, _ = house.start("f16")
    begin(alone, list(PROMPTS))
    alone.finish(1, 2)
    old, _ = house.start("f16")
    new = next_worker(house, way)
    begin(old, list(PROMPTS))
    copied = copy(house, old)
    go_on(old, 5)
    take_over(house, way, "f16", copied, old, new)
    befores = answers_of(old)
    rest = resume(new, befores)
    for before, answer, whole in zip(befores, rest, answers_of(alone), strict=True):
        assert len(answer.tokens) == MORE
        mine = (*before, *answer.tokens)[: len(whole)]
        assert mine == whole[: len(mine)]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_copied_and_is_gone_is_of_no_use(house: House, way: str) -> None:
    """One request ends and another one takes some of its cells, the other goes on."""
    old, _ = house.start("f16")
    new = next_worker(house, way)
    first = ask(old, some_tokens(250, seed=3), n_answer=150)
    second = ask(old, PROMPTS[1], n_answer=150)
    go_on(old, 8)
    copied = copy(house, old)
    old.cancel(first)
    third = ask(old, some_tokens(120, seed=5), n_answer=40)
    while len(old.answers[third].tokens) < 6:
        old.receive()
    paused, report = take_over(house, way, "f16", copied, old, new)
    assert {bool(state.ahead) for state in paused.states} == {True, False}
    assert report.refused == ()
    for request, prompt in ((second, PROMPTS[1]), (third, some_tokens(120, seed=5))):
        before = tuple(old.answers[request].tokens)
        n_answer = len(before) + MORE
        mine = new.finish(ask(new, prompt, n_answer, resume=before))[0]
        native = new.finish(ask(new, prompt, n_answer, resume=before, cache_salt="alone"))[0]
        assert_alike(mine, native, 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_conversation_comes_along_whole(house: House, way: str) -> None:
    old, _ = house.start("f16")
    new = next_worker(house, way, "q8_0")
    answer = old.finish(ask(old, PROMPTS[0], cache_salt="mine"))[0]
    copied = copy(house, old)
    paused, report = take_over(house, way, "q8_0", copied, old, new)
    (state,) = paused.states
    assert (state.n_tokens, state.n_tokens_ahead) == (129, 128)
    assert report.refused == ()
    longer = [*PROMPTS[0], *answer.tokens, 7]
    other = new.finish(ask(new, longer, cache_salt="yours"))[0]
    assert other.end is not None
    assert other.end.n_cached_tokens == 0
    mine = new.finish(ask(new, longer, cache_salt="mine"))[0]
    assert mine.end is not None
    assert mine.end.n_cached_tokens == 129


@pytest.mark.parametrize("kind", ["gemma3", "qwen35"])
def test_memories_that_forget_are_not_copied_ahead(
    house: House, written: dict[str, Path], kind: str
) -> None:
    house.path = written[kind]
    old, _ = house.start("f16")
    begin(old, list(PROMPTS))
    assert copy(house, old) == ()
    paused, _ = house.pause(old)
    assert [state.ahead for state in paused.states] == [(), ()]


def test_copies_count_against_the_memory_for_carrying(house: House) -> None:
    def kept() -> Peer:
        peer, _ = house.start("f16")
        for prompt in PROMPTS:
            peer.finish(ask(peer, prompt))
        return peer

    old = kept()
    assert copy(house, old, limit=1) == ()
    paused, _ = house.pause(old)
    sizes = [state.n_bytes for state in paused.states]
    assert [state.n_tokens for state in paused.states] == [69, 129]

    again = kept()
    limit = sizes[0] + sizes[1] // 2
    assert len(copy(house, again, limit)) == 1
    paused, _ = house.pause(again, limit)
    assert [state.n_tokens_ahead for state in paused.states] == [68]
    assert len(paused.refused) == 1


def test_a_pause_in_the_middle_of_it_gives_up_what_nobody_knows_of(house: House) -> None:
    old, _ = house.start("f16")
    begin(old, list(PROMPTS))
    old.send(CopyAhead(PLENTY))
    old.send(Pause(PLENTY))
    told: set[int] = set()
    while not isinstance(message := old.receive(), Paused):
        assert message is not None
        if isinstance(message, CopiedAhead):
            told = {piece.fd for pieces in message.sequences for piece in pieces}
    assert len(message.states) == 2
    assert {fd for state in message.states for fd in state.ahead} == told


def test_a_worker_that_has_nothing_to_do_copies_too(house: House) -> None:
    old, _ = house.start("f16")
    assert copy(house, old) == ()
    old.finish(ask(old, PROMPTS[0]))
    again, _ = house.start("f16")
    again.finish(ask(again, PROMPTS[0]))
    assert len(copy(house, again)) == 1


def test_the_next_worker_answers_others_where_nothing_follows(house: House) -> None:
    """The old worker died after its copies: what was taken ahead makes room again."""
    old, _ = house.start("f16")
    new, _ = house.start("f16", n_ctx=256)
    begin(old, list(PROMPTS))
    copied = copy(house, old)
    new.send(TakeAhead(copied, "f16", "f16"))
    new.until(TakenAhead)
    new.send(TakeIn((), "f16", "f16"))
    assert new.until(TakenIn) == TakenIn()
    answer = new.finish(ask(new, some_tokens(200, seed=8), n_answer=40))[0]
    assert answer.end is not None
    assert answer.end.n_generated_tokens == 40
