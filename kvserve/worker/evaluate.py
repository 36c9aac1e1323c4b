"""`python -m kvserve.worker.evaluate`: what KV types cost and how fast they are, on one model.

Reads one `EvalRequest` as JSON from stdin, writes one `EvalAnswer` a line to stdout. The weights
are loaded once; beside the reference context there is one candidate context at a time. Exit
status 0; or with one line on stderr `BAD_INPUT_STATUS` where the request is to blame, else 1.
"""

import signal
import sys

import msgspec

from kvserve.errors import KvserveError
from kvserve.ipc.evaluating import BAD_INPUT_STATUS, EvalRequest
from kvserve.worker import build
from kvserve.worker.lifetime import die_with_parent
from kvserve.worker.one_shot import fail, leave, write


def main() -> int:
    """Answer the request on stdin; returns the exit status."""
    die_with_parent()
    # Ctrl-C in a terminal goes to the whole group; ending this process is the parent's part.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=EvalRequest)
    except msgspec.DecodeError as error:
        return fail(f"not a request: {error}")
    if (refusal := build.refusal()) is not None:
        return fail(refusal)
    from kvserve.worker.evaluation import evaluate  # noqa: PLC0415 - loads the library

    try:
        evaluate(request, write)
    except Exception as error:  # one line for the parent, whatever it was
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        if getattr(error, "out_of_memory", False):
            message += ": a smaller --ctx, or fewer --gpu-layers, need less memory"
        blamed = isinstance(error, KvserveError) and error.http_status == 400
        return fail(message, BAD_INPUT_STATUS if blamed else 1)
    return 0


if __name__ == "__main__":
    leave(main())
