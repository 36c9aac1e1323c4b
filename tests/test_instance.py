"""The files that daemons leave in the state directory."""

import os

import pytest

from kvserve.cli.control import show_logs
from kvserve.errors import UsageError
from kvserve.instance import InstancePaths, keep_few_passing


def test_of_daemons_on_any_free_port_the_latest_logs_stay(tmp_path):
    for age, port in enumerate(range(40001, 40007)):
        paths = InstancePaths(tmp_path, port)
        for path in (paths.log, paths.worker_log, tmp_path / f"{port}.log.1"):
            path.touch()
        keep_few_passing(paths, passing=True)
        os.utime(paths.passing, (1000 + age, 1000 + age))
    kept = {int(path.name[:5]) for path in tmp_path.iterdir()}
    assert kept == {40003, 40004, 40005, 40006}  # three that ended, and the last


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
