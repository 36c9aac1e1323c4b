"""Commands that talk to a running daemon: status, reload, stop, logs."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from kvserve.cli.statuses import reload_text, status_text
from kvserve.core.lifecycle import Phase
from kvserve.errors import KvserveError, UsageError, WorkerFailed, revive
from kvserve.instance import Instance, InstancePaths, find_instance, remove_instance
from kvserve.settings import load_settings

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05
_RELOAD_TIMEOUT_SECONDS = 1800.0
_TAIL_LINES = 200


def show_status(port: str | None, state_dir: str | None, *, as_json: bool) -> None:
    """Print the state of the daemon."""
    instance = chosen(port, state_dir)
    document = _call(instance, "GET", "/admin/status")
    print(json.dumps(document, indent=2) if as_json else status_text(document, instance.url))


def reload(ctx: str, port: str | None, state_dir: str | None, *, as_json: bool) -> None:
    """Ask for another context and wait for the outcome."""
    instance = chosen(port, state_dir)
    n_ctx = load_settings({"ctx": ctx}, environ={}).ctx
    if not as_json:
        threading.Thread(target=_tell_progress, args=(instance,), daemon=True).start()
    document = _call(
        instance, "POST", "/admin/context", {"n_ctx": n_ctx}, timeout=_RELOAD_TIMEOUT_SECONDS
    )
    print(json.dumps(document, indent=2) if as_json else reload_text(document))


def _tell_progress(instance: Instance) -> None:
    """Print the phases that the daemon goes through, as long as it tells them."""
    headers = {"authorization": f"Bearer {instance.admin_token}"}
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.Client(trust_env=False, timeout=30.0) as client,
        client.stream("GET", f"{instance.url}/admin/events", headers=headers) as response,
    ):
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("event") == "phase":
                seconds = f"{event['previous']} took {event['seconds']:.1f} s"
                told = "" if event["previous"] == Phase.SERVING else f"  ({seconds})"
                print(f"         {event['phase']}{told}", flush=True)


def stop(port: str | None, state_dir: str | None) -> None:
    """End the daemon: first politely, after 10 s by force."""
    instance = chosen(port, state_dir)
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(instance.pid, signal.SIGTERM)
    while instance.alive:
        if time.monotonic() - began > _STOP_SECONDS:
            # Its workers die with it: they are told to by the kernel.
            with contextlib.suppress(ProcessLookupError):
                os.kill(instance.pid, signal.SIGKILL)
            directory, _ = _place(port, state_dir)
            remove_instance(InstancePaths(directory, instance.port), instance.pid)
            print(f"killed   pid {instance.pid}: it did not end within {_STOP_SECONDS:.0f} s")
            return
        time.sleep(_POLL_SECONDS)
    print(f"stopped  pid {instance.pid} in {time.monotonic() - began:.1f} s")


def show_logs(port: str | None, state_dir: str | None, *, worker: bool, follow: bool) -> None:
    """Print the end of the daemon's or its worker's log, and with `follow` what is added."""
    directory, number = _place(port, state_dir)
    try:
        number = find_instance(directory, number).port
    except UsageError as error:
        if number is None:
            ended = _ended(directory)
            if not ended or error.message.startswith("several"):
                raise
            raise UsageError(
                f"no kvserve runs here; logs of some that ended are there: add --port {ended}",
                param="port",
            ) from error
        # else the log of a daemon that has ended
    paths = InstancePaths(directory, number)
    path = paths.worker_log if worker else paths.log
    if not path.is_file():
        raise UsageError(f"there is no log at {path}", param="port")
    for line in _lines(path, follow=follow):
        print(line if worker else _readable(line), flush=follow)


def _ended(directory: Path) -> str:
    """Ports that have a log, the latest first, as `8000 or 8080`; empty where none has."""
    logs = [path for path in directory.glob("*.log") if path.stem.isdecimal()]
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return " or ".join(path.stem for path in logs[:3])


def _lines(path: Path, *, follow: bool) -> Iterator[str]:
    with path.open(errors="replace") as log:
        yield from (line.rstrip("\n") for line in log.readlines()[-_TAIL_LINES:])
        while follow:
            line = log.readline()
            if line:
                yield line.rstrip("\n")
            else:
                time.sleep(0.2)


def _readable(line: str) -> str:
    try:
        event = json.loads(line)
    except ValueError:
        return line
    head = [str(event.pop(key, "")) for key in ("timestamp", "level", "event")]
    event.pop("logger", None)
    facts = " ".join(f"{key}={value}" for key, value in event.items())
    return f"{head[0]} {head[1]:<7} {head[2]} {facts}".rstrip()


def chosen(
    port: str | None, state_dir: str | None, environ: Mapping[str, str] | None = None
) -> Instance:
    """The daemon on that port, else on the port that `start` would take by environment and file;
    where neither names one, the only daemon there is. Raises UsageError."""
    directory, number = _place(port, state_dir, environ)
    return find_instance(directory, number)


def _place(
    port: str | None, state_dir: str | None, environ: Mapping[str, str] | None = None
) -> tuple[Path, int | None]:
    settings = load_settings({"port": port, "state_dir": state_dir}, environ=environ)
    named = "port" in settings.model_fields_set and settings.port != 0
    return settings.state_dir, settings.port if named else None


def _call(
    instance: Instance,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    timeout: float = 30.0,
) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {instance.admin_token}"}
    try:
        # Proxies of the environment are for other hosts than this one.
        with httpx.Client(trust_env=False, timeout=timeout) as client:
            response = client.request(method, instance.url + path, json=body, headers=headers)
        document: dict[str, Any] = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise WorkerFailed(
            f"the daemon at {instance.url} does not answer ({type(error).__name__}): "
            f"see `kvserve logs --port {instance.port}`"
        ) from error
    if response.is_error:
        raise _error_of(document)
    return document


def _error_of(document: dict[str, Any]) -> KvserveError:
    told = document.get("error", {})
    return revive(
        str(told.get("code")),
        str(told.get("message", document)),
        param=told.get("param"),
        options=tuple(told.get("options", ())),
    )
