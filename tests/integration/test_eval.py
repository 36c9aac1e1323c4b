"""`kvserve eval` and `bench --kv` as commands on a small real model, and what `plan` shows then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.daemons import Daemon
from tests.models import write_model

QUICK = ("--quick", "--ctx", "256", "--chunks", "1", "--seed", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_model(path, n_layer=2, n_embd=256, n_head=4, n_head_kv=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def argv(model: Path, home: Path, command: str, *arguments: str) -> list[str]:
    name = ["--model", str(model)]
    state = [] if command == "bench" else ["--state-dir", str(home / "state"), "--device", "cpu"]
    return [sys.executable, "-m", "kvserve", command, *name, *state, *arguments]


def kvserve(model: Path, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"XDG_DATA_HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    return subprocess.run(
        argv(model, home, *arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def plan(model: Path, home: Path, *arguments: str) -> str:
    done = kvserve(model, home, "plan", "--ctx", "256", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_evaluation_is_kept_shown_and_used(model: Path, home: Path) -> None:
    assert "prior" in plan(model, home)
    page = home / "report.html"
    flags = (*QUICK, "--tasks", "facts,classify", "--html", str(page))
    done = kvserve(model, home, "eval", *flags, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(row["pair"], row["mode"]): row for row in found["losses"]}
    pairs = ("f16:f16", "q8_0:q8_0", "q8_0:q4_0", "q4_0:q4_0")
    assert set(rows) == {(p, mode) for p in pairs for mode in ("prefill", "decode", "carried")}
    klds = [rows[pair, "prefill"]["mean_kld"] for pair in pairs]
    assert klds == sorted(klds)
    # Random weights know no facts: the tasks say so, whatever the pair.
    assert {row["measurable"] for row in found["tasks"]} == {False}
    assert "not measurable on this model" in page.read_text()

    text = plan(model, home)
    assert (
        f"{max(rows['q4_0:q4_0', m]['mean_kld'] for m in ('prefill', 'decode')):.4f} measured"
        in text
    )
    assert "quality  measured on" in text
    barred = plan(model, home, "--max-kld", "0")
    assert "is over --max-kld 0" in barred

    again = kvserve(model, home, "eval", *flags, "--json")
    assert json.loads(again.stdout) == found


def test_speeds_join_the_same_profile(model: Path, home: Path) -> None:
    flags = ("--kv", "--cpu", "--pairs", "q4_0", "--depths", "0,64,128", "--json")
    done = kvserve(model, home, "bench", *flags)
    assert done.returncode == 0, done.stderr
    speeds = json.loads(done.stdout)["speeds"]
    assert [(s["pair"], s["depth"]) for s in speeds] == [
        (pair, depth) for pair in ("f16:f16", "q4_0:q4_0") for depth in (0, 64, 128)
    ]
    [profile] = (home / "kvserve" / "profiles").glob("*.json")
    # What bandwidth alone would give is told and kept beside what was measured.
    assert {s["predicted_ratio"] for s in speeds if s["pair"] == "f16:f16"} == {1.0}
    assert all(s["predicted_ratio"] > 1 for s in speeds if s["pair"] != "f16:f16" and s["depth"])
    kept = json.loads(profile.read_text())["quality"]
    assert kept["speeds"][-1]["predicted_ratio"] == speeds[-1]["predicted_ratio"]
    assert len(kept["speeds"]) == 6
    assert kept["losses"]


def test_another_file_of_that_name_is_refused_with_the_reason(home: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "tiny.gguf", n_layer=3, n_embd=256, n_head=4, n_head_kv=2)
    text = plan(other, home)
    assert "a profile was refused" in text
    assert "measured on another model file of that name" in text
    assert "measured;" not in text


def test_ctrl_c_keeps_what_is_done(model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    flags = ("--quick", "--ctx", "256", "--chunks", "400", "--pairs", "q8_0,q5_1,q4_0")
    process = subprocess.Popen(
        argv(model, tmp_path, "eval", *flags),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    folder = tmp_path / "kvserve" / "profiles"
    while not any(b'"finished"' in p.read_bytes() for p in folder.glob("*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "f16:f16 (control)" in out
    assert "the same command goes on from here" in err
    assert not list(folder.glob("*.json"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ctx", "99M"), "--ctx 103809024: the model was trained for"),
        (("--corpus", "/nowhere"), "--corpus /nowhere: No such file"),
        (("--form", "poem"), "--form poem: one of auto"),
        (("--tasks", "poetry"), "--tasks poetry: no such task"),
        (("--ctx", "none", "--tasks", "none"), "nothing to measure"),
        (("--seed", "-1"), "--seed -1: write 0 or more"),
        (("--html", "/nowhere/page.html"), "--html /nowhere/page.html: No such file"),
    ],
)
def test_wrong_flags_are_one_line(
    model: Path, home: Path, flags: tuple[str, ...], message: str
) -> None:
    done = kvserve(model, home, "eval", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_text_that_is_too_short_is_a_wrong_flag_too(
    model: Path, home: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A few words.")
    done = kvserve(model, home, "eval", *QUICK, "--corpus", str(text))
    assert done.returncode == 2
    assert done.stderr.startswith("kvserve: the text has ")
    assert "give a longer --corpus or a smaller --ctx" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_without_room_nothing_is_loaded_and_the_options_are_named(
    model: Path, home: Path, command: str
) -> None:
    flags = ("--quick",) if command == "eval" else ("--kv", "--cpu")
    environment = os.environ | {"XDG_DATA_HOME": str(home), "KVSERVE_RESERVE": "9999GiB"}
    done = subprocess.run(
        argv(model, home, command, *flags),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert "no context fits; or make room (`kvserve stop`)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_daemon_goes_by_what_is_measured_beside_it(model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(model), "--device", "cpu", "--ctx", "256", "--threads", "1")

    def losses(daemon: Daemon) -> dict[str, dict[str, object]]:
        found = daemon.get("/admin/plan?ctx=256").json()["candidates"]
        return {f"{c['cache_type_k']}:{c['cache_type_v']}": c["loss"] for c in found}

    with Daemon(tmp_path / "state", *flags, XDG_DATA_HOME=str(tmp_path)) as daemon:
        before = losses(daemon)
        assert not any(loss and loss["measured"] for loss in before.values())
        done = kvserve(model, tmp_path, "eval", *QUICK, "--pairs", "q4_0", "--json")
        assert done.returncode == 0, done.stderr
        after = losses(daemon)
        assert {pair for pair, loss in after.items() if loss and loss["measured"]} == {
            "f16:f16",
            "q4_0:q4_0",
        }
        assert daemon.status()["worker_deaths"] == 0
