"""What the kernel says of processor and graphics cards, whether or not a driver answers."""

from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor's features by the kernel's names (`avx2`, `amx_tile`, …); empty where it does
    not list them. `virtual` is whether a hypervisor is under it."""

    features: frozenset[str]

    @property
    def virtual(self) -> bool:
        """Whether this is a virtual machine, as x86 tells it."""
        return "hypervisor" in self.features


def read_processor(root: Path = _ROOT) -> Processor:
    """Read the first processor's features from `/proc/cpuinfo`."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Processor(frozenset())
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return Processor(frozenset(value.split()))
    return Processor(frozenset())


def count_nvidia_cards(root: Path = _ROOT) -> int:
    """Count NVIDIA display controllers on the PCI bus; 0 where the bus cannot be read."""
    n_cards = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        n_cards += vendor == _NVIDIA and kind.startswith(_DISPLAY_CLASS)
    return n_cards


def process_name(pid: int, root: Path = _ROOT) -> str | None:
    """Return the name of a process; None where there is none, or it is outside this container."""
    try:
        return (root / "proc" / str(pid) / "comm").read_text(errors="replace").strip() or None
    except OSError:
        return None
