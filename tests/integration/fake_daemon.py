"""`python -m tests.integration.fake_daemon start …`: the real daemon with a scripted worker, whose
script is in FAKE_SCRIPT."""

import functools
import os
import sys

from kvserve import daemon
from kvserve.__main__ import run
from kvserve.supervisor.process import ProcessSpawner

if __name__ == "__main__":
    argv = (sys.executable, "-m", "kvserve.worker.fake", "--script", os.environ["FAKE_SCRIPT"])
    daemon.ProcessSpawner = functools.partial(ProcessSpawner, argv=argv)
    run()
