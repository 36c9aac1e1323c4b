"""A worker lives no longer than its daemon, whatever it is doing: its VRAM has to go with it."""

import ctypes
import os
import signal
import sys

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
