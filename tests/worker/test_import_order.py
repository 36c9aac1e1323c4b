"""llama_cpp comes before numpy in every process that loads a model: the other order ends a CUDA
build at its first load."""

import subprocess
import sys

import pytest

pytest.importorskip("llama_cpp")

GUARD = """
import sys, importlib.abc
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "numpy" and "llama_cpp.llama_cpp" not in sys.modules:
            sys.exit("numpy before llama_cpp")
sys.meta_path.insert(0, Guard())
"""
LOADING = {
    "kvserve.worker.__main__": "import kvserve.worker.session",
    "kvserve.worker.kernels": "from kvserve.ipc.messages import Load; load = Load('none', 'f16', "
    "'f16', 256, 1, 256, 256, 0, 0, True, 1, 1)\ntry: entry._time(load)\n"
    "except Exception as error: assert 'no model file' in str(error), error",
    "kvserve.worker.evaluate": "import kvserve.worker.evaluation",
    "kvserve.worker.measure": "import kvserve.worker.llama",
    "kvserve.worker.probe": "",
}


@pytest.mark.parametrize("module", LOADING)
def test_order(module: str) -> None:
    program = f"{GUARD}\nimport importlib\nentry = importlib.import_module({module!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", program + LOADING[module]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
