"""What is in the cache, copied while its worker still answers: the pause is then for the rest.

Cells that are filled do not change, so a piece of a sequence may be copied between any two steps,
under a sequence id of its own. Where a sequence is cut or another one takes its place, the tokens
tell which pieces still are its beginning. Plain attention alone: a sliding window forgets its older
cells, and a recurrent state is whole or nothing.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvserve.ipc.messages import CopiedAhead, CopiedPiece
from kvserve.worker.blanks import Blanks
from kvserve.worker.carry.memory_file import ExportedState, Tokens
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_piece
from kvserve.worker.cell_tree import CachedSequence, n_common, n_shared
from kvserve.worker.llama import Context
from kvserve.worker.prefix_cache import PrefixCache

_PIECE_BYTES = 2**27
"""Copied in 10 to 40 ms, which the streams wait beside a step's time."""
_MOST_PIECES = 64
"""Each is an open file, in three processes."""
_MOST_SHARED = 0.5
"""A sequence that shares more of its cells with an exported one stays behind: the import gives
every sequence cells of its own, and its own rest is soon prefilled again."""


def worth_a_file(sequence: CachedSequence, exported: set[CachedSequence]) -> bool:
    """Whether a sequence is to be exported where those others are."""
    return n_shared(sequence, exported) <= _MOST_SHARED * sequence.n_cells


@dataclass(slots=True, eq=False)
class _Chain:
    """The pieces of one sequence, which began with `tokens`."""

    tokens: Tokens
    salt: str
    pieces: list[ExportedState] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What is to be copied: the tokens from `begin` to `end`."""

    chain: _Chain
    begin: int
    end: int


class Copies:
    """Pieces of the sequences of `context`, whose cells `cache` knows. Nothing is copied before
    `begin`."""

    def __init__(self, context: Context, cache: PrefixCache) -> None:
        self._context = context
        self._cache = cache
        self._pending: deque[_Piece] = deque()
        self._chains: list[_Chain] = []
        self._blanks: Blanks[_Piece] | None = None
        self._began = 0.0

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        return self._blanks is not None

    @property
    def n_bytes(self) -> int:
        """Host memory that the pieces take."""
        return sum(piece.n_bytes for chain in self._chains for piece in chain.pieces)

    def begin(self, sequences: Sequence[CachedSequence], limit_bytes: int) -> None:
        """Copy sequences from now on, in the order given, up to `limit_bytes` in all."""
        self._began = time.monotonic()
        context = self._context
        sizes: dict[_Piece, int] = {}
        if self._cache.rules.cuts_anywhere and context.state_layout is not None:
            left_bytes = limit_bytes
            done: set[CachedSequence] = set()
            for sequence in sequences:
                n_bytes = context.state_bytes(sequence.slot)
                short = sequence.n_cells < max(self._cache.shortest, 2)
                if short or not 0 < n_bytes <= left_bytes or not worth_a_file(sequence, done):
                    continue
                left_bytes -= n_bytes
                done.add(sequence)
                sizes |= self._pieces(sequence, n_bytes, limit_bytes)
        self._pending.extend(sizes)
        self._blanks = Blanks(sizes)

    def advance(self, sequences: Sequence[CachedSequence], *, wait: bool) -> CopiedAhead | None:
        """Copy the next piece, of the `sequences` that there are now; returns the answer to
        `CopyAhead` after the last one. Memory that is not ready is waited for with `wait`."""
        blanks = self._blanks
        if blanks is None or not (wait or blanks.ready):
            return None
        if self._pending:
            self._copy(self._pending.popleft(), sequences, blanks)
        if self._pending:
            return None
        blanks.close()
        self._blanks = None
        self._chains = [chain for chain in self._chains if chain.pieces]
        found = tuple(
            tuple(CopiedPiece(piece.fd, piece.n_bytes) for piece in chain.pieces)
            for chain in self._chains
        )
        return CopiedAhead(found, time.monotonic() - self._began)

    def stop(self) -> None:
        """Copy no more. What nobody was told of is given back."""
        if self._blanks is None:
            return
        self._pending.clear()
        self._blanks.close()
        self._blanks = None
        for chain in self._chains:
            for piece in chain.pieces:
                piece.close()
        self._chains.clear()

    def find(self, sequence: CachedSequence) -> tuple[ExportedState, ...]:
        """The pieces that a sequence begins with; at least its last cell is in none of them."""
        return max((_pieces_of(chain, sequence) for chain in self._chains), key=len, default=())

    def take(self, sequence: CachedSequence) -> tuple[ExportedState, ...]:
        """What `find` finds, for this sequence alone."""
        found = self.find(sequence)
        self._chains = [one for one in self._chains if not found or found[0] not in one.pieces]
        return found

    def _pieces(
        self, sequence: CachedSequence, n_bytes: int, limit_bytes: int
    ) -> dict[_Piece, int]:
        """A sequence in pieces, and the size of each."""
        n_cells = sequence.n_cells
        chain = _Chain(sequence.tokens[: n_cells - 1].copy(), sequence.salt)
        self._chains.append(chain)
        bytes_each = -(-n_bytes // n_cells) + 8  # a kept one's cells get names, and its tokens
        n_each = max(1, max(_PIECE_BYTES, limit_bytes // _MOST_PIECES) // bytes_each)
        pieces = {}
        for begin in range(0, n_cells - 1, n_each):
            end = min(begin + n_each, n_cells - 1)
            pieces[_Piece(chain, begin, end)] = bytes_each * (end - begin) + 4 * begin + 2**16
        return pieces

    def _copy(
        self, piece: _Piece, sequences: Sequence[CachedSequence], blanks: Blanks[_Piece]
    ) -> None:
        chain = piece.chain
        n_copied = chain.pieces[-1].contents.n_cached if chain.pieces else 0
        through = next(iter(self._cache.free_ids), None)
        if n_copied != piece.begin or through is None:
            return
        tokens = chain.tokens[: piece.end]
        holder = next((one for one in sequences if _begins(one, tokens, chain.salt)), None)
        if holder is None:
            return
        try:
            state = export_piece(
                self._context,
                holder.slot,
                tokens,
                n_before=piece.begin,
                through=through,
                salt=chain.salt,
                blank=blanks.take(piece),
            )
        except (CannotCarry, OSError) as error:
            print(f"not copied ahead: {error}", file=sys.stderr, flush=True)
            return
        chain.pieces.append(state)


def _begins(sequence: CachedSequence, tokens: Tokens, salt: str) -> bool:
    n_cells = sequence.n_cells
    if sequence.salt != salt or n_cells < len(tokens):
        return False
    return n_common(sequence.tokens[:n_cells], tokens) == len(tokens)


def _pieces_of(chain: _Chain, sequence: CachedSequence) -> tuple[ExportedState, ...]:
    if chain.salt != sequence.salt:
        return ()
    n_alike = n_common(sequence.tokens[: sequence.n_cells - 1], chain.tokens)
    return tuple(piece for piece in chain.pieces if piece.contents.n_cached <= n_alike)
