"""What the short commands and processes leave alone: each of these costs more than a plan does."""

import subprocess
import sys

import pytest

PLAN = "import kvserve.cli.app, kvserve.cli.planning"
LEAN = "from kvserve.worker import lean; lean.stand_in(); import llama_cpp.llama_cpp"


@pytest.mark.parametrize(
    ("program", "heavy"),
    [
        (PLAN, {"asyncio", "structlog", "rich", "numpy", "fastapi", "uvicorn", "llama_cpp"}),
        (LEAN, {"numpy", "jinja2", "diskcache", "llama_cpp.llama"}),
    ],
)
def test_a_short_process_imports_nothing_heavy(program: str, heavy: set[str]) -> None:
    program += f"; import sys; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == []


def test_the_stand_in_knows_the_version() -> None:
    program = f"{LEAN}; import llama_cpp; print(llama_cpp.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    real = "import llama_cpp; print(llama_cpp.__version__)"
    assert done.stdout == subprocess.check_output([sys.executable, "-c", real])
