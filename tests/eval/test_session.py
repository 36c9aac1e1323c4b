"""Evaluations with a scripted process: what is stored, what is gone on with, what is refused."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.errors import UsageError, WorkerFailed
from kvserve.eval.session import Job, run
from kvserve.ipc.evaluating import EvalRequest, Pacing
from kvserve.ipc.messages import Load
from kvserve.supervisor.profiles import ProfileKey, Profiles

LOAD = Load("m.gguf", "f16", "f16", 0, 1, 512, 512, 0, 0, True, 1, 1)
JOB = Job(
    request=EvalRequest(LOAD, ("f16:f16", "q4_0:q4_0"), pacing=Pacing((0,), 8, 8)),
    environment={},
    key=ProfileKey("identity", "build", "cpu"),
    model_id="tiny",
    settings={"seed": "0"},
)
CHILD = """
import json, os, signal, sys
request = json.load(sys.stdin)
script = json.loads(sys.argv[1])
def say(**answer): print(json.dumps(answer), flush=True)
units = [p for p in request["pairs"] if "speed/" + p not in request["done"]]
say(type="opened", n_vocab=8, n_ctx_train=64, costs={"speed/" + p: 10 for p in units})
for n, pair in enumerate(units):
    if script.get("trap") and request["load"].get("extra_buffers", True):
        os.kill(os.getpid(), signal.SIGILL)
    say(type="timed", unit="speed/" + pair, pair=pair, depth=0, prefill_tps=9.0,
        decode_tps=float(script["tps"]))
    if n == script.get("die_at"):
        sys.exit("out of luck")
    say(type="finished", unit="speed/" + pair)
"""


def argv(**script: object) -> tuple[str, ...]:
    return sys.executable, "-c", CHILD, json.dumps({"tps": 1.0, **script})


def speeds(quality: object) -> dict[str, float]:
    return {str(s.pair): s.decode_tps for s in quality.speeds}  # type: ignore[attr-defined]


def test_what_is_measured_is_stored(tmp_path: Path) -> None:
    out = io.StringIO()
    outcome = run(JOB, Profiles(tmp_path), out, argv(), clock=lambda: 5.0)
    assert speeds(outcome.quality) == {"f16:f16": 1.0, "q4_0:q4_0": 1.0}
    assert outcome.path is not None
    known = Profiles(tmp_path).read("tiny", JOB.key)
    assert known.profile is not None
    assert known.profile.measured_at == 5.0
    assert known.quality == outcome.quality
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert "100%  0:00 left" in out.getvalue()


def test_a_run_that_died_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="out of luck"):
        run(JOB, Profiles(tmp_path), io.StringIO(), argv(die_at=1))
    outcome = run(JOB, Profiles(tmp_path), io.StringIO(), argv(tps=2.0))
    assert outcome.n_resumed == 1
    assert speeds(outcome.quality) == {"f16:f16": 1.0, "q4_0:q4_0": 2.0}


def test_a_run_that_died_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="out of luck"):
        run(JOB, Profiles(tmp_path), io.StringIO(), argv(die_at=0))
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_go_on_from_there(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed):
        run(JOB, Profiles(tmp_path), io.StringIO(), argv(die_at=1))
    request = EvalRequest(LOAD, JOB.request.pairs, pacing=Pacing((0,), 8, 16))
    outcome = run(replace(JOB, request=request), Profiles(tmp_path), io.StringIO(), argv(tps=2.0))
    assert outcome.n_resumed == 0


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    outcome = run(JOB, Profiles(tmp_path), Interrupting(), argv())
    assert outcome.path is None
    assert speeds(outcome.quality) == {"f16:f16": 1.0}
    assert run(JOB, Profiles(tmp_path), io.StringIO(), argv()).n_resumed == 1


def test_two_of_the_same_do_not_run_at_once(tmp_path: Path) -> None:
    class Nested(io.StringIO):
        refusal = ""

        def write(self, text: str) -> int:
            with pytest.raises(UsageError) as caught:
                run(JOB, Profiles(tmp_path), io.StringIO(), argv())
            self.refusal = caught.value.message
            return len(text)

    out = Nested()
    assert run(JOB, Profiles(tmp_path), out, argv()).n_resumed == 0
    assert out.refusal.startswith("the same evaluation runs already")
    assert run(JOB, Profiles(tmp_path), io.StringIO(), argv()).path is not None


def test_a_trap_is_tried_without_repacked_weights(tmp_path: Path) -> None:
    assert run(JOB, Profiles(tmp_path), io.StringIO(), argv(trap=True)).path is not None


def test_later_rows_join_earlier_ones(tmp_path: Path) -> None:
    run(JOB, Profiles(tmp_path), io.StringIO(), argv())
    one = replace(JOB, request=replace_pairs(JOB.request, ("q4_0:q4_0", "q8_0:q8_0")))
    run(one, Profiles(tmp_path), io.StringIO(), argv(tps=3.0))
    known = Profiles(tmp_path).read("tiny", JOB.key)
    assert speeds(known.quality) == {"f16:f16": 1.0, "q4_0:q4_0": 3.0, "q8_0:q8_0": 3.0}
    assert known.quality.decode_tps(parse_pair("q8_0"), 4096) == 3.0


def replace_pairs(request: EvalRequest, pairs: tuple[str, ...]) -> EvalRequest:
    return EvalRequest(request.load, pairs, pacing=request.pacing)
