"""The thread that reads the daemon's messages, and ends the process with the daemon."""

import os
import sys
import threading
import traceback
from collections.abc import Callable

from kvserve.ipc.channel import ProtocolError, WorkerChannel
from kvserve.ipc.messages import Shutdown, ToWorker


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
