"""Prompt lookup: what followed the last tokens where the same tokens stood before (Saxena, 2023).

The index is that of LZ77 compressors: a hash table of the last place of each run of three tokens,
and a link from each place to the one before it with the same hash.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

N_MIN = 3
"""Fewer tokens in common say too little about the next one."""
N_MAX = 32
"""As far as a match is followed back; a longer one is not better."""
_MOST_TRIED = 8
"""Places that are compared at one lookup, the latest first."""
_MOST_BITS = 16
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_MASK = 0xFFFFFFFF
_FEW = 16
"""Places below which NumPy's calls cost more than they save."""


@dataclass(frozen=True, slots=True)
class Match:
    """The tokens before `position` are also the last ones, `length` of them (at most `N_MAX`)."""

    position: int
    length: int


class NgramIndex:
    """An index over `tokens`, an array that the caller fills from its beginning on.

    A token is indexed in constant time. Memory: 4 bytes for each place of the array, and a table
    of at most 256 KiB. Not thread-safe.
    """

    __slots__ = ("_bits", "_distance", "_heads", "_links", "_n_indexed", "_tokens")

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._bits = min(max(len(tokens).bit_length(), 8), _MOST_BITS)
        # A place is the index of the token that follows; 0 is none.
        self._heads = np.zeros(1 << self._bits, dtype=np.int32)
        self._links = np.empty(len(tokens) + 1, dtype=np.int32)
        self._n_indexed = 0
        self._distance = 0

    def find(self, n_tokens: int) -> Match | None:
        """Where the end of `tokens[:n_tokens]` stood before: of the latest places with the same
        hash the one with the longest match. `n_tokens` never falls."""
        if n_tokens <= N_MIN:
            return None
        self._extend(n_tokens)
        tokens = self._tokens
        recent = tokens[max(0, n_tokens - N_MAX) : n_tokens][::-1]
        best: Match | None = None
        place = int(self._heads[self._hash(n_tokens)])
        # Where the last match goes on, however often its tokens came since.
        candidates = [n_tokens - self._distance] if self._distance else []
        while place and len(candidates) < _MOST_TRIED:
            candidates.append(place)
            place = int(self._links[place])
        for candidate in candidates:
            if best is not None:
                further = candidate - best.length - 1
                if further < 0 or tokens[further] != recent[min(best.length, len(recent) - 1)]:
                    continue
            length = _n_common(tokens[max(0, candidate - N_MAX) : candidate][::-1], recent)
            if length >= N_MIN and (best is None or length > best.length):
                best = Match(candidate, length)
                if length >= len(recent):
                    break
        self._distance = n_tokens - best.position if best is not None else 0
        return best

    def following(self, match: Match, n_tokens: int, n_wanted: int) -> Tokens:
        """The `n_wanted` tokens that `match` foretells after `tokens[:n_tokens]`: what followed it,
        repeated where it ends with the text itself."""
        known = self._tokens[match.position : n_tokens]
        return np.resize(known, n_wanted) if len(known) < n_wanted else known[:n_wanted]

    def _extend(self, n_tokens: int) -> None:
        """Index the places of `tokens[:n_tokens]` that something follows."""
        begin, end = max(self._n_indexed, N_MIN), n_tokens
        if end - begin > _FEW:
            self._extend_at_once(begin, end)
        else:
            for place in range(begin, end):
                key = self._hash(place)
                self._links[place] = self._heads[key]
                self._heads[key] = place
        self._n_indexed = max(begin, end)

    def _extend_at_once(self, begin: int, end: int) -> None:
        """The same for many places with NumPy: 20 times faster."""
        places = np.arange(begin, end, dtype=np.int32)
        total = np.zeros(end - begin, dtype=np.uint32)
        for back, factor in enumerate(_FACTORS, start=1):
            total += self._tokens[begin - back : end - back].view(np.uint32) * np.uint32(factor)
        keys = total >> np.uint32(32 - self._bits)
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        first = np.ones(len(keys), dtype=np.bool_)
        first[1:] = keys[1:] != keys[:-1]
        before = np.roll(places, 1)
        self._links[places] = np.where(first, self._heads[keys], before)
        last = np.roll(first, -1)
        self._heads[keys[last]] = places[last]

    def _hash(self, place: int) -> int:
        total = 0
        for back, factor in enumerate(_FACTORS, start=1):
            total += int(self._tokens[place - back]) * factor
        return (total & _MASK) >> (32 - self._bits)


def _n_common(some: Tokens, other: Tokens) -> int:
    n = min(len(some), len(other))
    differs = some[:n] != other[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
