"""Asks llama.cpp itself what launches would take, in a short-lived process, before one is started.

The process lays the model out without reading its weights (worker/measure). Whatever goes wrong
there is logged, and the formulas stand.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from kvserve.core.findings import Findings, doubtful
from kvserve.core.machine import Backend
from kvserve.core.plan import Estimate, Launch, Memory, Plan
from kvserve.ipc.measuring import DeviceBuffers, MeasureAnswer, Measured, MeasureRequest
from kvserve.supervisor.loads import load_of, worker_environment
from kvserve.supervisor.measurements import Measurements

MEASURE_ARGV = (sys.executable, "-m", "kvserve.worker.measure")
TIMEOUT_SECONDS = 30.0
MOST_ROUNDS = 6
_answers = msgspec.json.Decoder(MeasureAnswer)


class Asker(Protocol):
    """Knows what llama.cpp says of launches."""

    @property
    def findings(self) -> Findings:
        """All that is known so far."""
        ...

    def ask(self, launches: Sequence[Launch]) -> None:
        """Add to the findings what can be found out about `launches`."""
        ...


class Oracle:
    """The findings on one model, from the disk and from the process."""

    def __init__(
        self,
        model_path: str,
        measurements: Measurements,
        argv: Sequence[str] = MEASURE_ARGV,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._model_path = model_path
        self._measurements = measurements
        self._argv = tuple(argv)
        self._timeout = timeout
        self.findings = measurements.read()

    def ask(self, launches: Sequence[Launch]) -> None:
        """Run the process for the launches that are not known yet. Never raises: what it did not
        answer stays unknown."""
        unknown = [k for k in dict.fromkeys(launches) if not self.findings.knows(k)]
        for backend in Backend:
            group = [launch for launch in unknown if launch.backend is backend]
            if group:
                self.findings = self.findings.joined(self._run(group))
        if unknown:
            self._measurements.write(self.findings)

    def _run(self, launches: Sequence[Launch]) -> Findings:
        request = MeasureRequest(
            tuple(load_of(self._model_path, launch, n_threads=1) for launch in launches)
        )
        output, trouble = self._output(msgspec.json.encode(request), launches[0])
        exact, refused = {}, {}
        for line in output.splitlines():
            try:
                answer = _answers.decode(line)
                launch = launches[answer.index]
            except (msgspec.DecodeError, IndexError) as error:
                trouble = trouble or f"an answer makes no sense: {error}"
                continue
            if isinstance(answer, Measured):
                exact[launch] = _estimate(answer, len(launch.tensor_split))
            else:
                refused[launch] = answer.reason
        n_left = len(launches) - len(exact) - len(refused)
        if trouble or n_left:
            import structlog  # noqa: PLC0415 - kvserve plan is faster without it

            structlog.get_logger(__name__).warning(
                "llama.cpp could not be asked about all launches; their sizes are computed",
                n_unanswered=n_left,
                reason=trouble or "the measuring process ended early",
            )
        return Findings(exact, refused)

    def _output(self, request: bytes, launch: Launch) -> tuple[bytes, str | None]:
        """What the process wrote, and why there may be less of it than there should be."""
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter
                self._argv,
                input=request,
                env=worker_environment(launch.backend),
                capture_output=True,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return error.stdout or b"", f"no end after {self._timeout:.0f} s"
        except OSError as error:
            return b"", str(error)
        if done.returncode == 0:
            return done.stdout, None
        words = done.stderr.decode(errors="replace").strip().splitlines()
        end = f"status {done.returncode}"
        return done.stdout, f"{end}: {words[-1]}" if words else end


def confirm(
    plan: Plan,
    oracle: Asker,
    decide: Callable[[Findings], Plan],
    ahead: Sequence[Launch] = (),
) -> Plan:
    """Ask about a plan's doubtful launches and decide again, until llama.cpp has confirmed the
    chosen one or says no more. The launches of `ahead` are asked about in the first round.
    `decide` raises what it raises."""
    for _ in range(MOST_ROUNDS):
        doubts = doubtful(plan, oracle.findings)
        if not doubts and not ahead:
            break
        oracle.ask((*doubts, *ahead))
        ahead = ()
        if not any(oracle.findings.knows(launch) for launch in doubts):
            break
        plan = decide(oracle.findings)
    return plan


def _estimate(measured: Measured, n_gpus: int) -> Estimate:
    """The devices as the plan sees them: the GPUs, together and each (`CUDA0`, `CUDA1`), and the
    host with its pinned memory (`CUDA_Host`)."""
    host = [b for b in measured.buffers if b.device == "CPU" or b.device.endswith("_Host")]
    gpus = [b for b in measured.buffers if b not in host]
    each = [[b for b in gpus if b.device.endswith(str(gpu))] for gpu in range(n_gpus)]
    known = n_gpus > 1 and n_gpus <= 10 and sum(map(len, each)) == len(gpus)
    return Estimate(
        _together(gpus), _together(host), tuple(_together(b) for b in each) if known else ()
    )


def _together(buffers: Sequence[DeviceBuffers]) -> Memory:
    return Memory(
        kv_bytes=sum(b.kv_bytes for b in buffers),
        recurrent_bytes=sum(b.recurrent_bytes for b in buffers),
        compute_bytes=sum(b.compute_bytes for b in buffers),
        output_bytes=sum(b.output_bytes for b in buffers),
    )
