"""`kvserve start`: decide, say so, load with progress, serve; in the foreground or detached."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

import platformdirs
import typer

from kvserve.cli.models import open_draft, open_model
from kvserve.cli.tables import plan_text
from kvserve.daemon import Listening, introduce, run
from kvserve.errors import KvserveError, WorkerFailed
from kvserve.instance import InstancePaths, make_state_dir
from kvserve.listening import check_host, take_port
from kvserve.logs import configure_logs, open_private
from kvserve.settings import Settings, environment_warnings, load_settings
from kvserve.supervisor.preparing import Prepared, prepare
from kvserve.supervisor.status import Status

DEFAULT_PORT = Settings.model_fields["port"].default


class Teller(Protocol):
    """Where the start's story goes: a terminal, or the process that waits for a detached one."""

    def say(self, text: str) -> None:
        """Text for the user."""
        ...

    def progress(self, status: Status) -> None:
        """How far the load is; called several times a second."""
        ...

    def done(self) -> None:
        """The story is over: the daemon serves."""
        ...


class TerminalTeller:
    """Prints; the progress is one line rewritten on a terminal, four lines elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._told = -1

    def say(self, text: str) -> None:
        """Print text."""
        if self._live and self._told >= 0:
            self._out.write("\r\033[K")
        print(text, file=self._out, flush=True)

    def progress(self, status: Status) -> None:
        """Print the share of the weights that is loaded."""
        percent = round(100 * (status.load_fraction or 0.0))
        step = percent if self._live else percent // 25 * 25
        if step == self._told or status.load_fraction is None:
            return
        self._told = step
        text = f"loading  {step:3d} %"
        if self._live:
            self._out.write(f"\r\033[K{text}")
        else:
            self._out.write(f"{text}\n")
        self._out.flush()

    def done(self) -> None:
        """Nothing to close: the terminal stays with the daemon."""


class PipeTeller:
    """Sends each text as a JSON line to the process that started this one."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w")

    def say(self, text: str) -> None:
        """Send text."""
        self._send({"say": text})

    def progress(self, status: Status) -> None:
        """Send the share of the weights that is loaded."""
        if status.load_fraction is not None:
            self._send({"percent": round(100 * status.load_fraction)})

    def fail(self, error: KvserveError) -> None:
        """Send the error that ends the start."""
        self._send({"error": error.message, "exit_code": error.exit_code})

    def done(self) -> None:
        """Tell that the daemon serves, and close."""
        self._send({"ready": True})
        self._pipe.close()

    def _send(self, line: dict[str, object]) -> None:
        # Whoever waited may be gone; the daemon goes on.
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(json.dumps(line), file=self._pipe, flush=True)


@dataclass(frozen=True, slots=True)
class StartOptions:
    """How `start` runs, beside the settings."""

    config: Path | None
    detach: bool
    tell_fd: int | None


def start(flags: Mapping[str, object], options: StartOptions) -> None:
    """Start the daemon. Returns when it ends, or with `--detach` when it serves."""
    settings = load_settings(flags, config=options.config)
    check_host(settings.host)
    settings.check_exposure()
    make_state_dir(settings.state_dir)
    if options.detach:
        _start_detached(settings)
        return
    if options.tell_fd is None:
        _start_here(settings, TerminalTeller(sys.stdout))
        return
    teller = PipeTeller(options.tell_fd)
    try:
        _start_here(settings, teller)
    except KvserveError as error:
        teller.fail(error)
        raise


def _start_here(settings: Settings, teller: Teller) -> None:
    for warning in environment_warnings(os.environ):
        teller.say(f"note     {warning}")
    if settings.vram_free is not None:
        teller.say("note     vram_free is for `kvserve plan` alone: start plans with what is free")
    # Before the plan, which takes seconds; who connects meanwhile waits.
    sock = take_port(settings.host, settings.port)
    model = open_model(settings)
    draft = open_draft(settings)
    prepared = prepare(settings, model.file, model.id, draft=draft, confirm=True, ahead=True)
    listening = introduce(prepared, sock)
    configure_logs(
        level=settings.log_level,
        form=settings.log_format,
        file=listening.paths.log,
        secrets=[*settings.api_keys, *settings.admin_keys, listening.instance.admin_token],
    )
    teller.say(plan_text(prepared.plan, prepared.known))
    teller.say("")

    def on_ready(status: Status) -> None:
        teller.say(_ready_text(prepared, listening, status))
        teller.done()

    run(prepared, listening, on_progress=teller.progress, on_ready=on_ready)


def _ready_text(prepared: Prepared, listening: Listening, status: Status) -> str:
    instance = listening.instance
    launch = prepared.plan.chosen.launch
    key = '-H "Authorization: Bearer $KVSERVE_API_KEY" ' if prepared.settings.api_keys else ""
    lines = [
        f"serving  {instance.model} at {instance.url}/v1, {launch.n_ctx} tokens of {launch.pair}",
        f"ask      curl {instance.url}/v1/completions {key}-H 'Content-Type: application/json' "
        '-d \'{"prompt": "The capital of France is", "max_tokens": 16}\'',
    ]
    if status.template and status.template != "model":
        lines.insert(1, f"template {status.template}: the model file has none of its own")
    return "\n".join(lines)


def _start_detached(settings: Settings) -> None:
    """Start the same command in a session of its own, tell its story, return when it serves."""
    read_end, write_end = os.pipe()
    output = InstancePaths(settings.state_dir, settings.port).output
    arguments = [a for a in sys.argv[1:] if a != "--detach"]
    with open_private(output) as log:
        child = subprocess.Popen(  # noqa: S603 - our own command line
            [sys.executable, "-m", "kvserve", *arguments, "--tell-fd", str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write_end,),
            start_new_session=True,
        )
    os.close(write_end)
    terminal = TerminalTeller(sys.stdout)
    with os.fdopen(read_end) as story:
        if _retell(story, terminal.say):
            where = f" --port {settings.port}" if settings.port != DEFAULT_PORT else ""
            if settings.state_dir != platformdirs.user_state_path("kvserve"):
                where += f" --state-dir {shlex.quote(str(settings.state_dir))}"
            commands = ", ".join(f"`kvserve {name}{where}`" for name in ("status", "logs", "stop"))
            print(f"detached pid {child.pid}; {commands}")
            return
    code = child.wait()
    raise WorkerFailed(f"the detached daemon ended with status {code}: see {output}")


def _retell(story: TextIO, say: Callable[[str], None]) -> bool:
    """Print the lines of a starting daemon; True when it serves, exit where it failed."""
    told = -1
    for line in story:
        event = json.loads(line)
        if "say" in event:
            say(event["say"])
        elif "percent" in event and event["percent"] // 25 != told:
            told = event["percent"] // 25
            say(f"loading  {told * 25:3d} %")
        elif "error" in event:
            print(f"kvserve: {event['error']}", file=sys.stderr)
            raise typer.Exit(event["exit_code"])
        elif "ready" in event:
            return True
    return False
