"""The memory that a graph of tensors needs when ggml's allocator lays it out.

ggml gives each tensor a place in one buffer when it is computed and takes the place back after
its last use; a new tensor goes into the smallest hole that holds it, else to the end
(ggml/src/ggml-alloc.c). The buffer is as long as its end ever was, holes included, so the widest
moment of a graph says less than a replay of it: this is that replay.
"""

from dataclasses import dataclass, field

CPU_ALIGNMENT = 32
"""TENSOR_ALIGNMENT in ggml/src/ggml-impl.h."""
CUDA_ALIGNMENT = 128
"""ggml_backend_cuda_buffer_type_get_alignment."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A place in the graph; views are their source, as far as memory goes."""

    index: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Step:
    n_bytes: int
    sources: tuple[int, ...]
    in_place: bool
    is_input: bool
    kept: bool


@dataclass(slots=True)
class Graph:
    """Tensors in the order in which they are computed, weights and caches left out."""

    _steps: list[_Step] = field(default_factory=list)

    def add_input(self, n_bytes: int, *, kept: bool = False) -> Tensor:
        """A tensor that is there before the graph starts, until its last use; for ever without
        one, or where it is `kept`."""
        return self._add(_Step(n_bytes, (), in_place=False, is_input=True, kept=kept))

    def add(
        self, n_bytes: int, *sources: Tensor, in_place: bool = False, kept: bool = False
    ) -> Tensor:
        """A tensor computed from `sources`, which must live until then.

        `in_place` may take the place of a source as large or larger that nothing else needs
        (ggml_op_can_inplace). `kept` tensors stay for the caller (GGML_TENSOR_FLAG_OUTPUT).
        """
        indices = tuple(source.index for source in sources)
        return self._add(_Step(n_bytes, indices, in_place, is_input=False, kept=kept))

    def use(self, *sources: Tensor) -> None:
        """Something reads `sources` and leaves its result elsewhere, in a cache."""
        self.add(0, *sources)

    def peak_bytes(self, alignment: int) -> int:
        """The size of the buffer that holds the graph."""
        return _replay(self._steps, alignment)

    def _add(self, step: _Step) -> Tensor:
        self._steps.append(step)
        return Tensor(len(self._steps) - 1, step.n_bytes)


def _replay(steps: list[_Step], alignment: int) -> int:
    """ggml_gallocr_alloc_graph_impl: inputs first, then each step and the end of its sources."""
    n_uses = [0] * len(steps)
    for step in steps:
        for source in step.sources:
            n_uses[source] += 1
    places: dict[int, tuple[int, int]] = {}
    arena = _Arena()

    for index, step in enumerate(steps):
        if step.is_input:
            places[index] = arena.take(_padded(step.n_bytes, alignment))
    for index, step in enumerate(steps):
        if step.is_input:
            continue
        n_bytes = _padded(step.n_bytes, alignment)
        heir = _heir_of(step, steps, places, n_uses) if step.in_place else None
        if heir is not None:
            offset, size = places.pop(heir)
            arena.give_back(offset + n_bytes, size - n_bytes)
            places[index] = offset, n_bytes
        elif n_bytes:
            places[index] = arena.take(n_bytes)
        for source in step.sources:
            n_uses[source] -= 1
            if n_uses[source] == 0 and source in places and not steps[source].kept:
                arena.give_back(*places.pop(source))
    return arena.end


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _heir_of(
    step: _Step, steps: list[_Step], places: dict[int, tuple[int, int]], n_uses: list[int]
) -> int | None:
    """The source whose place the step takes over: its first one that ends with it."""
    for source in step.sources:
        ends = n_uses[source] == 1 and source in places and not steps[source].kept
        if ends and steps[source].n_bytes >= step.n_bytes:
            return source
    return None


class _Arena:
    """ggml_dyn_tallocr with one chunk: holes by offset, and an endless rest behind `_rest`."""

    def __init__(self) -> None:
        self.end = 0
        self._rest = 0
        self._holes: list[tuple[int, int]] = []

    def take(self, size: int) -> tuple[int, int]:
        """Offset and size of a place: the last of the smallest holes that will do."""
        best = None
        for number, (_, hole) in enumerate(self._holes):
            if hole >= size and (best is None or hole <= self._holes[best][1]):
                best = number
        if best is None:
            offset = self._rest
            self._rest += size
            self.end = max(self.end, self._rest)
            return offset, size
        offset, hole = self._holes.pop(best)
        if hole > size:
            self._holes.insert(best, (offset + size, hole - size))
        return offset, size

    def give_back(self, offset: int, size: int) -> None:
        """A place is free again; it merges with the holes beside it."""
        if size == 0:
            return
        number = 0
        while number < len(self._holes) and self._holes[number][0] < offset:
            number += 1
        if number < len(self._holes) and self._holes[number][0] == offset + size:
            size += self._holes.pop(number)[1]
        if number and sum(self._holes[number - 1]) == offset:
            number -= 1
            offset, before = self._holes.pop(number)
            size += before
        if offset + size == self._rest:
            self._rest = offset
        else:
            self._holes.insert(number, (offset, size))
