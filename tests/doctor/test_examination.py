"""The facts of a real machine, and of one that a folder plays; the command as a process."""

import json
import os
import socket
import subprocess
import sys

from kvserve.device.hardware import Processor, count_nvidia_cards, process_name, read_processor
from kvserve.doctor.examination import examine
from kvserve.settings import load_settings


def test_a_processor(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: X\nflags\t\t: avx2 hypervisor amx_tile\n\nflags\t: other\n"
    )
    found = read_processor(tmp_path)
    assert found.features == {"avx2", "hypervisor", "amx_tile"}
    assert found.virtual
    assert read_processor(tmp_path / "nowhere") == Processor(frozenset())


def test_cards_on_the_bus(tmp_path):
    devices = {
        "a": ("0x10de", "0x030000"),
        "b": ("0x10de", "0x030200"),
        "sound": ("0x10de", "0x040300"),
        "other": ("0x1002", "0x030000"),
    }
    for name, (vendor, kind) in devices.items():
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    (tmp_path / "sys/bus/pci/devices/broken").mkdir()
    assert count_nvidia_cards(tmp_path) == 2
    assert count_nvidia_cards(tmp_path / "nowhere") == 0


def test_names_of_processes():
    assert process_name(os.getpid())
    assert process_name(2**22 + 1) is None


def test_the_facts_of_this_machine(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = load_settings({"state_dir": str(tmp_path), "port": str(port)}, environ={})
        facts = examine(settings, None, {"KVSERVE_CTXX": "1"})
    assert facts.port.error is not None
    assert facts.library.error is None
    assert "CPU :" in facts.library.system_info
    assert facts.kernel.memfd_error is None
    assert facts.host.total_bytes <= facts.n_host_bytes
    assert "KVSERVE_CTX" in facts.unknown_variables[0]
    assert facts.state_dir_error is None


def doctor(tmp_path, *arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "kvserve", "doctor", "--state-dir", str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "KVSERVE_CONFIG": "", **environ},
    )


def test_the_command_tells_of_a_problem_and_exits_with_1(tmp_path):
    run = doctor(tmp_path, "--model", "/nowhere.gguf", "--port", "0", "--json")
    document = json.loads(run.stdout)
    (found,) = [f for f in document["findings"] if f["check"] == "model"]
    assert found["level"] == "problem"
    assert "/nowhere.gguf" in found["what"]
    assert document["problems"] >= 1
    assert run.returncode == 1


def test_the_command_as_text(tmp_path):
    run = doctor(tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert run.returncode == 1
    assert "problem  address: " in run.stdout
    assert "\n         do:  set KVSERVE_API_KEY" in run.stdout
