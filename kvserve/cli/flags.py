"""Command-line options made from the settings: same names, same descriptions, checked there.

Values stay text until `kvserve.settings` reads them, so that a wrong one is explained the same
way whether it came by flag, environment or file.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvserve.settings import Settings

SHARED = (
    "model",
    "ctx",
    "parallel",
    "cache_type",
    "kv_floor",
    "task",
    "max_kld",
    "min_top1",
    "device",
    "gpu_layers",
    "speculate",
    "draft_model",
    "draft_max",
    "reserve",
    "profile",
    "state_dir",
)
"""The settings that `start` and `plan` have in common."""

MEASURING = ("model", "device", "gpu_layers", "threads", "batch", "ubatch", "state_dir", "profile")
"""The settings that `eval` has."""

Port = Annotated[
    str | None,
    typer.Option("--port", "-p", metavar="N", help="Which daemon; else the settings' or only one."),
]
StateDir = Annotated[
    str | None, typer.Option("--state-dir", metavar="DIR", help="Where the daemon's records lie.")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SHORT = {"model": "-m", "ctx": "-c", "port": "-p"}
_SWITCHES = frozenset({"insecure"})
_REPEATED = frozenset({"api_key", "admin_key"})

Command = Callable[..., None]


def takes_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command that ends in `**given` an option for each named setting.

    An option that was not given arrives as None.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [_parameter(name) for name in names]
        command.__signature__ = signature.replace(parameters=[*options, *own])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    spellings = [flag, _SHORT[name]] if name in _SHORT else [flag]
    help_text = (Settings.model_fields[name].description or "").replace("`", "")
    kind: Any = str | None
    if name in _SWITCHES:
        kind = bool | None
    elif name in _REPEATED:
        kind = list[str] | None
    option = typer.Option(*spellings, help=help_text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )
