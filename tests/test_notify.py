"""The datagrams that a service manager gets."""

import os
import re
import socket
from dataclasses import replace

import pytest

from kvserve.core.lifecycle import Phase
from kvserve.heartbeat import Heartbeat
from kvserve.notify import Notifier
from tests.api.scripted import SERVING, ScriptedService


class Manager:
    """The manager's end of the socket."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{path[1:]}" if path.startswith("@") else path)
        self._socket.setblocking(False)

    def heard(self):
        """Everything since the last time, one list of lines for each datagram."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return found

    def close(self):
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def address(request, tmp_path):
    return f"@kvserve-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")


@pytest.fixture
def manager(address):
    manager = Manager(address)
    yield manager
    manager.close()


def test_the_states(address, manager):
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "OTHER": "1"}
    notifier = Notifier.from_environment(environ)
    assert "NOTIFY_SOCKET" not in environ
    assert notifier.connected
    assert notifier.watchdog_seconds == 3.0
    notifier.ready("two\nlines")
    notifier.reloading("on the way")
    notifier.alive()
    notifier.stopping()
    ready, reloading, alive, stopping = manager.heard()
    assert ready == ["READY=1", "STATUS=two lines"]
    assert reloading[0] == "RELOADING=1"
    assert re.fullmatch(r"MONOTONIC_USEC=\d+", reloading[1])
    assert alive == ["WATCHDOG=1"]
    assert stopping[0] == "STOPPING=1"
    notifier.close()
    notifier.ready("nobody hears this")
    assert manager.heard() == []


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdogs_time(environ, seconds):
    assert Notifier.from_environment(environ).watchdog_seconds == seconds


def test_a_manager_that_is_not_there_is_no_error(tmp_path):
    notifier = Notifier(str(tmp_path / "nowhere"))
    assert not notifier.connected
    notifier.ready("x")
    notifier.close()


def test_a_manager_that_goes_away_is_no_error(tmp_path):
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(str(tmp_path / "notify"))
    manager.close()
    notifier.ready("x")
    notifier.close()


def test_a_life_as_the_heart_tells_it(tmp_path):
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(str(tmp_path / "notify"), watchdog_seconds=1.0)
    service = ScriptedService()
    heart = Heartbeat(service, notifier)
    assert heart.seconds == 0.5
    told = []

    def beat(phase, ready, **facts):
        service.now, service.ready = replace(SERVING, phase=phase, **facts), ready
        heart.beat()
        alive, *rest = manager.heard()
        assert alive == ["WATCHDOG=1"]
        told.append([line for lines in rest for line in lines if "USEC" not in line])

    beat(Phase.LOADING, False, load_fraction=0.5)
    beat(Phase.SERVING, True)
    beat(Phase.SERVING, True)
    beat(Phase.DRAINING, False)
    beat(Phase.LEAVING, False)
    beat(Phase.SERVING, True)
    beat(Phase.OVERLAPPING, True)
    beat(Phase.SERVING, True)
    beat(Phase.FAILED, False, error="no memory")
    beat(Phase.STOPPING, False)
    serving = "STATUS=serving 32768 tokens of q8_0:q8_0"
    assert told == [
        ["STATUS=the model is loading (50%)"],
        ["READY=1", serving],
        [],
        ["RELOADING=1", "STATUS=running requests finish before a reload"],
        ["STATUS=the old worker leaves before a reload"],
        ["READY=1", serving],
        ["RELOADING=1", "STATUS=requests are answered while the next worker loads"],
        ["READY=1", serving],
        ["RELOADING=1", "STATUS=the worker cannot be started: no memory"],
        [],
    ]
    notifier.close()
    manager.close()


def test_a_manager_that_is_behind_is_told_again(tmp_path):
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(str(tmp_path / "notify"))
    while notifier.status("full"):
        pass
    heart = Heartbeat(ScriptedService(), notifier)
    heart.beat()
    assert {tuple(lines) for lines in manager.heard()} == {("STATUS=full",)}
    heart.beat()
    assert manager.heard()[-1][0] == "READY=1"
    notifier.close()
    manager.close()
