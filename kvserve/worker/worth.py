"""How many cells kept sequences may take: as many as reuse has been paying for lately.

Kept cells are not free. Attention walks over all cells below the highest used one, masked or not
(get_n_kv in llama.cpp's src/llama-kv-cache.cpp): on an H100, an 8B model decodes 15 % slower with
8,192 cells kept by others. So a load without any reuse must not fill the cache. What was given up
for that reason is remembered by how it began, and counts as reuse when it is asked for again, as
the ghost lists of ARC do (Megiddo and Modha, 2003); else a cache that was cut down could never
find out that it is wanted.
"""

from collections import OrderedDict

from kvserve.worker.cell_tree import Tokens

_FIRST = 0.25
_WEIGHT = 1 / 8
_ENOUGH = 0.25
"""The share of its prompt tokens that a load must reuse to be given the whole cache."""
_PAYS = 0.05
_KEY_TOKENS = 32
_MOST_GHOSTS = 4096


class Worth:
    """Follows the share of prompt tokens that were reused, over the last dozen requests."""

    def __init__(self, n_cells: int) -> None:
        self._n_cells = n_cells
        self._share = _FIRST
        self._ghosts: OrderedDict[tuple[str, bytes], int] = OrderedDict()

    @property
    def n_cells(self) -> int:
        """Cells that kept sequences may take."""
        return int(self._n_cells * min(1.0, self._share / _ENOUGH))

    @property
    def pays(self) -> bool:
        """Whether some of the prompts' tokens were reused, or asked for in vain, lately."""
        return self._share >= _PAYS

    def observe(self, tokens: Tokens, salt: str, n_reused: int) -> None:
        """A request for `tokens` came, and `n_reused` of them were in the cache."""
        n_wanted = max(n_reused, min(self._ghosts.get(_key(tokens, salt), 0), len(tokens)))
        self._share += _WEIGHT * (n_wanted / len(tokens) - self._share)

    def remember(self, tokens: Tokens, salt: str) -> None:
        """A sequence of `tokens` was given up to keep within `n_cells`."""
        if len(tokens) < _KEY_TOKENS:
            return
        key = _key(tokens, salt)
        self._ghosts[key] = max(len(tokens), self._ghosts.pop(key, 0))
        if len(self._ghosts) > _MOST_GHOSTS:
            self._ghosts.popitem(last=False)


def _key(tokens: Tokens, salt: str) -> tuple[str, bytes]:
    return salt, tokens[:_KEY_TOKENS].tobytes()
