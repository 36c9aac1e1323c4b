"""Waits are brief as long as they shall be, and no thread is left behind."""

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvserve.worker import openmp
from kvserve.worker.openmp import BriefWaits

TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True)
def _library() -> None:
    ctypes.CDLL("libgomp.so.1")


@pytest.fixture
def waits() -> Iterator[BriefWaits]:
    one = BriefWaits()
    yield one
    one.end()


def n_threads() -> int:
    return len(list(TASKS.iterdir()))


def settled(expected: int) -> int:
    """How many threads there are, as soon as it is so many, or after five seconds."""
    for _ in range(500):
        if n_threads() == expected:
            break
        time.sleep(0.01)
    return n_threads()


def test_more_threads_than_processors_until_the_end(waits: BriefWaits) -> None:
    before = n_threads()
    for _ in range(2):
        waits.begin()
        waits.begin()
        crowd = len(os.sched_getaffinity(0)) + 1
        assert settled(before + crowd) == before + crowd
        waits.end()
        waits.end()
        assert settled(before) == before


def test_without_gnus_library_nothing_is_done(
    waits: BriefWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = n_threads()
    for name in ("no such library", "libc.so"):  # none, and one that is another's
        monkeypatch.setattr(openmp, "_LIBRARY", name)
        waits.begin()
        assert n_threads() == before
