"""`python -m kvserve.worker.measure`: what launches of a model would take, in llama.cpp's figures.

Reads one `MeasureRequest` as JSON from stdin, writes one `MeasureAnswer` a line to stdout. No
weights are read and no cache is allocated; but a CUDA build that sees its GPU takes a CUDA context
there (about 500 MiB on an H100), so it belongs before a worker, not beside one. Exit status 0, or
1 with one line on stderr where the request cannot be worked on at all.
"""

import sys
from typing import TYPE_CHECKING

import msgspec

from kvserve.ipc.measuring import MeasureAnswer, Measured, MeasureRequest, Refused
from kvserve.ipc.messages import Load
from kvserve.worker import build, lean
from kvserve.worker.buffer_log import BufferLog
from kvserve.worker.load_log import LoadLog
from kvserve.worker.one_shot import fail, leave, write

if TYPE_CHECKING:
    from kvserve.worker import llama


def main() -> int:
    """Answer the request on stdin; returns the exit status."""
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=MeasureRequest)
    except msgspec.DecodeError as error:
        return fail(f"not a request: {error}")
    if (refusal := build.refusal()) is not None:
        return fail(refusal)
    lean.stand_in()
    try:
        _answer(request)
    except Exception as error:  # a library that does not load, a type that is none
        return fail(f"{type(error).__name__}: {error}")
    return 0


def _answer(request: MeasureRequest) -> None:
    from kvserve.worker import llama  # noqa: PLC0415 - loads the library, checked above

    log = LoadLog()
    llama.start_backend(log)
    pending = list(enumerate(request.launches))
    while pending:
        model = _model_of(pending[0][1])
        same = [(index, load) for index, load in pending if _model_of(load) == model]
        pending = [(index, load) for index, load in pending if _model_of(load) != model]
        log.forget_errors()
        try:
            blueprint = llama.Blueprint(same[0][1], log)
        except llama.LoadError as error:
            for index, _ in same:
                write(Refused(index, error.message))
            continue
        for index, load in same:
            write(_measure(blueprint, index, load))
        if pending:  # forgetting a large vocabulary takes 0.1 s, which the process's end does not
            blueprint.close()


def _measure(blueprint: "llama.Blueprint", index: int, load: Load) -> MeasureAnswer:
    from kvserve.worker.llama import LoadError  # noqa: PLC0415 - as above

    lines = BufferLog()
    try:
        blueprint.lay_out(load, lines.feed)
    except LoadError as error:
        return Refused(index, error.message)
    return Measured(index, lines.buffers())


def _model_of(load: Load) -> tuple[object, ...]:
    """What a model is built with; contexts of the same can share it."""
    placement = load.n_gpu_layers, load.n_cpu_moe, load.tensor_split
    return load.model_path, load.extra_buffers, *placement


if __name__ == "__main__":
    leave(main())
