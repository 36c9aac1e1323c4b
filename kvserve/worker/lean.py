"""llama_cpp's low-level bindings without the rest of that package, for processes of one question.

`import llama_cpp.llama_cpp` runs the package's `__init__` first, which imports its high-level
classes, and with them Jinja, NumPy and disk caches: half of such a process's time.
"""

import importlib.util
import sys
from types import ModuleType

from kvserve.worker.build import installed

_PACKAGE = "llama_cpp"


def stand_in() -> None:
    """Put an empty package of the same place in its place, before anything imports it. Does nothing
    where it is imported already or not installed: the import says that better."""
    if _PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return
    package = ModuleType(_PACKAGE)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    package.__dict__["__version__"] = installed()
    sys.modules[_PACKAGE] = package
