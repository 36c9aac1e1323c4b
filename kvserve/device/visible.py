"""Which GPUs a CUDA program would see: the rules of `CUDA_VISIBLE_DEVICES`.

The rules are those of the CUDA Programming Guide, "CUDA Environment Variables". CUDA numbers the
GPUs fastest first unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and NVML by PCI bus, so a number may mean
another GPU there than here where the GPUs differ. UUIDs have no such doubt.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvserve.core.machine import Gpu

_INDEX = re.compile(r"[+-]?\d+")


@dataclass(frozen=True, slots=True)
class DeviceIds:
    """How one GPU can be named: its UUID, and those of its MIG instances where MIG is on."""

    uuid: str
    mig_uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Visible:
    """The UUIDs that CUDA would enumerate, in its order, and the first entry it could not use."""

    uuids: tuple[str, ...]
    bad_entry: str | None = None


def visible_uuids(mask: str | None, devices: Sequence[DeviceIds]) -> Visible:
    """Apply the value of `CUDA_VISIBLE_DEVICES` to the devices, which stand in NVML's order.

    None (unset) shows all, an empty mask none. An entry is an index, of which CUDA reads the
    leading digits only, or the beginning of a UUID that fits one device only. The first entry that
    fits none ends the list, and so does one of the other kind; a device named twice makes CUDA
    refuse them all (the last three as driver 580 does it). A GPU with MIG on stands for its first
    instance, since a CUDA process enumerates one instance at most.
    """
    if mask is None:
        return Visible(tuple(_as_seen(device) for device in devices))
    if not mask.strip():
        return Visible(())
    entries = [entry.strip() for entry in mask.split(",")]
    numbered = _INDEX.match(entries[0]) is not None
    uuids: list[str] = []
    for entry in entries:
        uuid = _by_index(entry, devices) if numbered else _by_uuid(entry, devices)
        if uuid is None:
            return Visible(tuple(uuids), bad_entry=entry)
        if uuid in uuids:
            return Visible((), bad_entry=entry)
        uuids.append(uuid)
    return Visible(tuple(uuids))


def order_is_ambiguous(environ: Mapping[str, str], names: Iterable[str]) -> bool:
    """Whether a number in `CUDA_VISIBLE_DEVICES` may mean another GPU to CUDA than to NVML."""
    mask = environ.get("CUDA_VISIBLE_DEVICES", "")
    numbered = _INDEX.match(mask.strip()) is not None
    by_bus = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return numbered and not by_bus and len(set(names)) > 1


def mask_for(gpus: Iterable[Gpu]) -> str:
    """Return the `CUDA_VISIBLE_DEVICES` that shows a process these GPUs, in this order.

    No GPUs give the empty mask: a CUDA build then takes no context and no memory.
    """
    return ",".join(gpu.uuid for gpu in gpus)


def _by_index(entry: str, devices: Sequence[DeviceIds]) -> str | None:
    number = _INDEX.match(entry)
    if number is None or int(number[0]) not in range(len(devices)):
        return None
    return _as_seen(devices[int(number[0])])


def _by_uuid(entry: str, devices: Sequence[DeviceIds]) -> str | None:
    entry = entry.lower()
    if entry in ("gpu-", "mig-") or not entry.startswith(("gpu-", "mig-")):
        return None
    matches = [_as_seen(d) for d in devices if d.uuid.lower().startswith(entry)]
    matches += [uuid for d in devices for uuid in d.mig_uuids if uuid.lower().startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _as_seen(device: DeviceIds) -> str:
    return device.mig_uuids[0] if device.mig_uuids else device.uuid
