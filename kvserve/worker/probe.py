"""`python -m kvserve.worker.probe`: one JSON line on what the installed llama.cpp can do.

Run with the GPUs hidden: the build's features are the same, and no CUDA context is taken. It takes
the bindings as they are, without `worker.llama` and its NumPy: a first `kvserve plan` waits for it.
"""

import json
import sys

from kvserve.worker import build, lean


def main() -> int:
    """Print the build's version and system info; status 1 and one line where it has none."""
    lean.stand_in()
    try:
        import llama_cpp.llama_cpp as ll  # noqa: PLC0415 - its failure is the finding
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    system_info = ll.llama_print_system_info().decode("utf-8", "replace").strip()
    print(json.dumps({"version": build.installed(), "system_info": system_info}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
