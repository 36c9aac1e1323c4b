"""What the daemon tells the API when it wires it up."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvserve.core.plan import Task
from kvserve.units import MIB

ANY_MODEL = "default"
"""The name under which the served model answers whatever it is called."""


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The API's settings, fixed for the daemon's life.

    `aliases` are further names of the model (its file's stem); "default" is always one. Without
    `api_keys` everything is open, so the daemon allows that on a loopback address only.
    `admin_keys` open `/admin/*` in place of the API keys. `admin_token` opens it too, for the CLI
    on the same machine. `local_only` is for a server bound to a loopback address: requests that a
    web page could have sent are refused. A body may pause for `body_seconds`. `reasoning_format`
    "none" leaves reasoning in the text. `created` and `clock` are in seconds since the epoch.
    """

    model_id: str
    created: int
    aliases: frozenset[str] = frozenset()
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    admin_token: str | None = None
    local_only: bool = True
    max_body_bytes: int = 16 * MIB
    ping_seconds: float = 5.0
    body_seconds: float = 30.0
    reasoning_format: str = "auto"
    clock: Callable[[], float] = time.time

    def serves(self, name: str) -> bool:
        """Whether a request may call the model by this name, or by `NAME:TASK`."""
        names = {self.model_id, ANY_MODEL, *self.aliases}
        return name in names or (task_in(name) is not None and name.rpartition(":")[0] in names)


def task_in(name: str) -> Task | None:
    """The task that a model's name ends with, as in `qwen3-8b:math`."""
    tail = name.rpartition(":")[2]
    return Task(tail) if ":" in name and tail in set(Task) else None
