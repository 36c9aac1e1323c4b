"""The scripted worker keeps the real one's protocol, and fails where it is told."""

import json
import signal
import time

import pytest

from kvserve.ipc.messages import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    NeedsContext,
    Pause,
    Paused,
    Progress,
    Shutdown,
    Step,
    TokenPrompt,
)

LOAD = Load("fake.gguf", "f16", "f16", 64, 4, 32, 32, 0, 0, True, 1, 1)
STEP = {"step_ms": 0}


@pytest.fixture
def fake(workers):
    def start(**script: object):
        return workers.start("kvserve.worker.fake", ("--script", json.dumps(STEP | script)))

    return start


def loaded(peer, load: Load = LOAD) -> object:
    assert isinstance(peer.load(load), Loaded)
    return peer


def test_answers_words(fake) -> None:
    peer = loaded(fake())
    chat = ChatPrompt((ChatMessage("system", "one two"), ChatMessage("user", "three")))
    answer = peer.complete(chat, max_tokens=3)
    assert (answer.text, answer.tokens) == ("w0 w1 w2 ", [0, 1, 2])
    assert (answer.n_prompt, answer.end.n_prompt_tokens) == (3, 3)
    assert (answer.end.reason, answer.end.n_generated_tokens) == ("length", 3)
    assert len(peer.complete(TokenPrompt((1, 2))).tokens) == 16


def test_goes_on_after_resumed_tokens(fake) -> None:
    peer = loaded(fake())
    answer = peer.complete("a", max_tokens=4, resume=(0, 1))
    assert (answer.text, answer.end.n_generated_tokens) == ("w2 w3 ", 4)


def test_needs_context(fake) -> None:
    peer = loaded(fake())
    assert peer.complete("a " * 64).refusal == NeedsContext(1, 64)
    assert peer.complete("a " * 60).end.n_generated_tokens == 4


def test_serves_several_in_one_step(fake) -> None:
    peer = loaded(fake(step_ms=20))
    both = [peer.ask("a", max_tokens=5), peer.ask("b", max_tokens=5)]
    peer.finish(*both)
    assert any(len(step.deltas) == 2 for step in peer.steps)


def test_cancel_and_pause(fake) -> None:
    peer = loaded(fake(step_ms=5))
    first, second = peer.ask("a", max_tokens=60), peer.ask("b", max_tokens=60)
    peer.until(Step)
    peer.cancel(first)
    peer.send(Pause())
    peer.until(Paused)
    assert not peer.answers[first].done
    assert not peer.answers[second].done
    peer.ask("c")
    peer.send(Shutdown())
    assert peer.receive() is None
    assert peer.process.wait(10) == 0


def test_ignore_pause(fake) -> None:
    peer = loaded(fake(ignore_pause=True))
    request = peer.ask("a")
    peer.send(Pause())
    assert peer.finish(request)[0].done


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({"fail_load": "bad magic"}, LoadFailed("bad magic")),
        ({"oom_load": True}, LoadFailed("out of memory", out_of_memory=True)),
    ],
)
def test_load_failures(fake, script: dict[str, object], expected: LoadFailed) -> None:
    assert fake(**script).load(LOAD) == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGILL])
def test_dies_of_the_signal_it_is_told(fake, number: signal.Signals) -> None:
    peer = fake(die_at="hello", signal=int(number))
    assert peer.receive() is None
    assert peer.process.wait(10) == -number


def test_dies_at_its_point(fake) -> None:
    peer = fake(die_at="load")
    peer.until(Hello)
    peer.send(LOAD)
    assert peer.receive() is None

    peer = loaded(fake(die_at="loaded"))
    assert peer.receive() is None

    peer = loaded(fake(die_at="step:3"))
    request = peer.ask("a")
    while peer.receive() is not None:
        pass
    assert peer.answers[request].tokens == [0, 1]


def test_dies_only_once(fake, tmp_path) -> None:
    script = {"die_at": "first_step", "die_once_file": str(tmp_path / "died")}
    peer = loaded(fake(**script))
    request = peer.ask("a")
    while peer.receive() is not None:
        pass
    assert peer.answers[request].tokens == []
    assert loaded(fake(**script)).complete("a").done


def test_traps_like_a_build_with_the_wrong_instructions(fake) -> None:
    peer = fake(die_unless_no_extra_buffers=True)
    peer.until(Hello)
    peer.send(LOAD)
    peer.until(Progress)
    while peer.receive() is not None:
        pass
    assert peer.process.wait(10) == -signal.SIGILL
    again = fake(die_unless_no_extra_buffers=True)
    fields = {name: getattr(LOAD, name) for name in LOAD.__struct_fields__}
    loaded(again, Load(**(fields | {"extra_buffers": False})))


def test_hangs_but_ends_with_its_daemon(fake) -> None:
    peer = fake(hang_at="load")
    peer.until(Hello)
    peer.send(LOAD)
    peer.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        peer.receive()
    peer.close()
    assert peer.process.wait(10) == 0


def test_garbage(fake) -> None:
    peer = loaded(fake(garbage_at="first_step"))
    peer.ask("a")
    received = b""
    while b"\xff" * 64 not in received:
        received += peer.sock.recv(4096)


def test_an_unknown_script_is_refused(fake) -> None:
    assert fake(die_att="load").process.wait(10) == 1


def test_starts_fast(fake) -> None:
    begun = time.monotonic()
    fake().until(Hello)
    assert time.monotonic() - begun < 2


def test_the_delta_is_one_token(fake) -> None:
    peer = loaded(fake())
    peer.complete("a", max_tokens=1)
    assert peer.steps[0].deltas == (Delta(1, "w0 ", (0,)),)
