"""`python -m kvserve.worker.probe`: one JSON line on what the installed llama.cpp can do.

Run with the GPUs hidden: the build's features are the same, and no CUDA context is taken.
"""

import json
import sys


def main() -> int:
    """Print the build's version and system info; status 1 and one line where it has none."""
    try:
        from kvserve.worker import llama  # noqa: PLC0415 - its failure is the finding
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    print(json.dumps({"version": llama.VERSION, "system_info": llama.system_info()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
