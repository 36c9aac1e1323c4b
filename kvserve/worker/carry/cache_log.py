"""Reads a context's state layout from what llama.cpp logs at its creation.

No C call tells types, head sizes and rotation of a cache; the constructors of llama_kv_cache,
llama_kv_cache_iswa and llama_memory_recurrent log them (llama.cpp src/).
"""

import re
from dataclasses import dataclass

from kvserve.core.dtypes import KvType
from kvserve.worker.carry.layout import (
    ROTATION_V,
    CacheLayout,
    StateLayout,
    key_rotation,
)

_CACHE = re.compile(
    r"llama_kv_cache: size = .*, +(?P<layers>\d+) layers,"
    r".* K \((?P<k>\w+)\): .* V \((?P<v>\w+)\): "
)
_ROTATION = re.compile(
    r"llama_kv_cache: attn_rot_(?P<half>[kv]) = (?P<on>[01]), n_embd_head_k_all = (?P<head>-?\d+)"
)
_SLIDING = re.compile(r"llama_kv_cache_iswa: creating (non-SWA| +SWA) KV cache")
_RECURRENT = re.compile(r"llama_memory_recurrent: size = ")
_OTHER = re.compile(r"creating .*(KV cache|state)|DSV4")


@dataclass(slots=True)
class _Cache:
    n_layer: int
    type_k: str
    type_v: str
    rotation: dict[str, tuple[bool, int]]


class CacheLog:
    """Collects the lines of one context's creation: `feed` takes the log piece by piece."""

    def __init__(self) -> None:
        self._partial = ""
        self._caches: list[_Cache] = []
        self._n_sliding = 0
        self._n_recurrent = 0
        self._known = True

    def feed(self, text: str) -> None:
        """Take a piece of the log; lines may come in parts."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._take_line(line)

    def layout(self, cell_ext_bytes: int) -> StateLayout | None:
        """The layout of the context's sequence states, None where it keeps its memory in a form
        whose state is not known here."""
        sliding = self._n_sliding == 2 and len(self._caches) == 2
        plain = self._n_sliding == 0 and len(self._caches) <= 1
        if not self._known or not (sliding or plain) or self._n_recurrent > 1:
            return None
        try:
            caches = tuple(_layout(cache) for cache in self._caches)
            return StateLayout(caches, self._n_recurrent == 1, cell_ext_bytes)
        except (KeyError, ValueError):
            return None

    def _take_line(self, line: str) -> None:
        if found := _CACHE.search(line):
            self._caches.append(_Cache(int(found["layers"]), found["k"], found["v"], {}))
        elif found := _ROTATION.search(line):
            if self._caches:
                self._caches[-1].rotation[found["half"]] = found["on"] == "1", int(found["head"])
        elif _SLIDING.search(line):
            self._n_sliding += 1
        elif _RECURRENT.search(line):
            self._n_recurrent += 1
        elif _OTHER.search(line):
            self._known = False


def _layout(cache: _Cache) -> CacheLayout:
    """Raises KeyError where a line is missing, ValueError for a type or rotation not known."""
    (k_rotated, head_k), (v_rotated, head_v) = cache.rotation["k"], cache.rotation["v"]
    latent = head_v == 0
    # An MLA cache logs a rotation of K, and its graph does not do it (llm_graph_context::build_attn
    # for llm_graph_input_attn_k).
    k_rotated = k_rotated and not latent
    return CacheLayout(
        n_layer=cache.n_layer,
        type_k=KvType(cache.type_k),
        type_v=None if latent else KvType(cache.type_v),
        head_k=head_k if head_k > 0 else None,
        head_v=head_v if head_v > 0 else None,
        rot_k=key_rotation(head_k) if k_rotated else None,
        rot_v=ROTATION_V if v_rotated else None,
    )
