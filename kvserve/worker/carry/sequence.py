"""A sequence out of one context, and into another. On the thread that decodes."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvserve.core.dtypes import CachePair, KvType
from kvserve.worker.carry.canary import divergence, divergence_limit, next_distribution
from kvserve.worker.carry.layout import StateLayout
from kvserve.worker.carry.memory_file import (
    LONGEST_SALT,
    Blank,
    Contents,
    ExportedState,
    LogProbs,
    Origin,
    Tokens,
    write_state,
)
from kvserve.worker.carry.nameless import name_cells
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.structure import Bytes, CacheState, SequenceState, parse
from kvserve.worker.llama import VERSION, CacheFull, Context, DecodeError


def export_sequence(
    context: Context,
    slot: int,
    tokens: Tokens,
    *,
    salt: str = "",
    canary: bool = False,
    blank: Blank | None = None,
    n_before: int = 0,
    through: int | None = None,
) -> ExportedState:
    """Copy a sequence into a memory file, into `blank` where one was made ahead.

    `tokens` are all that the sequence is made of: those in the cache, and maybe one that was drawn
    and is decoded next. With `canary` that one is decoded now, after the copy, so that the import
    can be proven; the sequence must not go on in this context then. Kept sequences, with ids of
    `n_seq_max` and above, cannot be decoded and get no canary. The cells of the first `n_before`
    tokens are left out, which takes a free id, `through`.

    Raises CannotCarry: MEMORY_CLASS, EMPTY, EXPORT or MALFORMED. Raises OSError where the kernel
    gives no memory, CacheFull or DecodeError where the canary cannot be decoded.
    """
    n_cached = context.n_cached(slot)

    def expect() -> LogProbs:
        return next_distribution(context, slot, int(tokens[-1]), n_cached)

    canary = canary and len(tokens) > n_cached and slot < context.n_seq_max
    try:
        layout = exportable(context, slot, salt)
        if len(tokens) - n_cached not in (0, 1):
            told = f"{n_cached} tokens in the cache, and {len(tokens)} told"
            raise CannotCarry(Reason.EXPORT, told)
    except CannotCarry:
        if blank is not None:
            blank.close()
        raise
    span = Span(slot, n_before, n_cached, through)
    return _export(context, span, layout, tokens, salt, blank, expect if canary else None)


def export_piece(
    context: Context,
    slot: int,
    tokens: Tokens,
    *,
    n_before: int,
    through: int,
    salt: str = "",
    blank: Blank | None = None,
) -> ExportedState:
    """Copy the cells of `tokens`, the beginning of a sequence that may be longer and goes on, but
    for the first `n_before`, by way of the free id `through`. Plain attention only.

    Raises as `export_sequence` does.
    """
    try:
        layout = exportable(context, slot, salt)
    except CannotCarry:
        if blank is not None:
            blank.close()
        raise
    span = Span(slot, n_before, len(tokens), through)
    return _export(context, span, layout, tokens, salt, blank, None)


@dataclass(frozen=True, slots=True)
class Span:
    """The cells of a sequence from the first `n_before` tokens on, `n_end` being the end of what
    is exported. A part of a sequence is read under an id of its own, `through`."""

    slot: int
    n_before: int
    n_end: int
    through: int | None

    @contextlib.contextmanager
    def held(self, context: Context) -> Iterator[int]:
        """The id that holds these cells and no others."""
        if self.through is None:
            yield self.slot
            return
        context.copy_cells(self.slot, self.through, self.n_before, self.n_end)
        try:
            yield self.through
        finally:
            context.clear_slot(self.through)

    def state_bytes(self, context: Context, held: int) -> int:
        """Bytes of the state that `read` writes."""
        return self._gap_bytes(context, held) + context.state_bytes(held)

    def _gap_bytes(self, context: Context, held: int) -> int:
        return 4 * (self.n_end - self.n_before) if held >= context.n_seq_max else 0

    def read(self, context: Context, held: int, layout: StateLayout, out: Bytes) -> SequenceState:
        """Write the state of the cells into `out`, of `state_bytes`. Raises CannotCarry."""
        gap = self._gap_bytes(context, held)
        n_bytes = len(out) - gap
        n_written = context.read_state(held, out.ctypes.data + gap, n_bytes)
        if n_written != n_bytes:
            raise CannotCarry(Reason.EXPORT, f"llama.cpp wrote {n_written} of {n_bytes} bytes")
        if gap:
            name_cells(out, self.n_end - self.n_before, layout.cell_ext_bytes, held)
        return check_span(out, layout, self.n_before, self.n_end)


def _export(
    context: Context,
    span: Span,
    layout: StateLayout,
    tokens: Tokens,
    salt: str,
    blank: Blank | None,
    expect: Callable[[], LogProbs] | None,
) -> ExportedState:
    with span.held(context) as held:
        n_bytes = span.state_bytes(context, held)

        def fill(out: Bytes) -> LogProbs | None:
            span.read(context, held, layout, out)
            return expect() if expect is not None else None

        contents = Contents(
            origin_of(context),
            layout,
            n_bytes,
            span.n_end,
            len(tokens),
            context.vocab.n_tokens if expect is not None else 0,
            salt,
            span.n_before,
        )
        return write_state(contents, tokens, fill, blank)


def exportable(context: Context, slot: int, salt: str) -> StateLayout:
    """The layout of a sequence. Raises CannotCarry."""
    layout = context.state_layout
    if layout is None:
        raise CannotCarry(Reason.MEMORY_CLASS, "the state of this model's memory is not known")
    if context.n_cached(slot) == 0:
        raise CannotCarry(Reason.EMPTY, "the sequence holds no tokens")
    if len(salt) > LONGEST_SALT:
        raise CannotCarry(Reason.EXPORT, f"a cache salt of {len(salt)} characters")
    return layout


def import_sequence(
    context: Context, slot: int, state: ExportedState, data: Bytes | None = None
) -> None:
    """Replace a sequence by an exported one, which must have this context's types and rotation.
    `data` is the state's view where there is one already.

    Raises CannotCarry: IDENTITY, LAYOUT, MALFORMED or IMPORT. The sequence is empty then.
    """
    context.clear_slot(slot)
    contents = state.contents
    check_origin(context, state)
    if contents.n_cached > context.n_ctx:
        raise CannotCarry(
            Reason.IMPORT, f"{contents.n_cached} tokens, and the context has {context.n_ctx}"
        )
    data = state.view() if data is None else data
    check_span(data, state.layout, contents.n_before, contents.n_cached)
    write_sequence(context, slot, data)


def write_sequence(context: Context, slot: int, data: Bytes) -> None:
    """Replace a sequence by the state in `data`. Raises CannotCarry (IMPORT); the sequence is empty
    then."""
    n_read = context.write_state(slot, data.ctypes.data, len(data))
    if n_read != len(data):
        context.clear_slot(slot)
        raise CannotCarry(Reason.IMPORT, f"llama.cpp took {n_read} of {len(data)} bytes")


def check_origin(context: Context, state: ExportedState) -> None:
    """Whether a state is this context's own kind. Raises CannotCarry: IDENTITY or LAYOUT."""
    if state.contents.origin != origin_of(context):
        raise CannotCarry(Reason.IDENTITY, "the state is of another model, build or RoPE setting")
    if state.layout != context.state_layout:
        raise CannotCarry(Reason.LAYOUT, "the state has other types or rotation than this cache")


