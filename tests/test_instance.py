"""The files that daemons leave in the state directory."""

import os

import pytest

from kvserve.cli.control import chosen, show_logs
from kvserve.device.host import process_started_at
from kvserve.errors import UsageError
from kvserve.instance import Instance, InstancePaths, keep_few_passing, write_instance


def test_of_daemons_on_any_free_port_the_latest_logs_stay(tmp_path):
    for age, port in enumerate(range(40001, 40007)):
        paths = InstancePaths(tmp_path, port)
        for path in (paths.log, paths.worker_log, tmp_path / f"{port}.log.1"):
            path.touch()
        keep_few_passing(paths, passing=True)
        os.utime(paths.passing, (1000 + age, 1000 + age))
    kept = {int(path.name[:5]) for path in tmp_path.iterdir()}
    assert kept == {40003, 40004, 40005, 40006}  # three that ended, and the last


def test_records_of_killed_daemons_on_any_free_port_go(tmp_path):
    for port in range(40001, 40004):
        paths = InstancePaths(tmp_path, port)
        url = f"http://127.0.0.1:{port}"
        write_instance(paths, Instance(2**22 + 1, 0.0, url, port, "model", "token"))
        keep_few_passing(paths, passing=True)
    assert [path.name for path in tmp_path.glob("*.json")] == ["40003.json"]


def test_logs_of_a_chosen_port_are_kept(tmp_path):
    chosen = InstancePaths(tmp_path, 40001)
    keep_few_passing(chosen, passing=True)
    chosen.log.touch()
    keep_few_passing(chosen, passing=False)
    for port in range(40010, 40020):
        keep_few_passing(InstancePaths(tmp_path, port), passing=True)
    assert chosen.log.exists()
    assert not chosen.passing.exists()


def test_without_a_daemon_the_logs_of_ended_ones_are_named(tmp_path):
    def refusal() -> str:
        with pytest.raises(UsageError) as caught:
            show_logs(None, str(tmp_path), worker=False, follow=False)
        return caught.value.message

    assert refusal() == "no kvserve runs here; start it with `kvserve start`"
    for age, port in enumerate((8000, 8080)):
        log = InstancePaths(tmp_path, port).log
        log.touch()
        os.utime(log, (1000 + age, 1000 + age))
    assert refusal().endswith("logs of some that ended are there: add --port 8080 or 8000")


def running(state_dir, *ports: int) -> None:
    for port in ports:
        started_at = process_started_at(os.getpid())
        url = f"http://127.0.0.1:{port}"
        instance = Instance(os.getpid(), started_at, url, port, "model", "token")
        write_instance(InstancePaths(state_dir, port), instance)


def test_a_command_means_the_daemon_that_start_would_have_started(tmp_path):
    running(tmp_path, 8000, 8080)
    config = tmp_path / "config.toml"
    config.write_text("port = 8080")
    for environ in ({"KVSERVE_PORT": "8080"}, {"KVSERVE_CONFIG": str(config)}):
        assert chosen(None, str(tmp_path), environ).port == 8080
        assert chosen("8000", str(tmp_path), environ).port == 8000
    with pytest.raises(UsageError, match="no kvserve runs on port 9000; kvserve runs on 8000"):
        chosen(None, str(tmp_path), {"KVSERVE_PORT": "9000"})


def test_without_a_port_in_the_settings_it_is_the_only_daemon(tmp_path):
    running(tmp_path, 8080)
    assert chosen(None, str(tmp_path), {}).port == 8080
    assert chosen(None, str(tmp_path), {"KVSERVE_PORT": "0"}).port == 8080
    running(tmp_path, 8081)
    with pytest.raises(UsageError, match="several kvserve run, on 8080, 8081: add --port"):
        chosen(None, str(tmp_path), {})
