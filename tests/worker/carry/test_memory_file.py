import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import KvType
from kvserve.worker.carry.layout import CacheLayout, StateLayout
from kvserve.worker.carry.memory_file import (
    HEADER_BYTES,
    Contents,
    ExportedState,
    Origin,
    write_state,
)
from kvserve.worker.carry.refusal import CannotCarry, Reason

LAYOUT = StateLayout((CacheLayout(2, KvType.Q8_0, KvType.Q4_0, 128, 128, 128, 64),))
STATE = np.arange(1001, dtype=np.uint64).astype(np.uint8)
TOKENS = np.array([5, 6, 7], dtype=np.int32)
EXPECTED = np.linspace(-3, -1, 11, dtype=np.float32)
CONTENTS = Contents(Origin("model", "build"), LAYOUT, len(STATE), 2, 3, len(EXPECTED))


def write() -> ExportedState:
    def fill(out: np.ndarray) -> np.ndarray:
        out[:] = STATE
        return EXPECTED

    return write_state(CONTENTS, TOKENS, fill)


def written_by_hand(front: bytes, size_bytes: int = HEADER_BYTES, *, sealed: bool = True) -> int:
    fd = os.memfd_create("state", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    os.pwrite(fd, front, 0)
    if sealed:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def framed(body: bytes) -> bytes:
    return b"kvserve1" + len(body).to_bytes(4, "little") + body


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refused(fd: int) -> None:
    try:
        with pytest.raises(CannotCarry) as refusal:
            ExportedState.open(fd)
        assert refusal.value.reason is Reason.MALFORMED
    finally:
        os.close(fd)


def test_what_is_written_is_read_by_another_process() -> None:
    """Opened through /proc, read-only, as the daemon does."""
    reader = (
        "import os, sys\n"
        "from kvserve.worker.carry.memory_file import ExportedState\n"
        "with ExportedState.open(os.open(sys.argv[1], os.O_RDONLY)) as state:\n"
        "    print(state.view().tobytes().hex(), state.tokens.tolist(), state.expected.sum())\n"
    )
    with write() as state:
        path = f"/proc/{os.getpid()}/fd/{state.fd}"
        done = subprocess.run(
            [sys.executable, "-c", reader, path], capture_output=True, text=True, check=True
        )
        found = ExportedState.open(os.open(path, os.O_RDONLY))
        with found:
            assert found.contents == CONTENTS
    assert done.stdout.split(maxsplit=1) == [
        STATE.tobytes().hex(),
        f"[5, 6, 7] {EXPECTED.sum()}\n",
    ]


def test_without_a_distribution() -> None:
    contents = Contents(Origin("model", "build"), LAYOUT, 4, 3, 3)
    with write_state(contents, TOKENS, lambda _out: None) as state:
        assert state.expected is None
        assert state.tokens.tolist() == [5, 6, 7]


def test_nobody_can_change_it() -> None:
    with write() as state:
        with pytest.raises(PermissionError):
            os.pwrite(state.fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(state.fd, 0)
        with pytest.raises(PermissionError):
            mmap.mmap(state.fd, state.n_bytes)


def test_a_writer_that_fails_leaves_nothing_open() -> None:
    def fail(_out: np.ndarray) -> None:
        raise CannotCarry(Reason.EXPORT, "no")

    before = open_files()
    with pytest.raises(CannotCarry):
        write_state(CONTENTS, TOKENS, fail)
    assert open_files() == before


def test_a_file_that_is_not_finished_is_refused() -> None:
    body = msgspec.msgpack.encode(CONTENTS)
    refused(written_by_hand(framed(body), CONTENTS.file_bytes, sealed=False))
    refused(written_by_hand(b"", CONTENTS.file_bytes))
    refused(written_by_hand(framed(body), CONTENTS.file_bytes - 1))
    refused(written_by_hand(framed(body)[:100], 100))
    ours = written_by_hand(framed(body), CONTENTS.file_bytes)
    ExportedState.open(ours).close()


def test_a_file_that_is_no_memory_file_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    path.write_bytes(framed(msgspec.msgpack.encode(CONTENTS)).ljust(CONTENTS.file_bytes))
    refused(os.open(path, os.O_RDONLY))


@pytest.mark.parametrize(
    "changes",
    [
        {"state_bytes": -1},
        {"state_bytes": 2**62},
        {"n_cached": 1},
        {"n_cached": 4},
        {"n_cached": 3},
        {"n_vocab": -1},
        {"layout": {"caches": [], "recurrent": False}},
        {"layout": {"caches": [{"n_layer": 1, "type_k": "q9_9", "type_v": None}]}},
        {"layout": {"caches": [{"n_layer": 1, "type_k": "q8_0", "type_v": "q8_0", "rot_k": 3}]}},
        {"origin": None},
    ],
)
def test_a_header_that_cannot_be_is_refused(changes) -> None:
    body = msgspec.msgpack.encode(msgspec.to_builtins(CONTENTS) | changes)
    refused(written_by_hand(framed(body), CONTENTS.file_bytes))


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_header_at_all(body: bytes) -> None:
    refused(written_by_hand(framed(body)))
