"""Compiles kvserve/worker/compiled/draws.c while kvserve is built or installed.

Without a C compiler kvserve is installed all the same, and draws tokens with NumPy. Read from the
environment: CC, CFLAGS.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "kvserve/worker/compiled/draws.c"
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared")
NEEDED = ("-fno-fast-math", "-ffp-contract=off")
"""Whatever CFLAGS says: the code tells infinities and NaNs apart, and draws alike everywhere."""


class CustomBuildHook(BuildHookInterface):
    def initialize(self, _version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        source = Path(self.root, SOURCE)
        library = source.with_suffix(".so")
        failure = compile_library(source, library)
        if failure is not None:
            with contextlib.suppress(OSError):
                library.unlink(missing_ok=True)
            self.app.display_warning(f"tokens will be drawn with NumPy: {failure}")
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root)}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().translate(str.maketrans("-.", "__"))
        build_data["tag"] = f"py3-none-{platform}"


def compile_library(source: Path, library: Path) -> str | None:
    """Compile with threads, or without where there is no OpenMP; returns why neither worked."""
    chosen = shlex.split(os.environ.get("CC", ""))
    compilers = [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]
    compiler = next((names for names in compilers if shutil.which(names[0])), None)
    if compiler is None:
        return "there is no C compiler"
    # Another name first: a kvserve that runs has the old library in use.
    fresh = library.with_suffix(f".{os.getpid()}.so")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    flags = [*FLAGS, *shlex.split(os.environ.get("CFLAGS", "")), *NEEDED]
    flags.append(f'-DKVSERVE_SOURCE="{digest}"')
    for threads in (["-fopenmp"], []):
        command = [*compiler, *flags, *threads, "-o", fresh, source, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            fresh.replace(library)
            return None
    fresh.unlink(missing_ok=True)
    return f"{shlex.join(compiler)} failed: {done.stderr.strip()[-500:]}"
