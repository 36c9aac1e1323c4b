"""Everything that is read and decided before anything is started."""

from dataclasses import dataclass
from pathlib import Path

from kvserve.core.machine import Backend, Machine
from kvserve.core.plan import Plan
from kvserve.gguf.model import ModelFile
from kvserve.settings import Settings
from kvserve.supervisor.building import library_mark, read_build
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.confirming import Oracle
from kvserve.supervisor.measurements import Measurements
from kvserve.supervisor.planning import MachinePlanner, Machines
from kvserve.supervisor.profiles import NOTHING_KNOWN, Known, Profiles, ProfileWatch, profile_key


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model, a machine and the decision; `planner` decides again when things change. `known` is
    what was measured of the model's quality."""

    settings: Settings
    model: ModelFile
    model_id: str
    machine: Machine
    planner: MachinePlanner
    plan: Plan
    known: Known = NOTHING_KNOWN


def prepare(
    settings: Settings, model: ModelFile, model_id: str, *, confirm: bool = False
) -> Prepared:
    """Read the machine and decide. Raises DoesNotFit, UsageError, WorkerFailed.

    With `confirm` llama.cpp is asked about the chosen launch and about those that a reload may
    need, which takes a second or two; without it only what it said earlier counts.
    """
    build = read_build(settings.state_dir / "build.json")
    machines = Machines(build)
    machine = machines.read()
    request = settings.to_request(machine)
    calibration = Calibration(settings.state_dir / "calibration.json")
    measurements = Measurements(
        settings.state_dir / "measurements.json", model.identity, _mark(machine)
    )
    oracle = Oracle(str(model.path), measurements)
    backend = Backend.CPU if request.n_gpu_layers == 0 else request.backend
    watch = ProfileWatch(Profiles(), model_id, profile_key(model.identity, machine, backend))
    planner = MachinePlanner(
        model.shape,
        request,
        machines,
        calibration,
        oracle=oracle,
        quality=lambda: watch.read().quality,
    )
    if confirm:
        plan = planner.decide_confirmed(machine, request.n_ctx, 0, 0, ahead=True)
    else:
        plan = planner.decide(machine, request.n_ctx, returning_bytes=0, n_out_of_memory=0)
    return Prepared(settings, model, model_id, machine, planner, plan, watch.read())


def _mark(machine: Machine) -> str:
    gpus = ",".join(f"{gpu.name} {gpu.compute_capability}" for gpu in machine.gpus)
    return f"{machine.build.version} {library_mark()} {gpus}"


def model_id_of(model: ModelFile, path: Path) -> str:
    """The name that clients call the model by: the file's stem, without a split's number."""
    stem = path.stem
    head, _, tail = stem.rpartition("-of-")
    if head and tail.isdigit() and head[-6:-5] == "-" and head[-5:].isdigit():
        return head[:-6]
    return stem or model.shape.architecture
