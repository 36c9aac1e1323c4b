"""The sizes of a context that was laid out and not allocated, by device, out of llama.cpp's log.

Without an allocation the lines `KV buffer size` say 0; the caches' own lines have the sum, and
the debug lines before them say which layer lies where (llama.cpp src/llama-kv-cache.cpp).
"""

import re
from collections import Counter

from kvserve.ipc.measuring import DeviceBuffers

_MIB = 2**20
_LAYER = re.compile(r"llama_kv_cache: layer +\d+: dev = (\S+)")
_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_BUFFER = re.compile(r"(\S+) +(RS|compute|output) buffer size = +([\d.]+) MiB")


class BufferLog:
    """Collects the log of one context's creation: `feed` takes it piece by piece."""

    def __init__(self) -> None:
        self._partial = ""
        self._layers: Counter[str] = Counter()
        self._kv: Counter[str] = Counter()
        self._others: dict[str, Counter[str]] = {"RS": Counter(), "output": Counter()}
        self._compute: dict[str, int] = {}

    def feed(self, text: str) -> None:
        """Take a piece of the log; lines may come in parts."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._take_line(line)

    def buffers(self) -> tuple[DeviceBuffers, ...]:
        """All devices that hold something, by name.

        The layers of one cache count as equal: where they are not, the sum is still right.
        """
        recurrent, output = self._others["RS"], self._others["output"]
        devices = {*self._kv, *recurrent, *output, *self._compute}
        return tuple(
            DeviceBuffers(
                device=device,
                kv_bytes=self._kv[device],
                recurrent_bytes=recurrent[device],
                compute_bytes=self._compute.get(device, 0),
                output_bytes=output[device],
            )
            for device in sorted(devices)
        )

    def _take_line(self, line: str) -> None:
        if found := _LAYER.search(line):
            self._layers[found[1]] += 1
        elif found := _CACHE.search(line):
            self._share_out(_bytes(found[1]))
        elif found := _BUFFER.search(line):
            device, kind, n_bytes = found[1], found[2], _bytes(found[3])
            if kind == "compute":
                # Reserved again, and logged again, when the graph changes; the last one stands.
                self._compute[device] = n_bytes
            else:
                self._others[kind][device] += n_bytes

    def _share_out(self, n_bytes: int) -> None:
        n_layers = sum(self._layers.values())
        for device, n in self._layers.items():
            self._kv[device] += n_bytes * n // n_layers
        self._layers.clear()


def _bytes(mib: str) -> int:
    return round(float(mib) * _MIB)
