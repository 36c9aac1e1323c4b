"""The unit that `kvserve service install` writes, and what it tells systemd."""

import configparser
import shutil
import subprocess
import sys

import pytest

from kvserve.cli.services import NAME, closed_to_others, install, uninstall
from kvserve.cli.unit import unit_text
from kvserve.errors import UsageError


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('model = "demo"\n')
    return path


@pytest.fixture
def told():
    return []


@pytest.mark.parametrize("user", [False, True])
def test_install_and_uninstall(tmp_path, config, told, capsys, user):
    units = tmp_path / "units"
    install(config, user=user, show=False, units=units, tell=told.append)
    text = (units / NAME).read_text()
    assert f"ExecStart={sys.executable} -m kvserve start --config {config}\n" in text
    uninstall(user=user, units=units, tell=told.append)
    assert not (units / NAME).exists()
    scope = ["--user"] if user else []
    assert told == [
        [*scope, "daemon-reload"],
        [*scope, "disable", "--now", NAME],
        [*scope, "daemon-reload"],
    ]
    assert "enable --now kvserve" in capsys.readouterr().out
    with pytest.raises(UsageError, match="not installed"):
        uninstall(user=user, units=units, tell=told.append)


def test_show_writes_nothing_and_says_where_it_would_go(tmp_path, config, capsys):
    units = tmp_path / "units"
    install(config, user=False, show=True, units=units)
    shown = capsys.readouterr()
    assert shown.out == unit_text(
        [sys.executable, "-m", "kvserve", "start", "--config", str(config)], user=False
    )
    assert shown.err == f"note     not written: without --show it goes to {units / NAME}\n"
    assert not units.exists()


def test_a_place_that_cannot_be_written_to_hints_at_what_can(tmp_path, config):
    units = tmp_path / "units"
    units.touch()
    with pytest.raises(UsageError, match="--user for a service of your own, or --show"):
        install(config, user=False, show=False, units=units)


def test_files_that_the_services_user_cannot_reach(tmp_path):
    root = tmp_path.resolve()
    root.chmod(0o755)
    folder = root / "home"
    folder.mkdir(mode=0o755)
    file = folder / "model.gguf"
    file.touch(mode=0o644)
    (tmp_path / "link").symlink_to(file)
    assert closed_to_others(file, root) is None
    file.chmod(0o640)
    assert closed_to_others(tmp_path / "link", root) == file
    folder.chmod(0o750)
    assert closed_to_others(file, root) == folder
    assert closed_to_others(tmp_path / "nowhere") is None


def test_the_system_service_tells_of_such_files(tmp_path, config, told, capsys):
    config.chmod(0o600)
    install(config, user=False, show=False, units=tmp_path / "units", tell=told.append)
    assert f"who needs {config}" in capsys.readouterr().out


def test_show_writes_nothing(tmp_path, config, told, capsys):
    install(config, user=False, show=True, units=tmp_path / "units", tell=told.append)
    assert capsys.readouterr().out.startswith("# Written by `kvserve service install`")
    assert told == []
    assert not (tmp_path / "units").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ctx = 4096", "no model"),
        ("ctxx = 4096", "ctxx"),
        ('model = "demo"\nhost = "0.0.0.0"', "KVSERVE_API_KEY"),
    ],
)
def test_settings_that_could_not_start_are_refused_now(tmp_path, config, told, text, says):
    config.write_text(text)
    with pytest.raises(UsageError, match=says):
        install(config, user=True, show=False, units=tmp_path, tell=told.append)
    assert not (tmp_path / NAME).exists()


def test_a_directory_that_cannot_be_written(tmp_path, config, told):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="add --user"):
        install(config, user=False, show=False, units=tmp_path / "file" / "x", tell=told.append)


def read(text):
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(text)
    return parser["Service"]


def test_what_the_daemon_relies_on():
    service = read(unit_text(["kvserve", "start"], user=False))
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert service["RestartPreventExitStatus"] == "2 3 4"
    assert service["StateDirectory"] == "kvserve"
    # psutil reads /proc/meminfo, and CUDA compiles kernels at run time.
    assert "ProcSubset" not in service
    assert "MemoryDenyWriteExecute" not in service
    assert "PrivateDevices" not in service


def test_a_users_unit_has_no_setting_that_needs_root():
    service = read(unit_text(["kvserve", "start"], user=True))
    assert not {"DynamicUser", "ProtectSystem", "SystemCallFilter", "DeviceAllow"} & set(service)


def test_percent_and_dollar_are_not_systemds():
    assert "ExecStart='/a%%b/$$c d'\n" in unit_text(["/a%b/$c d"], user=True)


def _systemd_can_judge():
    if shutil.which("systemd-analyze") is None:
        return False
    told = subprocess.run(
        ["systemd-analyze", "--help"], capture_output=True, text=True, check=False
    )
    return "--offline" in told.stdout


@pytest.mark.skipif(
    not _systemd_can_judge(), reason="needs systemd-analyze of systemd 250 or newer"
)
def test_systemd_finds_the_sandbox_tight(tmp_path):
    unit = tmp_path / NAME
    unit.write_text(unit_text([sys.executable, "-m", "kvserve", "start"], user=False))
    subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        check=True,
        capture_output=True,
    )
