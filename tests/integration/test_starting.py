"""Starts that fail, and what they say."""

import socket
from pathlib import Path

import pytest

from tests.integration.daemons import Daemon, run_cli


def test_a_first_load_that_fails_is_told_once(state_dir: Path) -> None:
    words = "the file has no tensors"
    daemon = Daemon(
        state_dir, "--model", "demo", "--ctx", "512",
        module="tests.integration.fake_daemon", FAKE_SCRIPT=f'{{"fail_load": "{words}"}}',
    )  # fmt: skip
    assert daemon.process.wait(60) == 4
    daemon.__exit__(None, None, None)
    told = [line for line in daemon.output if words in line]
    assert told == [f"kvserve: the model could not be loaded: {words}"]
    [log] = [path for path in state_dir.glob("*.log") if path.stem.isdecimal()]
    assert log.read_text().count(words) == 1


@pytest.mark.parametrize("host", ["198.51.100.7", "nowhere.invalid"])
def test_an_address_that_cannot_be_had_is_not_called_open(state_dir: Path, host: str) -> None:
    done = run_cli("start", "--model", "demo", "--host", host, "--port", "0", state_dir=state_dir)
    assert done.returncode == 2
    assert f"--host {host} cannot be listened on" in done.stderr
    assert "other machines" not in done.stderr


def test_a_port_in_use_is_told_before_anything_is_planned(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_cli("start", "--model", "demo", "--port", str(port), state_dir=state_dir)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is in use: use --port" in done.stderr
    assert not (state_dir / "build.json").exists()  # which the first plan leaves
