"""What a running daemon leaves for the other commands: who it is, where it listens, the admin
token. One file for each port in the state directory, readable by its owner alone."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from kvserve.device.host import process_alive
from kvserve.errors import UsageError
from kvserve.whole_file import replace_file


@dataclass(frozen=True, slots=True)
class Instance:
    """A daemon. `process_started_at` (seconds since boot) tells it from a later process with the
    same id."""

    pid: int
    process_started_at: float
    url: str
    port: int
    model: str
    admin_token: str

    @property
    def alive(self) -> bool:
        """Whether that very process runs."""
        return process_alive(self.pid, self.process_started_at)


@dataclass(frozen=True, slots=True)
class InstancePaths:
    """The files of the daemon on one port."""

    state_dir: Path
    port: int

    @property
    def record(self) -> Path:
        """The instance's own file."""
        return self.state_dir / f"{self.port}.json"

    @property
    def log(self) -> Path:
        """The daemon's log, JSON lines."""
        return self.state_dir / f"{self.port}.log"

    @property
    def worker_log(self) -> Path:
        """Standard error of its workers, llama.cpp's warnings included."""
        return self.state_dir / f"{self.port}-worker.log"

    @property
    def passing(self) -> Path:
        """An empty file beside the logs of a daemon that took any free port."""
        return self.state_dir / f"{self.port}.passing"

    @property
    def logs(self) -> list[Path]:
        """All log files of this port that there are, old ones too."""
        names = (self.log.name, self.worker_log.name, self.output.name)
        return [path for name in names for path in self.state_dir.glob(f"{name}*")]

    @property
    def output(self) -> Path:
        """Standard output and error of a detached daemon."""
        return self.state_dir / f"{self.port}-output.log"


def make_state_dir(state_dir: Path) -> None:
    """Create the state directory, closed to others. Raises UsageError where that is impossible."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(
            f"--state-dir {state_dir} cannot be used ({error.strerror}): name a directory that "
            "you may write to",
            param="state_dir",
        ) from error
    if not os.access(state_dir, os.W_OK | os.X_OK):
        raise UsageError(
            f"--state-dir {state_dir} is not writable: name another one", param="state_dir"
        )


def write_instance(paths: InstancePaths, instance: Instance) -> None:
    """Leave the record, whole or not at all. Raises UsageError where the disk takes none."""
    try:
        replace_file(paths.record, json.dumps(asdict(instance)).encode(), 0o600)
    except OSError as error:
        raise UsageError(
            f"--state-dir {paths.record.parent} cannot be written to ({error.strerror}): make room "
            "there, or name another directory",
            param="state_dir",
        ) from error


def remove_instance(paths: InstancePaths, pid: int) -> None:
    """Take the record away, unless it is another daemon's by now."""
    found = _read(paths.record)
    if found is not None and found.pid == pid:
        paths.record.unlink(missing_ok=True)


def keep_few_passing(paths: InstancePaths, *, passing: bool, keep: int = 3) -> None:
    """Note whether the daemon of `paths` took any free port. Those that did leave their logs under
    another number each time: of those that run no more, the logs of the latest `keep` stay, and the
    record of none, which one that was killed leaves."""
    with contextlib.suppress(OSError):
        if not passing:
            paths.passing.unlink(missing_ok=True)
            return
        running = {instance.port for instance in running_instances(paths.state_dir)} | {paths.port}
        found = [path for path in paths.state_dir.glob("*.passing") if path.stem.isdecimal()]
        gone = [path for path in found if int(path.stem) not in running]
        gone.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for marker in gone:
            InstancePaths(paths.state_dir, int(marker.stem)).record.unlink(missing_ok=True)
        for marker in gone[keep:]:
            for log in InstancePaths(paths.state_dir, int(marker.stem)).logs:
                log.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
        paths.passing.touch(mode=0o600)


def find_instance(state_dir: Path, port: int | None) -> Instance:
    """The running daemon on `port`, or the only one there is.

    Raises UsageError that says what runs instead.
    """
    running = running_instances(state_dir)
    if port is not None:
        for instance in running:
            if instance.port == port:
                return instance
        others = ", ".join(str(i.port) for i in running)
        hint = f"; kvserve runs on {others}" if running else "; start it with `kvserve start`"
        raise UsageError(f"no kvserve runs on port {port}{hint}", param="port")
    if not running:
        raise UsageError("no kvserve runs here; start it with `kvserve start`", param="port")
    if len(running) > 1:
        ports = ", ".join(str(i.port) for i in running)
        raise UsageError(f"several kvserve run, on {ports}: add --port", param="port")
    return running[0]


def running_instances(state_dir: Path) -> list[Instance]:
    """All daemons that run, by port."""
    found = [_read(path) for path in state_dir.glob("*.json")] if state_dir.is_dir() else []
    running = [instance for instance in found if instance is not None and instance.alive]
    return sorted(running, key=lambda instance: instance.port)


def _read(path: Path) -> Instance | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Instance(**json.loads(path.read_text()))
    return None