def import_piece(
    context: Context, slot: int, state: ExportedState, through: int, data: Bytes | None = None
) -> None:
    """Add a state's cells to a sequence that holds those before them, by way of the free id
    `through`, which batches may use.

    Raises CannotCarry as `import_sequence` does, and IMPORT where the sequence does not end where
    the state begins. The sequence is as it was then.
    """
    contents = state.contents
    n_cached = context.n_cached(slot)
    if n_cached != contents.n_before:
        raise CannotCarry(
            Reason.IMPORT, f"a piece from token {contents.n_before} on, after {n_cached} tokens"
        )
    import_sequence(context, through, state, data)
    context.copy_cells(through, slot, contents.n_before, contents.n_cached)
    context.clear_slot(through)


def prove_sequence(context: Context, slot: int, state: ExportedState) -> float | None:
    """Decode the pending token of a sequence just imported, and compare what comes next.

    Returns the KLD in nats; the sequence then holds the pending token too, and
    `context.logits(1)` are the logits to draw from. Returns None, and decodes nothing, where the
    export has no canary.

    Raises CannotCarry (CANARY) over the limit of the cache's types, or where the token cannot be
    decoded; the sequence is empty then.
    """
    expected = state.expected
    if expected is None:
        return None
    try:
        found = next_distribution(context, slot, int(state.tokens[-1]), state.contents.n_cached)
    except (CacheFull, DecodeError) as error:
        context.clear_slot(slot)
        raise CannotCarry(Reason.CANARY, f"the next token did not decode: {error!r}") from error
    limit = max(divergence_limit(pair) for pair in _pairs(state.layout))
    kld = divergence(expected, found) if len(found) == len(expected) else float("inf")
    if kld > limit:
        context.clear_slot(slot)
        raise CannotCarry(Reason.CANARY, f"KLD {kld:.3g} after the import, over {limit:g}")
    return kld


def _pairs(layout: StateLayout) -> list[CachePair]:
    exact = CachePair(KvType.F32, KvType.F32)  # the recurrent part
    return [
        exact,
        *(CachePair(cache.type_k, cache.type_v or cache.type_k) for cache in layout.caches),
    ]


def origin_of(context: Context) -> Origin:
    """What states of this context are marked with."""
    return Origin(context.model_identity, VERSION)


def check_span(state: Bytes, layout: StateLayout, n_before: int, n_end: int) -> SequenceState:
    """The structure of a state that holds the cells from the first `n_before` tokens to the first
    `n_end`. Raises CannotCarry (MALFORMED)."""
    parsed = parse(state, layout)
    if parsed.n_tokens != n_end:
        raise CannotCarry(Reason.MALFORMED, f"a state of {parsed.n_tokens} tokens, not {n_end}")
    if n_before and (layout.recurrent or not all(_is_span(one, n_before) for one in parsed.caches)):
        raise CannotCarry(Reason.MALFORMED, f"a state that is no piece from token {n_before} on")
    return parsed


def _is_span(cache: CacheState, n_before: int) -> bool:
    first, last = cache.first_position, cache.last_position
    return first == n_before and last is not None and cache.n_cells == last + 1 - n_before
