"""The limits that a control group sets: memory and CPU time, cgroup v2 and v1.

Read from the files of this process's group and of all groups above it, since each of them can
limit. File meanings: Linux `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# v1 writes "no limit" as the largest page-aligned number; nothing real comes near it.
_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class Limits:
    """What the groups leave to this process; None where nothing is limited.

    `free_bytes` is the least that any group has left, with its page cache counted as free, since
    the kernel drops that before it kills. `cpus` is the quota in CPUs, such as 1.5.
    """

    memory_bytes: int | None = None
    free_bytes: int | None = None
    cpus: float | None = None


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy: where, which part of it, and which v1 controllers (none for v2)."""

    path: Path
    root: PurePosixPath
    controllers: frozenset[str]


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    """The names of one version's files."""

    limits: tuple[str, ...]
    usage: str
    cache_keys: tuple[str, ...]


_V2_MEMORY = _MemoryFiles(
    ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
)
_V1_MEMORY = _MemoryFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def read_limits(root: Path = Path("/")) -> Limits:
    """Read the limits of this process's groups; `root` is where `proc` and `sys` lie.

    A box without control groups, or with files that cannot be read, has no limits.
    """
    unified = _groups(root, "")
    v1_memory, v1_cpu = _groups(root, "memory"), _groups(root, "cpu")
    memory = [
        room
        for groups, files in ((unified, _V2_MEMORY), (v1_memory, _V1_MEMORY))
        for group in groups
        if (room := _memory(group, files)) is not None
    ]
    quotas = [quota for group in unified if (quota := _quota_v2(group)) is not None]
    quotas += [quota for group in v1_cpu if (quota := _quota_v1(group)) is not None]
    return Limits(
        memory_bytes=min((limit for limit, _ in memory), default=None),
        free_bytes=min((free for _, free in memory), default=None),
        cpus=min(quotas, default=None),
    )


def _memory(group: Path, files: _MemoryFiles) -> tuple[int, int] | None:
    limits = [limit for name in files.limits if (limit := _number(group / name)) is not None]
    usage_bytes = _number(group / files.usage)
    if not limits or usage_bytes is None or min(limits) >= _UNLIMITED_BYTES:
        return None
    stat = _key_values(group / "memory.stat")
    cache_bytes = sum(stat.get(key, 0) for key in files.cache_keys)
    held_bytes = max(0, usage_bytes - cache_bytes)
    return min(limits), max(0, min(limits) - held_bytes)


def _quota_v2(group: Path) -> float | None:
    words = _read(group / "cpu.max").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or words[1] == "0":
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(group: Path) -> float | None:
    quota = _number(group / "cpu.cfs_quota_us")
    period = _number(group / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _groups(root: Path, controller: str) -> list[Path]:
    """List the directories of the process's group and its parents; `""` means the v2 hierarchy."""
    member = _membership(root, controller)
    mount = next((m for m in _mounts(root) if _carries(m, controller)), None)
    if member is None or mount is None:
        return []
    group = mount.path
    if member.is_relative_to(mount.root):
        group = mount.path / member.relative_to(mount.root)
    # Where the group lies outside the mounted part (a container's), its top is what we see.
    if ".." in group.parts or not group.is_dir():
        group = mount.path
    above = [parent for parent in group.parents if parent.is_relative_to(mount.path)]
    return [group, *above]


def _membership(root: Path, controller: str) -> PurePosixPath | None:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return PurePosixPath(path)
    return None


def _carries(mount: _Mount, controller: str) -> bool:
    return controller in mount.controllers if controller else not mount.controllers


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        fields, types = place.split(), kind.split()
        if types[0] == "cgroup2":
            controllers: frozenset[str] = frozenset()
        elif types[0] == "cgroup":
            controllers = frozenset(types[2].split(","))
        else:
            continue
        yield _Mount(root / fields[4].lstrip("/"), PurePosixPath(fields[3]), controllers)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None


def _key_values(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
