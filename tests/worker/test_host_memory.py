"""Memory that a GPU copies to and from by itself; here the CPU's own stands in for a GPU's."""

import ctypes
import gc
import weakref

import numpy as np
import pytest

from kvserve.worker.carry.parts import PART_BYTES, Scratch
from kvserve.worker.llama import host_memory, library, page_locked

MIB = 2**20


class Device:
    """llama.cpp's library with one GPU, whose host memory is the CPU's; `freed` are its buffers
    that were freed, `without` what it does not have."""

    def __init__(self, without: str = "") -> None:
        self.freed: list[int] = []
        self.allocated: list[int] = []
        self.n_at_once: list[int] = []
        self._without = without
        self._library = library()
        self._real = host_memory._Ggml(self._library)

    def n_devices(self) -> int:
        return 2

    def device(self, index: int) -> int:
        return 100 + index

    def type_of(self, device: int) -> int:
        return 1 if device == 101 and self._without != "device" else 0

    def host_memory_of(self, device: int) -> int | None:
        if self._without == "kind":
            return None
        cpu = self._library.ggml_backend_cpu_buffer_type
        cpu.restype = ctypes.c_void_p
        return cpu()

    def allocate(self, kind: int, n_bytes: int) -> int | None:
        if self._without == "memory":
            return None
        buffer = self._real.allocate(kind, n_bytes)
        self.allocated.append(n_bytes)
        gc.collect()
        self.n_at_once.append(len(self.allocated) - len(self.freed))
        return buffer

    def address_of(self, buffer: int) -> int:
        return self._real.address_of(buffer)

    def free(self, buffer: int) -> None:
        self.freed.append(buffer)
        self._real.free(buffer)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return installed(monkeypatch, Device())


def installed(monkeypatch: pytest.MonkeyPatch, device: Device) -> Device:
    monkeypatch.setattr(host_memory, "_Ggml", type("Fake", (), {"__new__": lambda *_: device}))
    return device


def test_it_is_of_the_first_gpu_that_has_some_and_freed_with_its_last_view(device: Device) -> None:
    memory = page_locked(3 * MIB)
    assert memory is not None
    assert (memory.shape, memory.dtype) == ((3 * MIB,), np.uint8)
    memory[:] = 7
    part = memory[10:20]
    del memory
    gc.collect()
    assert device.freed == []
    assert part.tolist() == [7] * 10
    del part
    gc.collect()
    assert len(device.freed) == 1


def test_it_is_not_freed_as_the_process_ends(device: Device) -> None:
    memory = page_locked(10)
    assert memory is not None
    finalizers = [one for one in weakref.finalize._registry if device.free in one.peek()]
    assert [one.atexit for one in finalizers] == [False]


@pytest.mark.parametrize("without", ["device", "kind", "memory"])
def test_where_there_is_none_it_says_so(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    installed(monkeypatch, Device(without))
    assert page_locked(100) is None
    assert len(Scratch(page_locked=True).take(100)) == 100


def test_this_machine_without_a_gpu_has_none() -> None:
    ggml = host_memory._Ggml(library())
    kinds = [ggml.type_of(ggml.device(index)) for index in range(ggml.n_devices())]
    assert kinds, "the CPU at least"
    if host_memory._GPU in kinds:
        pytest.skip("there is a GPU")
    assert page_locked(100) is None


def test_scratch_for_a_gpu_grows_seldom_and_has_one_memory_at_a_time(device: Device) -> None:
    scratch = Scratch(page_locked=True)
    for n_bytes in (10, MIB, PART_BYTES, 5):
        assert len(scratch.take(n_bytes)) == n_bytes
    assert device.allocated == [PART_BYTES]
    scratch.take(PART_BYTES + 1)
    assert device.allocated == [PART_BYTES, 2 * PART_BYTES]
    assert device.n_at_once == [1, 1]


def test_a_library_without_such_functions_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "library", lambda: ctypes.CDLL(None))
    assert page_locked(100) is None


def test_scratch_for_a_cpu_is_any_memory(device: Device) -> None:
    assert len(Scratch().take(100)) == 100
    assert device.allocated == []
