"""Runs the evaluating process and hands its answers on."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import msgspec

from kvserve.errors import UsageError, WorkerFailed
from kvserve.ipc.evaluating import BAD_INPUT_STATUS, EvalAnswer, EvalRequest, Finished

EVALUATE_ARGV = (sys.executable, "-m", "kvserve.worker.evaluate")
_TRAPS = (-signal.SIGILL, -signal.SIGSEGV, -signal.SIGBUS)
_decoder = msgspec.json.Decoder(EvalAnswer)


def measure(
    request: EvalRequest,
    environment: Mapping[str, str],
    take: Callable[[EvalAnswer], None],
    argv: Sequence[str] = EVALUATE_ARGV,
) -> None:
    """Run the process to its end; `take` gets each answer as it comes.

    A process that traps before any unit is over is run once more without llama.cpp's repacked CPU
    weights. Raises UsageError where the request was to blame, else
    WorkerFailed, with its last words.
    """
    status, words, n_finished = _run(request, environment, take, argv)
    if status in _TRAPS and not n_finished:
        bare = msgspec.structs.replace(request.load, extra_buffers=False)
        request = msgspec.structs.replace(request, load=bare)
        status, words, _ = _run(request, environment, take, argv)
    if status == BAD_INPUT_STATUS:
        raise UsageError(words)
    if status != 0:
        reason = words or f"status {status}"
        raise WorkerFailed(f"the evaluating process failed: {reason}")


def _run(
    request: EvalRequest,
    environment: Mapping[str, str],
    take: Callable[[EvalAnswer], None],
    argv: Sequence[str],
) -> tuple[int, str, int]:
    n_finished = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(msgspec.json.encode(request))
                process.stdin.close()
            for line in process.stdout:
                answer = _decode(line)
                n_finished += isinstance(answer, Finished)
                take(answer)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        return status, _last_words(errors), n_finished


def _decode(line: bytes) -> EvalAnswer:
    try:
        answer: EvalAnswer = _decoder.decode(line)
    except msgspec.DecodeError as error:
        raise WorkerFailed(f"the evaluating process wrote nonsense: {error}") from error
    return answer


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
