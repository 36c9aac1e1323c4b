import os
import subprocess
import sys

import pytest

from kvserve.device.cgroup import Limits, read_limits
from kvserve.device.host import (
    Kernel,
    process_alive,
    process_rss,
    process_started_at,
    read_host,
)

GIB = 2**30
KERNEL = Kernel(
    total_bytes=64 * GIB, available_bytes=40 * GIB, cpus=frozenset(range(8)), n_physical=4
)
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def box(tmp_path):
    """Writes files below a root directory: `box({"proc/self/cgroup": text})`."""

    def write(files: dict[str, str]):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def v2(path: str, root: str = "/", **groups: dict[str, str]) -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNT.format(root=root),
    }
    for group, contents in groups.items():
        for name, text in contents.items():
            files[f"sys/fs/cgroup/{group.replace('__', '/')}/{name}"] = text
    return files


def memory(limit: str, current: int, **more: str) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {GIB}\nactive_file {2 * GIB}\n"
    return {"memory.max": limit, "memory.current": f"{current}\n", "memory.stat": stat, **more}


def test_without_control_groups_the_kernel_is_believed(box):
    host = read_host(box({}), KERNEL)
    assert (host.total_bytes, host.free_bytes) == (64 * GIB, 40 * GIB)
    assert host.n_cores == 4
    assert not host.limited_by_cgroup


def test_v2_limit_counts_page_cache_as_free(box):
    root = box(v2("/box", box=memory(f"{16 * GIB}\n", 10 * GIB)))
    host = read_host(root, KERNEL)
    assert host.total_bytes == 16 * GIB
    assert host.free_bytes == (16 - 10 + 3) * GIB
    assert host.limited_by_cgroup


def test_v2_without_a_limit(box):
    host = read_host(box(v2("/box", box=memory("max\n", 10 * GIB))), KERNEL)
    assert host.total_bytes == 64 * GIB
    assert not host.limited_by_cgroup


def test_v2_high_is_a_limit_too(box):
    contents = memory("max\n", 4 * GIB, **{"memory.high": f"{8 * GIB}\n"})
    assert read_limits(box(v2("/box", box=contents))).memory_bytes == 8 * GIB


def test_v2_every_group_above_can_limit(box):
    files = v2(
        "/user/app",
        user=memory(f"{12 * GIB}\n", 11 * GIB),
        user__app=memory(f"{32 * GIB}\n", 5 * GIB),
    )
    limits = read_limits(box(files))
    assert limits == Limits(memory_bytes=12 * GIB, free_bytes=4 * GIB)


def test_v2_in_a_container_without_its_own_namespace(box):
    contents = memory(f"{16 * GIB}\n", 5 * GIB)
    files = v2("/docker/abc", root="/docker/abc", **{".": contents})
    assert read_limits(box(files)).memory_bytes == 16 * GIB


def test_v2_group_outside_what_is_mounted_reads_the_top(box):
    files = v2("/../other", **{".": memory(f"{16 * GIB}\n", 5 * GIB)})
    assert read_limits(box(files)).memory_bytes == 16 * GIB


def test_usage_above_the_limit_leaves_nothing(box):
    root = box(v2("/box", box=memory(f"{GIB}\n", 9 * GIB)))
    assert read_host(root, KERNEL).free_bytes == 0


def test_free_memory_of_the_machine_is_the_upper_bound(box):
    root = box(v2("/box", box=memory(f"{60 * GIB}\n", GIB)))
    assert read_host(root, KERNEL).free_bytes == 40 * GIB


def v1(limit: str, quota: str = "-1") -> dict[str, str]:
    return {
        "proc/self/cgroup": "9:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS,
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": limit,
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.stat": (
            f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
        ),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
    }


def test_v1_limit(box):
    limits = read_limits(box(v1(f"{8 * GIB}\n", "150000\n")))
    assert limits == Limits(memory_bytes=8 * GIB, free_bytes=4 * GIB, cpus=1.5)


def test_v1_without_a_limit(box):
    assert read_limits(box(v1("9223372036854771712\n"))) == Limits()


@pytest.mark.parametrize(
    ("quota", "n_cores"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)],
)
def test_cpu_quota_is_rounded_up(box, quota, n_cores):
    root = box(v2("/box", box={"cpu.max": quota + "\n"}))
    assert read_host(root, KERNEL).n_cores == n_cores


def test_hyperthreads_of_one_core_count_once_and_only_allowed_cpus(box):
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {topology.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}
    root = box(siblings)
    assert read_host(root, KERNEL).n_cores == 4
    pinned = Kernel(64 * GIB, 40 * GIB, frozenset({0, 4, 1}), 4)
    assert read_host(root, pinned).n_cores == 2


def test_garbage_in_the_files_is_no_limit(box):
    files = v2("/box", box={"memory.max": "lots\n", "memory.current": "", "cpu.max": "1 0\n"})
    assert read_limits(box(files)) == Limits()


def test_this_machine_has_memory_and_a_core():
    host = read_host()
    assert 0 < host.free_bytes <= host.total_bytes
    assert host.n_cores >= 1


def test_a_process_is_known_by_pid_and_start(box):
    started_at = process_started_at(os.getpid())
    assert started_at is not None
    assert process_alive(os.getpid(), started_at)
    assert not process_alive(os.getpid(), started_at - 1)
    assert process_rss(os.getpid()) > 0


def test_an_ended_process_is_gone_even_before_it_is_reaped():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started_at = process_started_at(child.pid)
        assert process_alive(child.pid, started_at)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_started_at(child.pid) is None
        assert not process_alive(child.pid, started_at)
    assert process_rss(child.pid) is None


def test_a_process_name_may_hold_brackets(box):
    fields = "S " + " ".join(["0"] * 18) + " 123400 0 0"
    root = box({"proc/7/stat": f"7 (a) b (c) {fields}"})
    assert process_started_at(7, root) == 123400 / os.sysconf("SC_CLK_TCK")
