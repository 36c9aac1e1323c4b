"""`python -m kvserve.worker --fd N`: serve one model over the inherited Unix socket N."""

import argparse
import faulthandler
import os
import queue
import signal
import socket
import sys

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import LoadFailed
from kvserve.worker import build
from kvserve.worker.lifetime import die_with_parent
from kvserve.worker.reader import start_reader


def main() -> int:
    """Run the worker; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvserve.worker")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--parent", type=int, help="process id of the daemon")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    # Ctrl-C in a terminal goes to the whole group; ending workers is the daemon's part.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    os.set_inheritable(arguments.fd, False)
    channel = WorkerChannel(socket.socket(fileno=arguments.fd))
    if (refusal := build.refusal()) is not None:
        channel.send(LoadFailed(refusal))
        return 1
    inbox: queue.SimpleQueue = queue.SimpleQueue()  # type: ignore[type-arg]
    start_reader(channel, inbox.put)
    from kvserve.worker.session import serve  # noqa: PLC0415 needs the version checked above

    return serve(channel, inbox)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
