"""Memory files that a thread makes ready while the engine still decodes."""

import sys
import threading
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from kvserve.worker.carry.memory_file import Blank

Key = TypeVar("Key", bound=Hashable)


class Blanks(Generic[Key]):
    """A file for each of `sizes`, in bytes, as long as the kernel gives memory."""

    def __init__(self, sizes: Mapping[Key, int]) -> None:
        self._sizes = sizes
        self._files: dict[Key, Blank] = {}
        self._thread = threading.Thread(target=self._make, name="blanks", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return not self._thread.is_alive()

    def take(self, key: Key) -> Blank | None:
        """A file; None where there is none. Waits until `ready`."""
        self._thread.join()
        return self._files.pop(key, None)

    def close(self) -> None:
        """Give back what was not taken."""
        self._thread.join()
        for blank in self._files.values():
            blank.close()
        self._files.clear()

    def _make(self) -> None:
        for key, n_bytes in self._sizes.items():
            try:
                self._files[key] = Blank(n_bytes)
            except OSError as error:
                print(f"no memory ahead: {error}", file=sys.stderr, flush=True)
                return
