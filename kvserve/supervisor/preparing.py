"""Everything that is read and decided before anything is started."""

from dataclasses import dataclass, replace
from pathlib import Path

from kvserve.core.draft import MOST_VOCAB_DIFFERENCE, draft_model
from kvserve.core.machine import Backend, Machine
from kvserve.core.plan import Plan, Request
from kvserve.errors import UsageError
from kvserve.gguf.model import ModelFile
from kvserve.settings import Settings
from kvserve.supervisor.building import library_mark, read_build
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.confirming import Oracle
from kvserve.supervisor.deciding import Decider, Machines
from kvserve.supervisor.measurements import Measurements
from kvserve.supervisor.profiles import NOTHING_KNOWN, Known, Profiles, ProfileWatch, profile_key


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model, a machine and the decision; `decider` decides again when things change. `known` is
    what was measured of the model's quality."""

    settings: Settings
    model: ModelFile
    model_id: str
    machine: Machine
    decider: Decider
    plan: Plan
    known: Known = NOTHING_KNOWN
    draft: ModelFile | None = None


def prepare(
    settings: Settings,
    model: ModelFile,
    model_id: str,
    *,
    draft: ModelFile | None = None,
    confirm: bool = False,
    ahead: bool = False,
) -> Prepared:
    """Read the machine and decide. Raises DoesNotFit, UsageError, WorkerFailed.

    With `confirm` llama.cpp is asked about the chosen launch, which takes a second; without it only
    what it said earlier counts. With `ahead` it is asked in the same go about the launches that a
    reload may need.
    """
    build = read_build(settings.state_dir / "build.json")
    machines = Machines(build)
    machine = machines.read()
    request = with_draft(settings.to_request(machine), draft, model)
    calibration = Calibration(settings.state_dir / "calibration.json")
    measurements = Measurements(
        settings.state_dir / "measurements.json", model.identity, _mark(machine)
    )
    oracle = Oracle(str(model.path), measurements)
    backend = Backend.CPU if request.n_gpu_layers == 0 else request.backend
    watch = ProfileWatch(Profiles(), model_id, profile_key(model.identity, machine, backend))
    decider = Decider(
        model.shape,
        request,
        machines,
        calibration,
        oracle=oracle,
        quality=lambda: watch.read().quality,
    )
    if confirm:
        plan = decider.decide_confirmed(machine, request.n_ctx, 0, 0, ahead=ahead)
    else:
        plan = decider.decide(machine, request.n_ctx, returning_bytes=0, n_out_of_memory=0)
    return Prepared(settings, model, model_id, machine, decider, plan, watch.read(), draft)


def with_draft(request: Request, draft: ModelFile | None, model: ModelFile) -> Request:
    """The request with room for a draft model, if there is one. Raises UsageError for one that
    cannot be used."""
    if draft is None:
        return request
    _check_draft(draft, model)
    cost = draft_model(draft.shape, request.n_parallel, request.n_batch)
    return replace(request, draft_model=cost)


def _check_draft(draft: ModelFile, model: ModelFile) -> None:
    for file, what in ((draft, "the draft model"), (model, "the model")):
        if not file.shape.takes_back:
            raise UsageError(
                f"{what} ({file.shape.architecture}) cannot take tokens back, which speculative "
                "decoding needs: leave --draft-model out",
                param="draft_model",
            )
    sizes = draft.shape.n_vocab, model.shape.n_vocab
    if abs(sizes[0] - sizes[1]) > MOST_VOCAB_DIFFERENCE:
        raise UsageError(
            f"the draft model has {sizes[0]} tokens and the model {sizes[1]}: take one of the same "
            "family, with the same vocabulary",
            param="draft_model",
        )


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
