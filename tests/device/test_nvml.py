import threading
from dataclasses import replace

import pytest

from kvserve.device.nvml import Nvml, read_gpus, report_gpus
from kvserve.device.visible import mask_for
from tests.device.recorded import (
    A100_WITH_MIG,
    GB10,
    H100,
    MIB,
    RTX_3090,
    RTX_4060,
    Device,
    RecordedNvml,
)


@pytest.fixture
def sessions():
    """Makes sessions over recorded devices, and ends them."""
    made = []

    def make(*devices: Device, **failures: str) -> Nvml:
        made.append(Nvml(RecordedNvml(devices, **failures)))
        return made[-1]

    yield make
    for session in made:
        session.close()


def test_a_gpu_is_read_with_all_its_facts(sessions):
    report = report_gpus(sessions(RTX_4060), {})
    (gpu,) = report.gpus
    assert (gpu.index, gpu.uuid, gpu.name) == (0, RTX_4060.uuid, RTX_4060.name)
    assert (gpu.total_bytes, gpu.free_bytes) == (8188 * MIB, 7600 * MIB)
    assert gpu.compute_capability == (8, 9)
    assert gpu.bandwidth == pytest.approx(272e9, rel=0.001)
    assert report.driver_version == "580.159.04"
    assert report.reason is None
    assert report.notes == ()


def test_bandwidth_of_hbm(sessions):
    (gpu,) = read_gpus(sessions(H100), {})
    assert gpu.bandwidth == pytest.approx(3.35e12, rel=0.001)


def test_what_the_driver_does_not_support_is_none(sessions):
    bare = replace(RTX_4060, capability=None, bus_bits=None)
    (gpu,) = read_gpus(sessions(bare), {})
    assert gpu.compute_capability is None
    assert gpu.bandwidth is None


def test_no_driver_is_an_answer_with_the_reason(sessions):
    session = sessions(RTX_4060, init_failure="NVML Shared Library Not Found")
    report = report_gpus(session, {})
    assert report.gpus == ()
    assert report.driver_version is None
    assert report.reason == "no NVIDIA driver answers: NVML Shared Library Not Found"
    assert session.used_bytes(RTX_4060.uuid) is None
    assert session.process_memory(RTX_4060.uuid, 4242) is None


def test_a_failing_driver_is_an_answer_with_the_reason(sessions):
    report = report_gpus(sessions(RTX_4060, count_failure="Unknown Error"), {})
    assert report.gpus == ()
    assert report.reason == "the NVIDIA driver failed: Unknown Error"


def test_a_driver_without_gpus(sessions):
    assert report_gpus(sessions(), {}).reason == "the NVIDIA driver lists no GPU"


def test_memory_shared_with_the_host_is_left_out_with_the_reason(sessions):
    report = report_gpus(sessions(GB10), {})
    assert report.gpus == ()
    assert "NVIDIA GB10" in report.reason
    assert "shared with the host" in report.reason


def test_a_lost_gpu_does_not_hide_the_others(sessions):
    report = report_gpus(sessions(replace(RTX_3090, lost=True), RTX_4060), {})
    assert [gpu.index for gpu in report.gpus] == [1]


def test_the_mask_hides_gpus_and_orders_them(sessions):
    session = sessions(RTX_4060, RTX_3090)
    assert [g.index for g in read_gpus(session, {"CUDA_VISIBLE_DEVICES": "1,0"})] == [1, 0]
    assert [g.index for g in read_gpus(session, {"CUDA_VISIBLE_DEVICES": "GPU-8c00"})] == [1]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("", "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs"),
        ("-1", "CUDA_VISIBLE_DEVICES ends at '-1', which names no GPU here"),
        ("0,5", "CUDA_VISIBLE_DEVICES ends at '5', which names no GPU here"),
    ],
)
def test_the_reason_names_the_mask(sessions, mask, reason):
    assert report_gpus(sessions(RTX_4060), {"CUDA_VISIBLE_DEVICES": mask}).reason == reason


def test_numbers_on_unlike_gpus_get_a_note(sessions):
    session = sessions(RTX_4060, RTX_3090)
    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    (note,) = report_gpus(session, environ).notes
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in note
    assert report_gpus(session, environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).notes == ()
    assert report_gpus(session, {"CUDA_VISIBLE_DEVICES": RTX_4060.uuid}).notes == ()
    assert report_gpus(sessions(H100, H100), environ).notes == ()


def test_with_mig_on_one_instance_is_used(sessions):
    report = report_gpus(sessions(A100_WITH_MIG), {})
    (gpu,) = report.gpus
    assert gpu.uuid == A100_WITH_MIG.mig[0].uuid
    assert gpu.total_bytes == 19968 * MIB
    assert gpu.compute_capability == (8, 0)
    assert gpu.bandwidth is None
    assert report.notes == (f"MIG is on: one instance of 2 is used, {gpu.uuid}",)


def test_the_mask_can_name_a_mig_instance(sessions):
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-2222"}
    (gpu,) = read_gpus(sessions(A100_WITH_MIG), environ)
    assert gpu.total_bytes == 9856 * MIB


def test_used_bytes_leave_the_drivers_reserve_out_where_it_is_told(sessions):
    session = sessions(RTX_4060, RTX_3090)
    assert session.used_bytes(RTX_4060.uuid) == 383 * MIB
    assert session.used_bytes(RTX_3090.uuid) == 576 * MIB
    assert session.used_bytes("GPU-none") is None


def test_process_memory_sums_a_process_and_is_none_where_unknown(sessions):
    session = sessions(RTX_4060, RTX_3090)
    assert session.process_memory(RTX_4060.uuid, 4242) == 320 * MIB
    assert session.process_memory(RTX_4060.uuid, 1) is None
    assert session.process_memory(RTX_4060.uuid, 77) is None
    assert session.process_memory(RTX_3090.uuid, 4242) is None


def test_the_session_begins_once_for_all_threads_and_ends_once():
    binding = RecordedNvml((RTX_4060,))
    session = Nvml(binding)
    threads = [threading.Thread(target=session.report, args=({},)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    session.close()
    assert binding.calls == ["init", "shutdown"]


def test_a_closed_session_begins_again():
    binding = RecordedNvml((RTX_4060,))
    session = Nvml(binding)
    session.report({})
    session.close()
    assert len(session.report({}).gpus) == 1
    session.close()
    assert binding.calls == ["init", "shutdown"] * 2


def test_this_machine_is_read_without_an_exception():
    report = report_gpus()
    assert report.gpus or report.reason


def test_a_mask_shows_a_process_the_gpus_in_order(sessions):
    gpus = read_gpus(sessions(RTX_4060, RTX_3090), {"CUDA_VISIBLE_DEVICES": "1,0"})
    assert mask_for(gpus) == f"{RTX_3090.uuid},{RTX_4060.uuid}"
    assert mask_for(()) == ""
