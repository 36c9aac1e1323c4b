"""The rows marked "driver 580" were run against `cuDeviceGetCount` on an H100."""

import pytest

from kvserve.device.visible import DeviceIds, visible_uuids

A = DeviceIds("GPU-aa11")
B = DeviceIds("GPU-aa22")
C = DeviceIds("GPU-cc33", ("MIG-m1", "MIG-m2"))
BOTH = (A, B)


@pytest.mark.parametrize(
    ("mask", "uuids"),
    [
        (None, ["GPU-aa11", "GPU-aa22"]),
        ("", []),
        ("  ", []),
        ("0", ["GPU-aa11"]),
        (" 1 , 0 ", ["GPU-aa22", "GPU-aa11"]),
        ("0,-1,1", ["GPU-aa11"]),
        ("2,0", []),
        ("NoDevFiles", []),
        ("GPU-aa22", ["GPU-aa22"]),
        ("GPU-aa2,GPU-aa1", ["GPU-aa22", "GPU-aa11"]),
        ("GPU-aa", []),
        # driver 580
        ("0,0", []),
        ("0abc", ["GPU-aa11"]),
        ("0;1", ["GPU-aa11"]),
        ("+0", ["GPU-aa11"]),
        ("00", ["GPU-aa11"]),
        ("GPU-AA22", ["GPU-aa22"]),
        ("gpu-aa22", ["GPU-aa22"]),
        ("GPU-", []),
        ("GPU", []),
        ("aa22", []),
        ("0,,", ["GPU-aa11"]),
        (",0", []),
        ("GPU-aa11,0", ["GPU-aa11"]),
        ("0,GPU-aa11", ["GPU-aa11"]),
    ],
)
def test_the_rules_of_the_mask(mask, uuids):
    assert list(visible_uuids(mask, BOTH).uuids) == uuids


@pytest.mark.parametrize(
    ("mask", "entry"), [("0,7,1", "7"), ("0,0", "0"), ("GPU-aa", "gpu-aa"), ("0", None)]
)
def test_the_entry_that_ends_the_list_is_told(mask, entry):
    bad_entry = visible_uuids(mask, BOTH).bad_entry
    assert (bad_entry.lower() if bad_entry else None) == entry


@pytest.mark.parametrize(
    ("mask", "uuids"),
    [
        (None, ["GPU-aa11", "MIG-m1"]),
        ("1", ["MIG-m1"]),
        ("GPU-cc33", ["MIG-m1"]),
        ("MIG-m2", ["MIG-m2"]),
        ("MIG-m", []),
        ("MIG-", []),
    ],
)
def test_a_gpu_with_mig_on_stands_for_its_instances(mask, uuids):
    assert list(visible_uuids(mask, (A, C)).uuids) == uuids
