"""What the installed llama.cpp build can do, asked of a short-lived process and remembered.

The daemon must not load the library itself: with CUDA that alone takes GPU memory.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvserve.core.machine import Build
from kvserve.core.support import parse_fa_quants
from kvserve.errors import WorkerFailed
from kvserve.supervisor.exits import Exit
from kvserve.whole_file import replace_file

PROBE_ARGV = (sys.executable, "-m", "kvserve.worker.probe")
_TIMEOUT_SECONDS = 60


def read_build(cache: Path, argv: Sequence[str] = PROBE_ARGV) -> Build:
    """Ask the build, or the file `cache` where its libraries have not changed since.

    Raises WorkerFailed, with the way to mend it, where the library cannot be loaded.
    """
    mark = _libraries()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text())
        if known["libraries"] == mark:
            return _build(known["version"], known["system_info"])
    version, system_info = ask_build(argv)
    with contextlib.suppress(OSError):
        known = {"libraries": mark, "version": version, "system_info": system_info}
        replace_file(cache, json.dumps(known).encode())
    return _build(version, system_info)


def ask_build(argv: Sequence[str] = PROBE_ARGV) -> tuple[str, str]:
    """The version and llama.cpp's words about itself, asked now. Raises WorkerFailed."""
    answer = _ask(argv)
    return str(answer["version"]), str(answer["system_info"])


def library_mark() -> str:
    """A short text that changes whenever llama.cpp's libraries do."""
    return hashlib.sha256(repr(_libraries()).encode()).hexdigest()[:16]


def _build(version: str, system_info: str) -> Build:
    return Build(
        version=version, cuda="CUDA :" in system_info, kv_pairs=parse_fa_quants(system_info)
    )


def _ask(argv: Sequence[str]) -> dict[str, object]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            argv, env=environment, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise WorkerFailed(
            f"llama-cpp-python could not be asked for its features: {error}"
        ) from error
    if not isinstance(answer, dict):
        words = done.stderr.decode(errors="replace").strip()
        end = Exit(done.returncode, words)
        reason = words.splitlines()[-1] if words else end.cause
        if "kvserve" in reason:
            raise WorkerFailed(f"kvserve is not installed whole ({reason}): install it again")
        raise WorkerFailed(
            f"llama-cpp-python cannot be loaded ({reason}): install it with "
            "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-binary llama-cpp-python "
            "--force-reinstall llama-cpp-python"
        )
    return answer


def _libraries() -> list[list[object]]:
    """Name, size and time of each llama.cpp library that a worker would load."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder is None:
        spec = importlib.util.find_spec("llama_cpp")
        folder = str(Path(spec.origin).parent / "lib") if spec and spec.origin else ""
    found: list[list[object]] = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            facts = path.stat()
            found.append([str(path), facts.st_size, facts.st_mtime_ns])
    return found
