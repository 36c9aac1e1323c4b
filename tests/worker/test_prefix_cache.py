"""What is kept, what goes first, and which beginnings are reused."""

import numpy as np
import pytest

from kvserve.worker.cell_rules import Clear, Copy, Cut, Rules
from kvserve.worker.prefix_cache import PrefixCache
from tests.worker.fake_memory import PLAIN, RECURRENT, RECURRENT_ALONE, WINDOW


def tokens(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def cache_of(rules: Rules = PLAIN, n_cells: int = 1000, n_slots: int = 2, lowest: int = 0):
    return PrefixCache(n_cells, n_slots, rules, lambda slot: lowest, shortest=4)


def keep(cache: PrefixCache, text: np.ndarray, salt: str = "") -> None:
    """A request for `text` comes and goes."""
    reuse = cache.find(np.append(text, 99_999).astype(np.int32), salt)
    sequence = cache.open(text, salt, reuse)
    if sequence.n_cells < len(text):
        cache.append(sequence, len(text) - sequence.n_cells)
    cache.keep(sequence)


def kept(cache: PrefixCache) -> list[int]:
    """The first tokens of what is kept, the most recently used first."""
    return [int(sequence.tokens[0]) for sequence in cache.kept]


def lengths(cache: PrefixCache) -> list[int]:
    return [sequence.n_cells for sequence in cache.kept]


def test_the_least_recently_used_goes_first() -> None:
    cache = cache_of(n_cells=100)
    for first in (0, 100, 200):
        keep(cache, tokens(30, first))
    keep(cache, tokens(30, 0))
    assert kept(cache) == [0, 200, 100]
    cache.make_room(30)
    assert (kept(cache), lengths(cache)) == ([0, 200, 100], [30, 30, 10])
    cache.make_room(40)
    assert (kept(cache), lengths(cache)) == ([0, 200], [30, 30])
    cache.make_room(100)
    assert kept(cache) == []


def test_a_kept_sequence_of_plain_attention_loses_its_end_first() -> None:
    cache = cache_of(n_cells=1000)
    keep(cache, tokens(900))
    cache.take_operations()
    cache.make_room(150)
    (sequence,) = cache.kept
    assert cache.take_operations() == (Cut(sequence.slot, 850),)
    assert (cache.n_kept, lengths(cache)) == (850, [850])


@pytest.mark.parametrize("rules", [WINDOW, RECURRENT])
def test_other_memories_give_up_whole_sequences(rules: Rules) -> None:
    cache = cache_of(rules)
    keep(cache, tokens(900))
    (sequence,) = cache.kept
    cache.take_operations()
    cache.make_room(150)
    assert cache.take_operations() == (Clear(sequence.slot),)
    assert cache.n_kept == 0


def test_running_cells_are_never_given_up() -> None:
    cache = cache_of(n_cells=100)
    running = cache.open(tokens(60), "", None)
    cache.append(running, 60)
    keep(cache, tokens(30, 500))
    cache.make_room(40)
    assert (cache.n_pinned, cache.n_kept) == (60, 0)
    cache.make_room(1000)
    assert cache.n_pinned == 60


def test_a_kept_sequence_loses_only_what_no_running_one_needs() -> None:
    cache = cache_of(n_cells=100)
    keep(cache, tokens(30))
    branch = np.append(tokens(20), [7, 7]).astype(np.int32)
    running = cache.open(branch, "", cache.find(branch, ""))
    assert running.n_cells == 20
    cache.make_room(80)
    assert (cache.n_pinned, cache.n_kept) == (20, 0)


def test_a_continued_sequence_is_taken_over_where_it_is() -> None:
    cache = cache_of()
    keep(cache, tokens(50))
    cache.take_operations()
    sequence = cache.open(tokens(80), "", cache.find(tokens(80), ""))
    assert sequence.n_cells == 50
    assert cache.take_operations() == ()
    assert cache.kept == ()


def test_a_branch_shares_cells_and_the_kept_sequence_stays() -> None:
    cache = cache_of()
    keep(cache, tokens(50))
    (source,) = cache.kept
    cache.take_operations()
    branch = np.append(tokens(30), [7, 7]).astype(np.int32)
    sequence = cache.open(branch, "", cache.find(branch, ""))
    assert cache.take_operations() == (Copy(source.slot, sequence.slot, 30),)
    assert (cache.n_pinned, cache.n_kept) == (30, 20)


def test_kept_sequences_move_to_spare_ids_when_places_are_needed() -> None:
    cache = cache_of(Rules(n_spare=2), n_slots=1)
    for first in (0, 100, 200, 300):
        keep(cache, tokens(30, first))
    assert kept(cache) == [300, 200, 100]
    assert sorted(sequence.slot for sequence in cache.kept) == [0, 1, 2]


def test_a_kept_sequence_comes_back_from_a_spare_id() -> None:
    cache = cache_of(Rules(n_spare=3), n_slots=1)
    for first in (0, 100, 200):
        keep(cache, tokens(30, first))
    back = cache.open(tokens(40, 100), "", cache.find(tokens(40, 100), ""))
    assert (back.slot, back.n_cells) == (0, 30)
    assert kept(cache) == [200, 0]
    assert 0 not in {sequence.slot for sequence in cache.kept}


@pytest.mark.parametrize("rules", [WINDOW, RECURRENT, RECURRENT_ALONE])
def test_without_spare_ids_kept_sequences_live_in_the_places(rules: Rules) -> None:
    cache = cache_of(rules)
    for first in (0, 100, 200):
        keep(cache, tokens(30, first))
    assert kept(cache) == [200, 100]


@pytest.mark.parametrize(
    ("lowest", "n_reused"), [(0, 30), (27, 30), (28, None), (-1, None)], ids=str
)
def test_a_window_is_cut_only_where_it_is_whole(lowest: int, n_reused: int | None) -> None:
    """The token at position 30 looks back to 27, with a window of 4."""
    cache = cache_of(WINDOW, lowest=lowest)
    keep(cache, tokens(50))
    branch = np.append(tokens(30), [7, 7]).astype(np.int32)
    reuse = cache.find(branch, "")
    assert (reuse and reuse.n_tokens) == n_reused


def test_a_window_is_not_cut_where_more_is_lost_than_won() -> None:
    cache = cache_of(WINDOW)
    keep(cache, tokens(100))
    branch = np.append(tokens(30), [7, 7]).astype(np.int32)
    assert cache.find(branch, "") is None


def test_recurrent_states_are_only_continued() -> None:
    cache = cache_of(RECURRENT)
    keep(cache, tokens(50))
    assert cache.find(tokens(50), "") is None
    assert cache.find(np.append(tokens(40), [7, 7]).astype(np.int32), "") is None
    assert cache.find(tokens(51), "").n_tokens == 50


def test_a_recurrent_state_is_copied_where_a_place_is_free_and_else_taken() -> None:
    cache = cache_of(RECURRENT)
    keep(cache, tokens(50))
    assert not cache.find(tokens(60), "").takes
    keep(cache, tokens(50, 500))
    assert cache.find(tokens(60), "").takes


def test_what_is_kept_twice_is_kept_once() -> None:
    cache = cache_of()
    both = [cache.open(tokens(50), "", None) for _ in range(2)]
    for sequence in both:
        cache.append(sequence, 50)
    for sequence in both:
        cache.keep(sequence)
    assert (len(cache.kept), cache.n_kept) == (1, 50)


def test_short_sequences_are_not_kept() -> None:
    cache = cache_of()
    keep(cache, tokens(3))
    assert cache.kept == ()


def test_an_imported_sequence_is_reused_like_any_other() -> None:
    cache = cache_of()
    cache.adopt(1, tokens(50), "")
    reuse = cache.find(tokens(60), "")
    assert (reuse.source.slot, reuse.n_tokens) == (1, 50)
    assert cache.open(tokens(60, 500), "", None).slot == 0


def serve(cache: PrefixCache, text: np.ndarray) -> int:
    """A request for `text` comes and goes; returns how much of it was in the cache."""
    reuse = cache.find(text, "")
    sequence = cache.open(text, "", reuse)
    n_reused = sequence.n_cells
    cache.observe(text, "", n_reused)
    cache.append(sequence, len(text) - n_reused)
    cache.keep(sequence)
    return n_reused


def test_a_load_that_reuses_nothing_fills_no_cache() -> None:
    cache = cache_of(n_cells=100_000)
    for n in range(40):
        serve(cache, tokens(200, 1000 * n))
    assert cache.n_kept < 1000
    assert kept(cache)[0] == 39_000


def test_a_load_that_reuses_is_given_the_whole_cache() -> None:
    cache = cache_of(Rules(n_spare=50), n_cells=100_000)
    for n in range(400):
        serve(cache, tokens(100 + n, 1000 * (n % 40)))
    assert len(cache.kept) == 40


def test_what_was_given_up_for_lack_of_worth_is_kept_once_it_is_asked_for_again() -> None:
    cache = cache_of(Rules(n_spare=50), n_cells=100_000)
    for n in range(60):
        serve(cache, tokens(200, 1000 * n))
    reused = [serve(cache, tokens(200, 1000 * (n % 20))) for n in range(60)]
    assert reused[:5] == [0] * 5
    assert min(reused[20:]) > 0
