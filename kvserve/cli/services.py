"""`kvserve service install|uninstall`: a systemd unit that starts the daemon with the machine."""

import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import platformdirs

from kvserve.cli.unit import unit_text
from kvserve.errors import UsageError
from kvserve.settings import load_settings

NAME = "kvserve.service"
SYSTEM_UNITS = Path("/etc/systemd/system")
SYSTEM_CONFIG = Path("/etc/kvserve/config.toml")
SYSTEM_ENVIRONMENT = Path("/etc/kvserve/environment")
_RUNNING = Path("/run/systemd/system")


class Systemctl(Protocol):
    """Runs systemctl with arguments."""

    def __call__(self, arguments: Sequence[str]) -> None:
        """Raises UsageError where systemctl refuses."""
        ...


def systemctl(arguments: Sequence[str]) -> None:
    """Run it, where systemd is what started this machine; elsewhere nothing is there to tell."""
    if not _RUNNING.is_dir():
        return
    command = ["systemctl", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise UsageError(f"systemctl cannot be run: {error}") from error
    if done.returncode:
        words = done.stderr.strip() or f"status {done.returncode}"
        raise UsageError(f"`{' '.join(command)}` failed: {words}")


def install(
    config: Path | None,
    *,
    user: bool,
    show: bool,
    units: Path | None = None,
    tell: Systemctl = systemctl,
) -> None:
    """Write the unit for a settings file, after checking that file; with `show` print it only.

    Raises UsageError where the settings or the directory cannot be used.
    """
    path = (config or _default_config(user=user)).expanduser().absolute()
    settings = load_settings({}, config=path, environ={})
    if user or not SYSTEM_ENVIRONMENT.is_file():  # it may hold the key
        settings.check_exposure()
    if settings.model is None:
        raise UsageError(f'{path}: no model: write model = "/path/of/model.gguf"', param="model")
    command = [sys.executable, "-m", "kvserve", "start", "--config", str(path)]
    text = unit_text(command, user=user)
    place = (units or _units(user=user)) / NAME
    if show:
        print(text, end="")
        print(f"note     not written: without --show it goes to {place}", file=sys.stderr)
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    except OSError as error:
        raise UsageError(
            f"{place} cannot be written ({error.strerror}): run this as root, add --user for "
            "a service of your own, or --show to see the unit"
        ) from error
    scope = ["--user"] if user else []
    tell([*scope, "daemon-reload"])
    shown = " ".join(["systemctl", *scope, "enable --now kvserve"])
    print(f"written  {place}\nstart    {shown}")
    if not user:
        for needed in (Path(sys.executable), path, Path(settings.model).expanduser()):
            closed = closed_to_others(needed)
            if closed is not None:
                print(
                    f"note     {closed} is closed to the service's own user, who needs {needed}: "
                    f"chmod o+{'x' if closed.is_dir() else 'r'} {closed}, or move it"
                )


def closed_to_others(path: Path, below: Path = Path("/")) -> Path | None:
    """The outermost folder on the way to `path`, or the file itself, that only its owner and
    group may enter or read; None where everybody may, or where there is no such file. Folders that
    are not `below` are not looked at."""
    try:
        real = path.resolve(strict=True)
        for folder in reversed(real.parents):
            if folder.is_relative_to(below) and not folder.stat().st_mode & stat.S_IXOTH:
                return folder
        return None if real.stat().st_mode & stat.S_IROTH else real
    except OSError:
        return None


def uninstall(*, user: bool, units: Path | None = None, tell: Systemctl = systemctl) -> None:
    """End the service and take its unit away; settings and state stay."""
    place = (units or _units(user=user)) / NAME
    if not place.is_file():
        raise UsageError(f"there is no {place}: it is not installed" + ("" if user else " here"))
    scope = ["--user"] if user else []
    tell([*scope, "disable", "--now", NAME])
    try:
        place.unlink()
    except OSError as error:
        raise UsageError(f"{place} cannot be removed ({error.strerror}): run this as root") from (
            error
        )
    tell([*scope, "daemon-reload"])
    print(f"removed  {place}")


def _units(*, user: bool) -> Path:
    return platformdirs.user_config_path("systemd") / "user" if user else SYSTEM_UNITS


def _default_config(*, user: bool) -> Path:
    return platformdirs.user_config_path("kvserve") / "config.toml" if user else SYSTEM_CONFIG
