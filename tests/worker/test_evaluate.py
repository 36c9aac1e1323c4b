"""The evaluating process on a small real model: what it answers, and that it repeats itself."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvserve.eval.corpus import read_corpus
from kvserve.ipc.evaluating import (
    BAD_INPUT_STATUS,
    Answered,
    EvalAnswer,
    EvalRequest,
    Finished,
    Opened,
    Pacing,
    Prompted,
    Reading,
    Scored,
    Skipped,
    Timed,
)
from kvserve.ipc.messages import Load
from tests.models import write_model

PAIRS = ("f16:f16", "q8_0:q8_0", "q4_0:q4_0")
TEXT = read_corpus(None)[:4000]
READING = Reading(TEXT, (256,), n_chunks=2, n_prefill=40, n_decode=8, seed=3)
_decoder = msgspec.json.Decoder(EvalAnswer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "m.gguf"
    return write_model(path, n_layer=2, n_embd=256, n_head=4, n_head_kv=2)


def run(model: Path, **request: object) -> "subprocess.CompletedProcess[bytes]":
    load = Load(str(model), "f16", "f16", 0, 1, 64, 64, 0, 0, True, 1, 1)
    asked = EvalRequest(load, PAIRS, **request)  # type: ignore[arg-type]
    argv = [sys.executable, "-m", "kvserve.worker.evaluate"]
    return subprocess.run(
        argv, input=msgspec.json.encode(asked), capture_output=True, timeout=120, check=False
    )


def ask(model: Path, **request: object) -> list[EvalAnswer]:
    done = run(model, **request)
    assert done.returncode == 0, done.stderr
    return [_decoder.decode(line) for line in done.stdout.splitlines()]


def test_pairs_are_scored_in_each_mode_and_the_same_each_time(model: Path) -> None:
    answers = ask(model, reading=READING)
    opened = answers[0]
    assert isinstance(opened, Opened)
    finished = [answer.unit for answer in answers if isinstance(answer, Finished)]
    assert finished == list(opened.costs)
    scored = [answer for answer in answers if isinstance(answer, Scored)]
    sizes = {(s.mode, len(s.klds)) for s in scored}
    assert sizes == {("prefill", 40), ("decode", 8), ("carried", 8)}
    assert len(scored) == 2 * len(PAIRS) * 3

    def mean(pair: str) -> float:
        klds = [kld for s in scored if s.pair == pair for kld in s.klds]
        return sum(klds) / len(klds)

    assert mean("f16:f16") < mean("q8_0:q8_0") < mean("q4_0:q4_0")
    # The reference is the same whichever pair is beside it.
    firsts = {
        s.reference for s in scored if s.unit.startswith("text/256/0/") and s.mode == "decode"
    }
    assert len(firsts) == 1
    assert ask(model, reading=READING) == answers


def test_what_is_done_is_left_out(model: Path) -> None:
    answers = ask(model, reading=READING, done=("text/256/0/f16:f16", "text/256/1/q4_0:q4_0"))
    [opened, *_] = answers
    assert isinstance(opened, Opened)
    assert set(opened.costs) == {
        "text/256/0/q8_0:q8_0",
        "text/256/0/q4_0:q4_0",
        "text/256/1/f16:f16",
        "text/256/1/q8_0:q8_0",
    }
    assert [a.unit for a in answers if isinstance(a, Finished)] == list(opened.costs)


def test_a_text_that_is_too_short_is_one_line(model: Path) -> None:
    done = run(model, reading=msgspec.structs.replace(READING, text="too short"))
    assert done.returncode == BAD_INPUT_STATUS
    assert b"give a longer --corpus" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_completed_greedily_with_each_pair(model: Path, chat: bool) -> None:
    asked = (
        Prompted("t", 0, "hello world ", "", 6, chat),
        Prompted("t", 1, "the answer ", "", 6, chat),
    )
    answers = ask(model, prompts=asked)
    found = [answer for answer in answers if isinstance(answer, Answered)]
    assert [(a.pair, a.index) for a in found] == [(p, i) for p in PAIRS for i in (0, 1)]
    assert all(a.text for a in found)
    # A stop ends the text, which is otherwise the same.
    whole = found[0].text.lstrip()
    stop = whole[-2:]
    cut = ask(model, prompts=(msgspec.structs.replace(asked[0], stop=stop),))
    first = next(answer for answer in cut if isinstance(answer, Answered))
    assert first.text == whole[: whole.index(stop)]


def test_a_prompt_longer_than_the_model_is_one_line(model: Path) -> None:
    done = run(model, prompts=(Prompted("t", 0, "hello " * 40_000, "", 6),))
    assert done.returncode == BAD_INPUT_STATUS
    assert b"a task needs" in done.stderr.splitlines()[-1]


def test_speed_is_told_at_each_depth(model: Path) -> None:
    answers = ask(model, pacing=Pacing((0, 128), 32, 4))
    timed = [answer for answer in answers if isinstance(answer, Timed)]
    assert [(t.pair, t.depth) for t in timed] == [(p, d) for p in PAIRS for d in (0, 128)]
    assert all(t.prefill_tps > 0 and t.decode_tps > 0 for t in timed)


def test_closer_depths_go_back_to_where_they_were(model: Path) -> None:
    timed = [a for a in ask(model, pacing=Pacing((0, 8, 16), 32, 4)) if isinstance(a, Timed)]
    assert [t.depth for t in timed] == [0, 8, 16] * len(PAIRS)


def test_a_pair_is_timed_as_deep_as_it_fits(model: Path) -> None:
    pacing = Pacing((0, 128), 32, 4, deepest={"f16:f16": -1, "q8_0:q8_0": 0})
    answers = ask(model, pacing=pacing)
    timed = [(a.pair, a.depth) for a in answers if isinstance(a, Timed)]
    assert timed == [("q8_0:q8_0", 0), ("q4_0:q4_0", 0), ("q4_0:q4_0", 128)]
    skipped = [(a.unit, a.what) for a in answers if isinstance(a, Skipped)]
    assert skipped == [
        ("speed/f16:f16", "depth 0"),
        ("speed/f16:f16", "depth 128"),
        ("speed/q8_0:q8_0", "depth 128"),
    ]
    assert [a.unit for a in answers if isinstance(a, Finished)] == [f"speed/{p}" for p in PAIRS]
