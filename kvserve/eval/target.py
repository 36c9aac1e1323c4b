"""A model on this machine: how much room there is, how the evaluating process loads it, and what
its measurements will hold for."""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import structs

from kvserve.core.dtypes import CachePair
from kvserve.core.eval_room import Need, longest_context, place, whole_launch
from kvserve.core.loss import REFERENCE_PAIR
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import Overheads
from kvserve.core.plan import Launch, Request
from kvserve.gguf.model import ModelFile
from kvserve.ipc.messages import Load
from kvserve.settings import Settings
from kvserve.supervisor.building import read_build
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.deciding import Machines
from kvserve.supervisor.loads import load_of, worker_environment
from kvserve.supervisor.profiles import ProfileKey, profile_key


@dataclass(frozen=True, slots=True)
class Placed:
    """The reference's load, the process's environment, and the key of what it measures."""

    load: Load
    environment: Mapping[str, str]
    key: ProfileKey


@dataclass(frozen=True, slots=True)
class Target:
    """A model and the machine as it was read; nothing is loaded yet."""

    settings: Settings
    model: ModelFile
    machine: Machine
    request: Request
    overheads: Overheads

    @property
    def backend(self) -> Backend:
        """Where the layers are meant to run."""
        settings, machine = self.settings, self.machine
        on_gpu = machine.gpus and settings.device != "cpu" and settings.gpu_layers != 0
        return Backend.CUDA if on_gpu else Backend.CPU

    def longest(self, need: Need) -> int:
        """The longest context for which there is room, 0 for none."""
        return longest_context(self.model.shape, self.machine, self.request, need, self.overheads)

    def place(self, need: Need) -> Placed:
        """Room for `need`, as `start` would place it. Raises DoesNotFit, UsageError."""
        shape = self.model.shape
        return self.placed(place(shape, self.machine, self.request, need, self.overheads))

    def whole(self, pair: CachePair, n_ctx: int) -> Launch | None:
        """The launch of one context with all layers on the device; None where it does not fit."""
        shape = self.model.shape
        return whole_launch(shape, self.machine, self.request, pair, n_ctx, self.overheads)

    def placed(self, launch: Launch) -> Placed:
        """How the process loads a launch."""
        load = load_of(
            str(self.model.path), launch, n_threads=self.settings.n_threads(self.machine.host)
        )
        key = profile_key(self.model.identity, self.machine, launch.backend)
        return Placed(_reference(load), worker_environment(launch.backend), key)


def read_target(settings: Settings, model: ModelFile) -> Target:
    """Read the machine. Raises WorkerFailed where llama.cpp cannot be loaded."""
    machine = Machines(read_build(settings.state_dir / "build.json")).read()
    request = settings.to_request(machine)
    calibration = Calibration(settings.state_dir / "calibration.json")
    overheads = calibration.overheads(machine.gpus, machine.build, model.shape)
    return Target(settings, model, machine, request, overheads)


def _reference(load: Load) -> Load:
    """The load with the reference's types; each context is given its own size."""
    types = {"type_k": REFERENCE_PAIR.k, "type_v": REFERENCE_PAIR.v}
    return structs.replace(load, n_ctx=0, n_seq_max=1, **types)
