"""Daemons that are killed, crossed and misused."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.daemons import Daemon, process_runs, run_cli, wait_for_end


def test_a_killed_daemon_takes_its_worker_with_it(state_dir: Path) -> None:
    with Daemon(state_dir, "--model", "demo", "--ctx", "512") as daemon:
        worker = daemon.status()["worker_pid"]
        assert process_runs(worker)
        daemon.process.kill()
        daemon.process.wait()
        assert wait_for_end(worker)
        told = run_cli("status", "--port", daemon.port, state_dir=state_dir)
        assert told.returncode == 2
        assert f"no kvserve runs on port {daemon.port}" in told.stderr


def test_a_killed_worker_is_replaced_and_its_stream_goes_on(state_dir: Path) -> None:
    with (
        Daemon(state_dir, "--model", "demo", "--ctx", "2048") as daemon,
        openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client,
    ):
        ask = {"model": "default", "prompt": "One, two, three,", "max_tokens": 120}
        whole = client.completions.create(**ask, temperature=0).choices[0].text
        worker = daemon.status()["worker_pid"]
        text = ""
        with client.completions.create(**ask, temperature=0, stream=True) as stream:
            for n, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if n == 10:
                    os.kill(worker, signal.SIGKILL)
        assert text == whole
        status = daemon.status()
        assert status["worker_pid"] != worker
        assert status["worker_deaths"] == 1


def test_a_detached_daemon_serves_until_it_is_stopped(state_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = run_cli(
        "start", "--model", "demo", "--ctx", "512", "--port", port, "--detach",
        state_dir=state_dir, timeout=120,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert "serving" in started.stdout
    try:
        ready = httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False)
        assert ready.status_code == 200
        second = run_cli(
            "start", "--model", "demo", "--ctx", "512", "--port", port, state_dir=state_dir
        )
        assert second.returncode == 2
        assert f"port {port} on 127.0.0.1 is in use: use --port" in second.stderr
    finally:
        stopped = run_cli("stop", "--port", port, state_dir=state_dir)
    assert "stopped" in stopped.stdout
    assert run_cli("status", "--port", port, state_dir=state_dir).returncode == 2


BAD = [
    (["--model", "/nowhere/m.gguf"], 2, "/nowhere/m.gguf"),
    (["--model", "/tmp"], 2, "is a directory"),
    (["--model", "demo", "--ctx", "0"], 2, "--ctx: 0"),
    (["--model", "demo", "--ctx", "-1"], 2, "--ctx: '-1'"),
    (["--model", "demo", "--ctx", "many"], 2, "--ctx: 'many'"),
    (["--model", "demo", "--ctx", "32769"], 2, "--ctx 32768 or less"),
    (["--model", "demo", "--cache-type", "q9_0"], 2, "q8_0"),
    (["--model", "demo", "--task", "poetry"], 2, "math"),
    (["--model", "demo", "--device", "cuda"], 2, "--device"),
    (["--model", "demo", "--port", "70000"], 2, "--port"),
    (["--model", "demo", "--host", "256.1.1.1", "--insecure"], 2, "--host"),
    (["--model", "demo", "--host", "0.0.0.0"], 2, "--api-key"),
    (["--model", "demo", "--config", "/nowhere.toml"], 2, "/nowhere.toml"),
    (["--model", "demo", "--reserve", "900GiB"], 3, "does not fit"),
    ([], 2, "--model demo"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    arguments: list[str], code: int, words: str, state_dir: Path
) -> None:
    done = run_cli("start", *arguments, state_dir=state_dir)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not list(state_dir.glob("[0-9]*.json")) if state_dir.exists() else True


def test_a_file_that_llama_cpp_refuses_ends_with_status_4(tmp_path: Path) -> None:
    # A right header over tensors that the architecture does not have.
    from tests.models import write_model

    path = tmp_path / "broken.gguf"
    write_model(path, arch="llama")
    data = path.read_bytes()
    assert data.count(b"blk.0.attn_q.weight") == 1
    path.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    done = run_cli("start", "--model", str(path), "--ctx", "256", "--port", "0",
                   state_dir=tmp_path / "state", timeout=90)  # fmt: skip
    assert done.returncode == 4, done.stderr + done.stdout
    assert "the model could not be loaded" in done.stderr
    assert "attn_q" in done.stderr


def test_ctrl_c_ends_the_foreground_daemon(state_dir: Path) -> None:
    with Daemon(state_dir, "--model", "demo", "--ctx", "512") as daemon:
        worker = daemon.status()["worker_pid"]
        os.killpg(daemon.process.pid, signal.SIGINT)
        assert daemon.process.wait(10) == 0
        assert wait_for_end(worker)


def test_the_daemon_never_loads_llama_cpp(state_dir: Path) -> None:
    with Daemon(state_dir, "--model", "demo", "--ctx", "512") as daemon:
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert "libllama" not in maps
        assert "libllama" in Path(f"/proc/{daemon.status()['worker_pid']}/maps").read_text()


def test_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvserve", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kvserve ")
