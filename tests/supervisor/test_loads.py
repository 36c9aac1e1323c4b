"""What a worker's process is given of its environment."""

import pytest

from kvserve.core.machine import Backend
from kvserve.supervisor.loads import worker_environment


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_threads_of_a_worker_on_a_cpu_do_not_wait_busily_for_long() -> None:
    assert worker_environment(Backend.CPU)["GOMP_SPINCOUNT"] == "60000"
    assert "GOMP_SPINCOUNT" not in worker_environment(Backend.CUDA)


@pytest.mark.parametrize(
    ("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")]
)
def test_how_the_daemon_is_told_to_wait_holds(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    environment = worker_environment(Backend.CPU)
    assert environment[name] == value
    assert environment.get("GOMP_SPINCOUNT") in {None, "7"}


def test_a_worker_on_a_cpu_sees_no_gpu() -> None:
    assert worker_environment(Backend.CPU)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(Backend.CUDA)
