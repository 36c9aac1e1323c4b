"""A sequence out of one context, and into another. On the thread that decodes."""

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
from kvserve.worker.carry.structure import Bytes, parse
from kvserve.worker.llama import VERSION, CacheFull, Context, DecodeError


def export_sequence(
    context: Context,
    slot: int,
    tokens: Tokens,
    *,
    salt: str = "",
    canary: bool = False,
    blank: Blank | None = None,
) -> ExportedState:
    """Copy a sequence into a memory file, into `blank` where one was made ahead.

    `tokens` are all that the sequence is made of: those in the cache, and maybe one that was drawn
    and is decoded next. With `canary` that one is decoded now, after the copy, so that the import
    can be proven; the sequence must not go on in this context then. Kept sequences, with ids of
    `n_seq_max` and above, cannot be decoded and get no canary.

    Raises CannotCarry: MEMORY_CLASS, EMPTY, EXPORT or MALFORMED. Raises OSError where the kernel
    gives no memory, CacheFull or DecodeError where the canary cannot be decoded.
    """
    try:
        layout, n_cached = _exportable(context, slot, tokens, salt)
    except CannotCarry:
        if blank is not None:
            blank.close()
        raise
    n_bytes = context.state_bytes(slot)
    gap = 4 * n_cached if slot >= context.n_seq_max else 0

    def fill(out: Bytes) -> LogProbs | None:
        n_written = context.read_state(slot, out.ctypes.data + gap, n_bytes)
        if n_written != n_bytes:
            raise CannotCarry(Reason.EXPORT, f"llama.cpp wrote {n_written} of {n_bytes} bytes")
        if gap:
            name_cells(out, n_cached, layout.cell_ext_bytes, slot)
        _check_end(out, layout, n_cached)
        return next_distribution(context, slot, int(tokens[-1]), n_cached) if n_vocab else None

    canary = canary and len(tokens) > n_cached and slot < context.n_seq_max
    n_vocab = context.vocab.n_tokens if canary else 0
    contents = Contents(
        _origin(context), layout, gap + n_bytes, n_cached, len(tokens), n_vocab, salt
    )
    return write_state(contents, tokens, fill, blank)


def _exportable(context: Context, slot: int, tokens: Tokens, salt: str) -> tuple[StateLayout, int]:
    """The layout of a sequence, and its tokens in the cache. Raises CannotCarry."""
    layout = context.state_layout
    if layout is None:
        raise CannotCarry(Reason.MEMORY_CLASS, "the state of this model's memory is not known")
    n_cached = context.n_cached(slot)
    if n_cached == 0:
        raise CannotCarry(Reason.EMPTY, "the sequence holds no tokens")
    if len(salt) > LONGEST_SALT:
        raise CannotCarry(Reason.EXPORT, f"a cache salt of {len(salt)} characters")
    if len(tokens) - n_cached not in (0, 1):
        raise CannotCarry(Reason.EXPORT, f"{n_cached} tokens in the cache, and {len(tokens)} told")
    return layout, n_cached


def import_sequence(context: Context, slot: int, state: ExportedState) -> None:
    """Replace a sequence by an exported one, which must have this context's types and rotation.

    Raises CannotCarry: IDENTITY, LAYOUT, MALFORMED or IMPORT. The sequence is empty then.
    """
    context.clear_slot(slot)
    contents = state.contents
    if contents.origin != _origin(context):
        raise CannotCarry(Reason.IDENTITY, "the state is of another model, build or RoPE setting")
    if state.layout != context.state_layout:
        raise CannotCarry(Reason.LAYOUT, "the state has other types or rotation than this cache")
    if contents.n_cached > context.n_ctx:
        raise CannotCarry(
            Reason.IMPORT, f"{contents.n_cached} tokens, and the context has {context.n_ctx}"
        )
    data = state.view()
    _check_end(data, state.layout, contents.n_cached)
    n_read = context.write_state(slot, data.ctypes.data, contents.state_bytes)
    if n_read != contents.state_bytes:
        context.clear_slot(slot)
        raise CannotCarry(Reason.IMPORT, f"llama.cpp took {n_read} of {contents.state_bytes} bytes")


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


def _origin(context: Context) -> Origin:
    return Origin(context.model_identity, VERSION)


def _check_end(state: Bytes, layout: StateLayout, n_cached: int) -> None:
    n_tokens = parse(state, layout).n_tokens
    if n_tokens != n_cached:
        raise CannotCarry(Reason.MALFORMED, f"a state of {n_tokens} tokens, not {n_cached}")
