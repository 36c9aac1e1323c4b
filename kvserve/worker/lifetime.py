"""A worker lives no longer than its daemon, whatever it is doing: its VRAM has to go with it."""

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from kvserve.ipc.channel import ProtocolError, WorkerChannel
from kvserve.ipc.messages import Shutdown, ToWorker

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent's thread that started it ends.

    Exits at once where `parent`, the expected process id, is gone already: the signal is only
    sent for deaths after this call. Does nothing but that check outside Linux.
    Raises OSError where the kernel refuses.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def start_reader(channel: WorkerChannel, deliver: Callable[[ToWorker], None]) -> None:
    """Read messages on a thread of its own and hand each to `deliver`, which must not block.

    End of file and `Shutdown` end the process with status 0 on the spot, a frame that cannot be
    read with status 1; no thread is waited for, since one may be stuck in the GPU driver.
    """
    threading.Thread(
        target=_read_until_eof, args=(channel, deliver), name="reader", daemon=True
    ).start()


def _read_until_eof(channel: WorkerChannel, deliver: Callable[[ToWorker], None]) -> None:
    status = 1
    try:
        while True:
            message = channel.receive()
            if message is None or isinstance(message, Shutdown):
                status = 0
                break
            deliver(message)
    except ProtocolError:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
