"""The planner against a machine whose readings the test writes down."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvserve.core.loss import NOTHING_MEASURED
from kvserve.core.machine import Build, Gpu, Host
from kvserve.core.memory import DEFAULT_OVERHEADS, prior_overheads
from kvserve.core.plan import Plan, Request, Task
from kvserve.core.selector import MIN_RESERVE_BYTES, default_reserve
from kvserve.core.shape import ModelShape
from kvserve.ipc.messages import Loaded, MemoryReport
from kvserve.supervisor.calibration import GROWTH_BYTES, Calibration
from kvserve.supervisor.deciding import Decider, Machines
from kvserve.supervisor.planning import MachinePlanner
from kvserve.units import GIB, MIB
from tests.core.measured import measured_alike
from tests.core.shapes import llama3_8b, machine, plain

LOADED = Loaded(
    n_ctx=8192,
    n_ctx_train=131072,
    n_vocab=1,
    memory=MemoryReport(),
    template="model",
    load_seconds=1.0,
)


class Box:
    """A machine with one GPU; what is free may be changed, and each reading is counted."""

    def __init__(self, vram_gib: float | None = 7.6) -> None:
        self.box = machine(vram_gib)
        self.process_bytes: int | None = None
        self.n_reads = 0
        self.frees_after: tuple[int, int] | None = None

    def read_gpus(self) -> tuple[Gpu, ...]:
        self.n_reads += 1
        if self.frees_after and self.n_reads > self.frees_after[0]:
            self.set_free(self.frees_after[1])
        return self.box.gpus

    def read_host(self) -> Host:
        return self.box.host

    def set_free(self, free_bytes: int) -> None:
        gpus = tuple(replace(gpu, free_bytes=free_bytes) for gpu in self.box.gpus)
        self.box = replace(self.box, gpus=gpus)

    def planner(
        self, path: Path, shape: ModelShape | None = None, settle_seconds: float = 5.0
    ) -> MachinePlanner:
        machines = Machines(
            self.box.build,
            read_gpus=self.read_gpus,
            read_host=self.read_host,
            gpu_process_memory=lambda uuid, pid: self.process_bytes,
            host_process_memory=lambda pid: 300 * MIB,
        )
        calibration = Calibration(path / "calibration.json")
        request = Request(n_ctx=32768)
        decider = Decider(shape or llama3_8b(), request, machines, calibration)
        return MachinePlanner(decider, settle_seconds)


def pair_of(plan: Plan) -> str:
    return str(plan.chosen.launch.pair)


def test_what_a_leaving_worker_returns_counts_as_free(tmp_path: Path) -> None:
    box = Box(vram_gib=0.4)
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(16384, returning_bytes=int(7.2 * GIB)))
    assert pair_of(plan) == "f16:f16"


def test_a_plan_fits_beside_a_worker_only_whole_and_less_the_reserve(tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))
    needed_bytes = plan.chosen.memory.total_bytes
    host_bytes = box.box.host.free_bytes
    host_bytes -= default_reserve(host_bytes) + plan.chosen.host_memory.total_bytes
    box.set_free(needed_bytes + MIN_RESERVE_BYTES)
    assert asyncio.run(planner.room_beside(plan)) == host_bytes
    box.set_free(needed_bytes + MIN_RESERVE_BYTES - 1)
    assert asyncio.run(planner.room_beside(plan)) is None
    box.box = replace(box.box, gpus=())
    assert asyncio.run(planner.room_beside(plan)) is None


def test_on_the_cpu_weights_count_once_and_what_is_left_is_told(tmp_path: Path) -> None:
    box = Box(vram_gib=None)
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))
    needed_bytes = plan.chosen.memory.total_bytes
    for spare_bytes, beside_bytes in ((0, 0), (7, 7), (-1, None)):
        free_bytes = needed_bytes + MIN_RESERVE_BYTES + spare_bytes
        box.box = replace(box.box, host=replace(box.box.host, free_bytes=free_bytes))
        assert asyncio.run(planner.room_beside(plan)) == beside_bytes


def test_each_out_of_memory_raises_the_reserve(tmp_path: Path) -> None:
    planner = Box().planner(tmp_path)
    pairs = [pair_of(asyncio.run(planner.plan(32768, n_out_of_memory=n))) for n in (0, 1, 2, 3)]
    assert pairs == ["q8_0:q8_0", "q8_0:q8_0", "q8_0:q5_1", "q8_0:q4_0"]


def test_memory_that_comes_back_late_is_waited_for(tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(32768))
    box.set_free(GIB)
    box.frees_after = (box.n_reads + 3, int(7.6 * GIB))
    assert asyncio.run(planner.wait_for_room(plan))


def test_memory_that_stays_taken_is_told(tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(32768))
    planner = box.planner(tmp_path, settle_seconds=0.1)
    box.set_free(GIB)
    assert not asyncio.run(planner.wait_for_room(plan))


def weigh(planner: MachinePlanner, plan: Plan) -> int | None:
    async def story() -> int | None:
        await planner.wait_for_room(plan)
        return (await planner.weigh(plan, LOADED, 1)).device_bytes

    return asyncio.run(story())


def test_the_overhead_of_a_load_is_learnt_for_the_next_plan(tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(32768))
    buffers = plan.chosen.memory.total_bytes - plan.chosen.memory.runtime_bytes
    box.process_bytes = buffers + 300 * MIB
    assert weigh(planner, plan) == box.process_bytes
    again = asyncio.run(box.planner(tmp_path).plan(32768))
    assert again.chosen.memory.runtime_bytes == 300 * MIB + GROWTH_BYTES
    # Another architecture has its own overhead, unknown so far.
    other = asyncio.run(box.planner(tmp_path, replace(llama3_8b(), architecture="x")).plan(8192))
    assert other.chosen.memory.runtime_bytes == DEFAULT_OVERHEADS.gpu_bytes


def test_without_readings_by_process_the_drop_in_free_memory_counts(tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))

    async def story() -> int | None:
        await planner.wait_for_room(plan)
        box.set_free(int(7.6 * GIB) - 6 * GIB)
        return (await planner.weigh(plan, LOADED, 1)).device_bytes

    assert asyncio.run(story()) == 6 * GIB


@pytest.mark.parametrize("taken_mib", [0, 100, 40_000])
def test_a_reading_that_cannot_be_true_teaches_nothing(taken_mib: int, tmp_path: Path) -> None:
    box = Box()
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))
    box.process_bytes = taken_mib * MIB
    weigh(planner, plan)
    again = asyncio.run(planner.plan(8192))
    assert again.chosen.memory.runtime_bytes == DEFAULT_OVERHEADS.gpu_bytes


def test_a_split_model_teaches_nothing(tmp_path: Path) -> None:
    box = Box(vram_gib=4.0)
    planner = box.planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))
    assert plan.chosen.launch.n_gpu_layers < 33
    box.process_bytes = plan.chosen.memory.total_bytes + 50 * MIB
    weigh(planner, plan)
    assert not (tmp_path / "calibration.json").exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"GPU-0 0.3.36 llama": "many"}'])
def test_a_broken_calibration_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(content)
    plan = asyncio.run(Box().planner(tmp_path).plan(8192))
    assert plan.chosen.memory.runtime_bytes == DEFAULT_OVERHEADS.gpu_bytes


def test_experts_take_more_beside_the_buffers() -> None:
    moe = plain(n_embd=2048, n_expert=128, n_expert_used=8)
    more = prior_overheads((8, 9), moe).gpu_bytes - DEFAULT_OVERHEADS.gpu_bytes
    assert more == 96 * MIB


def test_a_build_without_cuda_does_not_look_at_gpus(tmp_path: Path) -> None:
    box = Box()
    box.box = replace(box.box, build=Build("x", cuda=False))
    plan = asyncio.run(box.planner(tmp_path).plan(8192))
    assert box.n_reads == 0
    assert plan.machine.gpus == ()


def test_on_the_host_the_weights_do_not_come_back(tmp_path: Path) -> None:
    planner = Box(vram_gib=None).planner(tmp_path)
    plan = asyncio.run(planner.plan(8192))
    measured = asyncio.run(planner.weigh(plan, LOADED, 1))
    memory = plan.chosen.memory
    assert measured.device_bytes == 300 * MIB
    assert measured.returning_bytes == memory.total_bytes - memory.weights_bytes


def test_the_calibration_file_is_plain_json(tmp_path: Path) -> None:
    box = Box()
    calibration = Calibration(tmp_path / "c.json")
    assert calibration.learn(box.box.gpus[0], box.box.build, llama3_8b(), 300 * MIB)
    known = json.loads((tmp_path / "c.json").read_text())
    assert known == {"GPU-0 0.3.36 llama": 300 * MIB + GROWTH_BYTES}


def test_quality_that_is_measured_later_counts_at_the_next_plan(tmp_path: Path) -> None:
    box = Box(70.0)
    known = [NOTHING_MEASURED]
    machines = Machines(box.box.build, read_gpus=box.read_gpus, read_host=box.read_host)
    decider = Decider(
        llama3_8b(),
        Request(n_ctx=8192, task=Task.MATH),
        machines,
        Calibration(tmp_path / "calibration.json"),
        quality=lambda: known[0],
    )
    planner = MachinePlanner(decider)
    before = asyncio.run(planner.plan(8192))
    assert str(before.chosen.launch.pair) == "f16:f16"
    assert planner.allows(before, Task.MATH)
    known[0] = measured_alike("f16", "q8_0")
    after = asyncio.run(planner.plan(8192))
    assert str(after.chosen.launch.pair) == "q8_0:q8_0"
    assert planner.allows(after, Task.MATH)
