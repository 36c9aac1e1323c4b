"""`python -m kvserve.worker.kernels`: how fast one KV pair decodes, at the beginning and deep down.

Reads one `ipc.messages.Load` as JSON from stdin, times `STEPS` single-token steps in an empty
context, fills it but for as many tokens, times these, and writes one `KernelTime` as JSON. Exit
status 0, or 1 with one line on stderr.
"""

import statistics
import sys
import time

import msgspec

from kvserve.ipc.measuring import KernelTime
from kvserve.ipc.messages import Load
from kvserve.worker import build
from kvserve.worker.load_log import LoadLog
from kvserve.worker.one_shot import fail, leave, write

STEPS = 24
_WARM_UP = 4


def main() -> int:
    """Measure; returns the exit status."""
    if (refusal := build.refusal()) is not None:
        return fail(refusal)
    try:
        load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
        answer = _time(load)
    except Exception as error:  # a file that does not load, memory that is not there
        return fail(f"{type(error).__name__}: {error}")
    write(answer)
    return 0


def _time(load: Load) -> KernelTime:
    # llama_cpp before numpy, see kvserve/worker/llama/__init__.py; its library was checked above.
    from kvserve.worker import llama  # noqa: PLC0415 # isort: skip
    import numpy as np  # noqa: PLC0415

    log = LoadLog()
    llama.start_backend(log)
    context = llama.Context(load, log, lambda _fraction: None)
    batch = llama.Batch(context.n_batch)
    # What the tokens are makes no difference to the time.
    tokens = np.arange(context.n_ctx, dtype=np.int32) % (context.vocab.n_tokens // 2)
    depth = context.n_ctx - STEPS

    def step(start: int, end: int) -> float:
        batch.clear()
        batch.add(tokens[start:end], start, 0, last=True)
        began = time.perf_counter()
        context.decode(batch)
        return time.perf_counter() - began

    shallow = [step(position, position + 1) for position in range(STEPS)]
    for start in range(STEPS, depth, context.n_batch):
        step(start, min(start + context.n_batch, depth))
    deep = [step(position, position + 1) for position in range(depth, context.n_ctx)]
    return KernelTime(
        depth,
        shallow_seconds=statistics.median(shallow[_WARM_UP:]),
        deep_seconds=statistics.median(deep[_WARM_UP:]),
    )


if __name__ == "__main__":
    leave(main())
