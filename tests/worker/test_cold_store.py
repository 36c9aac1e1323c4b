"""What host memory keeps of sequences that left the KV cache, and what is found again."""

from dataclasses import dataclass

import numpy as np
import pytest

from kvserve.worker.cell_rules import Clear, Cut, Rules, Store
from kvserve.worker.cell_tree import CachedSequence
from kvserve.worker.cold_store import MOST, SHORTEST, ColdStore, Stored
from kvserve.worker.prefix_cache import PrefixCache
from tests.worker.fake_memory import PLAIN


@dataclass
class FakeState:
    n_bytes: int
    closed: bool = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def tokens(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def stored(n: int, first: int = 0, salt: str = "", n_bytes: int = 10) -> Stored:
    return Stored(FakeState(n_bytes), tokens(n, first), salt)


def test_the_longest_common_beginning_is_found_and_a_token_is_left() -> None:
    store = ColdStore(1000, whole=False)
    short, long = stored(300), stored(500)
    other = stored(400, first=9000)
    for one in (short, other, long):
        store.put(one)
    assert store.find(tokens(1000), "") == (long, 500)
    assert store.find(tokens(400), "") == (long, 399)
    assert store.find(tokens(SHORTEST), "") is None
    assert store.find(tokens(1000), "another") is None
    assert short.state.closed
    assert store.latest == (long, other)


def test_where_only_the_whole_is_of_use_a_part_is_not_found() -> None:
    store = ColdStore(1000, whole=True)
    store.put(stored(500))
    assert store.find(tokens(400), "") is None
    assert store.find(tokens(501), "") is not None


def test_small_sequences_are_bounded_in_number_for_each_is_an_open_file() -> None:
    store = ColdStore(10**9, whole=False)
    every = [stored(300, first=1000 * n) for n in range(MOST + 2)]
    for one in every:
        store.put(one)
    assert store.latest == tuple(reversed(every[2:]))
    assert [n for n, one in enumerate(every) if one.state.closed] == [0, 1]


def test_the_bytes_are_bounded_and_the_oldest_go_first() -> None:
    store = ColdStore(30, whole=False)
    every = [stored(300, first=1000 * n) for n in range(5)]
    for one in every[:3]:
        store.put(one)
    store.take(every[0])
    store.put(every[0])
    for one in every[3:]:
        store.put(one)
    assert [one.state.closed for one in every] == [False, True, True, False, False]
    assert (store.n_bytes, len(store)) == (30, 3)
    large = stored(300, first=9000, n_bytes=31)
    store.put(large)
    assert large.state.closed
    assert len(store) == 3


def cache_of(**fields: bool) -> PrefixCache:
    return PrefixCache(1000, 2, PLAIN, lambda _slot: 0, 1, **fields)


def kept_in(cache: PrefixCache, text: np.ndarray, *, wanted: bool = False) -> CachedSequence:
    sequence = cache.open(text, "mine", None)
    cache.append(sequence, len(text))
    cache.keep(sequence, wanted=wanted)
    cache.take_operations()
    return sequence


@pytest.mark.parametrize("wanted", [True, False])
def test_what_must_go_is_stored_just_before_its_cells_are_given_up(wanted: bool) -> None:
    cache = cache_of(stores=True)
    kept_in(cache, tokens(600), wanted=wanted)
    for n_wanted in (450, 460, 800, 1000):
        cache.make_room(n_wanted, 32)
    operations = cache.take_operations()
    n_cells, stores, cuts = 600, operations[::2], operations[1::2]
    for store, cut in zip(stores, cuts, strict=True):
        assert isinstance(store, Store)
        assert (store.salt, store.tokens.tolist()) == ("mine", tokens(n_cells).tolist())
        assert cut == (Cut(0, store.n_left) if store.n_left else Clear(0))
        n_cells = store.n_left
    assert n_cells == 0
    assert [store.n_left for store in stores] == [550, 535, 200, 0]


@pytest.mark.parametrize("stores", [True, False])
def test_it_tells_whether_room_needs_a_copy(stores: bool) -> None:
    cache = cache_of(stores=stores)
    kept_in(cache, tokens(SHORTEST - 1))
    kept_in(cache, tokens(500, 5000))
    n_short = 1000 - 500
    assert not cache.stores_for(n_short - SHORTEST + 1), "it fits"
    assert not cache.stores_for(n_short), "what is short is given up without"
    assert cache.stores_for(n_short + 1) == stores
    assert cache.stores_for(2000) == stores
    running = cache.open(tokens(10, 9000), "mine", None)
    cache.append(running, 10)
    assert cache.stores_for(n_short - 9) == stores
    while cache.evict_oldest():
        pass
    assert not cache.stores_for(2000), "nothing is left"


def test_what_running_ones_share_makes_no_room_and_needs_no_copy() -> None:
    cache = cache_of(stores=True)
    running = cache.open(tokens(600), "mine", None)
    cache.append(running, 600)
    shorter = np.append(tokens(400), 9000).astype(np.int32)
    cache.keep(cache.open(shorter, "mine", cache.find(shorter, "mine")))
    assert [kept.n_cells for kept in cache.kept] == [400]
    assert not cache.stores_for(1000)


def test_what_two_kept_ones_share_makes_no_room_before_both_are_gone() -> None:
    cache = cache_of(stores=True)
    common = tokens(100)
    for first in (5000, 6000):
        text = np.concatenate([common, tokens(80, first)])
        reuse = cache.find(text, "mine")
        sequence = cache.open(text, "mine", reuse)
        cache.append(sequence, len(text) - sequence.n_cells)
        cache.keep(sequence)
    kept_in(cache, tokens(500, 9000))
    n_free = 1000 - 100 - 2 * 80 - 500
    assert not cache.stores_for(n_free + 160)
    assert cache.stores_for(n_free + 261)
    # 260 more would be there without: it may say so too early, never too late.
    cache.make_room(n_free + 260)
    assert not any(isinstance(one, Store) for one in cache.take_operations())


def kept_alike(cache: PrefixCache, n_common: int, *n_own: int) -> list[CachedSequence]:
    """Kept sequences with a common beginning."""
    found = []
    for first, n in enumerate(n_own, start=1):
        text = np.concatenate([tokens(n_common), tokens(n, 10_000 * first)])
        sequence = cache.open(text, "mine", cache.find(text, "mine"))
        cache.append(sequence, len(text) - sequence.n_cells)
        cache.keep(sequence)
        found.append(sequence)
    cache.take_operations()
    return found


def test_a_beginning_that_others_hold_is_stored_in_parts_while_they_make_room() -> None:
    cache = cache_of(stores=True)
    first, second = kept_alike(cache, 300, 60, 520)
    left, key = [], 0
    while first in cache._kept:
        cache.make_room(cache.n_free + 30, 40)
        stores = [one for one in cache.take_operations() if isinstance(one, Store)]
        assert 1 <= len(stores) <= 2
        key = key or stores[0].key
        left += [one.n_left for one in stores if one.key == key]
        assert len(left) < 50, "it never leaves"
    assert left[:2] == [330, 300], "its own first"
    assert left[2:] == list(range(280, -1, -20)), "then half as many beside another's"
    assert 300 < second.n_cells < 400
    assert cache.n_free == 1000 - second.n_cells


def test_where_all_hold_the_same_beginning_the_oldest_goes_at_once() -> None:
    cache = cache_of(stores=True)
    _, second = kept_alike(cache, 900, 20, 30)
    cache.make_room(400, 40)
    assert cache.n_free >= 400
    assert cache.kept == (second,)


def test_it_tells_what_is_stored_next() -> None:
    cache = cache_of(stores=True)
    assert cache.next_to_leave == 0
    kept_in(cache, tokens(SHORTEST - 1))
    cache.kept[0].leaving = 0
    running = cache.open(tokens(270, 9000), "mine", None)
    cache.append(running, 270)
    shorter = np.append(tokens(260, 9000), 1).astype(np.int32)
    cache.keep(cache.open(shorter, "mine", cache.find(shorter, "mine")))
    cache.kept[0].leaving = 99
    assert cache.next_to_leave == 0, "it shares all with one that runs"
    cache.kept[0].leaving = 0
    first = kept_in(cache, tokens(300, 5000))
    kept_in(cache, tokens(300, 7000))
    assert cache.next_to_leave == 0, "nothing of it has left yet"
    cache.make_room(cache.n_free + SHORTEST + 9)
    assert cache.next_to_leave == first.leaving > 0
    kept_in(cache, tokens(20, 30_000))
    for other in cache.kept[:0:-1]:
        cache._touch(other)
    assert cache.kept[-1].n_cells == 20
    assert cache.next_to_leave == first.leaving, "short ones go without"
    cache.settle(first.leaving)
    assert cache.next_to_leave == 0


def test_where_nobody_says_how_much_what_is_shared_goes_at_once() -> None:
    cache = cache_of(stores=True)
    first, second = kept_alike(cache, 500, 20, 300)
    cache.make_room(cache.n_free + 30)
    cache.make_room(cache.n_free + 30)
    assert cache.kept == (second,)
    assert first.leaving > 0


def test_room_for_what_comes_back_is_made_in_parts() -> None:
    cache = cache_of(stores=True)
    first, _ = kept_alike(cache, 500, 20, 300)
    n_left = []
    for _ in range(3):
        cache.claim(cache.n_free + 30)
        n_left += [
            one.n_left
            for one in cache.take_operations()
            if isinstance(one, Store) and one.key == first.leaving
        ]
    assert n_left[0] == 500
    assert 0 < n_left[-1] < 500


@pytest.mark.parametrize("how", ["goes on", "settled", "not worth it"])
def test_what_leaves_a_second_time_begins_at_its_end(how: str) -> None:
    """Else as much would be copied at once as had been before."""
    cache = cache_of(stores=True)
    first, _ = kept_alike(cache, 500, 20, 300)
    for _ in range(4):
        cache.make_room(cache.n_free + 30, 40)
    assert 0 < first.n_uncopied < 480
    cache.take_operations()
    if how == "goes on":
        text = np.append(tokens(500), tokens(60, 70_000)).astype(np.int32)
        reuse = cache.find(text, "mine")
        assert reuse is not None
        assert reuse.source is first
        cache.append(cache.open(text, "mine", reuse), 60)
        cache.keep(first)
        cache._touch(cache.kept[-1])
    elif how == "settled":
        cache.settle(first.leaving)
        first.n_stored = 0
    else:
        cache._worth._share = 0.0
        cache._store(first, 100)
        cache._worth._share = 0.25
    cache.take_operations()
    for _ in range(4):
        cache.make_room(cache.n_free + 30, 40)
        for one in cache.take_operations():
            if isinstance(one, Store) and one.key == first.leaving:
                assert len(one.tokens) - one.n_left <= 80


def test_a_sequence_that_goes_on_is_stored_anew() -> None:
    cache = cache_of(stores=True)
    first, _ = kept_alike(cache, 500, 20, 300)
    for _ in range(3):
        cache.make_room(cache.n_free + 30, 40)
    assert first.n_uncopied > 0
    text = np.append(first.tokens[:500], 77_777).astype(np.int32)
    reuse = cache.find(text, "mine")
    assert reuse is not None
    assert reuse.source is first
    running = cache.open(text, "mine", reuse)
    assert (running.n_uncopied, running.leaving) == (0, 0)


def test_what_is_settled_is_not_stored_any_more() -> None:
    cache = cache_of(stores=True)
    sequence = kept_in(cache, tokens(900))
    cache.make_room(150)
    (store, _) = cache.take_operations()
    assert isinstance(store, Store)
    assert cache.stores_for(300)
    cache.settle(store.key + 1)
    assert cache.stores_for(300)
    cache.settle(store.key)
    assert not cache.stores_for(300)
    cache.make_room(300)
    assert cache.take_operations() == (Cut(sequence.slot, 700),)
    assert cache.leaving == set()


def test_it_tells_what_is_to_be_stored_already() -> None:
    cache = cache_of(stores=True)
    kept_in(cache, tokens(900))
    assert not cache.is_storing
    cache.make_room(150)
    assert cache.is_storing
    cache.take_operations()
    assert not cache.is_storing


def test_where_nothing_is_stored_more_is_given_up_at_a_time() -> None:
    cache = PrefixCache(6400, 2, PLAIN, lambda _slot: 0, 1)
    sequence = kept_in(cache, tokens(6000))
    cache.make_room(401)
    assert sequence.n_cells == 5900


@pytest.mark.parametrize("n_in_vain", [4, 60])
def test_one_whose_end_is_stored_is_not_cut_down_before_its_cells_are_needed(
    n_in_vain: int,
) -> None:
    """The rest at once would be a long copy. Where reuse does not pay at all it just goes."""
    cache = cache_of(stores=True)
    sequence = kept_in(cache, tokens(600))
    cache.make_room(500)
    cache.take_operations()
    for n in range(n_in_vain):
        cache.observe(tokens(300, 1000 * n), "", 0)
    other = cache.open(tokens(400, 5000), "", None)
    cache.append(other, 400)
    cache.keep(other)
    if n_in_vain == 60:
        assert cache.take_operations() == (Clear(0),)
        return
    assert cache.take_operations() == ()
    assert sequence.n_cells == 500
    cache.make_room(300)
    assert [one.n_left for one in cache.take_operations() if isinstance(one, Store)] == [300]


def test_one_that_runs_again_begins_to_leave_anew() -> None:
    cache = cache_of(stores=True)
    kept_in(cache, tokens(600))
    cache.make_room(500)
    again = cache.find(tokens(700), "mine")
    assert again is not None
    sequence = cache.open(tokens(700), "mine", again)
    cache.append(sequence, 700 - sequence.n_cells)
    cache.keep(sequence)
    cache.take_operations()
    cache.make_room(400)
    store = cache.take_operations()[0]
    assert isinstance(store, Store)
    assert store.tokens.tolist() == tokens(700).tolist()


def test_memory_that_is_set_aside_is_not_for_others() -> None:
    store = ColdStore(30, whole=False)
    every = [stored(300, first=1000 * n) for n in range(3)]
    for one in every:
        store.put(one)
    assert store.reserve(15)
    assert [one.state.closed for one in every] == [True, True, False]
    assert not store.reserve(16)
    large = stored(300, first=9000, n_bytes=16)
    store.put(large)
    assert large.state.closed
    assert (store.n_bytes, store.reserved_bytes) == (10, 15)
    store.reserved_bytes -= 15
    store.put(stored(300, first=8000, n_bytes=20))
    assert store.n_bytes == 30


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_there_already_is_known(whole: bool) -> None:
    store = ColdStore(100, whole=whole)
    store.put(stored(400, salt="mine"))
    assert store.covers(tokens(400), "mine")
    assert store.covers(tokens(300), "mine") == (not whole)
    assert not store.covers(tokens(400), "yours")
    assert not store.covers(tokens(401), "mine")


def test_a_load_that_reuses_nothing_stores_nothing_but_what_comes_back() -> None:
    cache = cache_of(stores=True)
    for n in range(60):
        cache.observe(tokens(300, 1000 * n), "", 0)
    for wanted in (False, True):
        sequence = cache.open(tokens(600), "", None)
        cache.append(sequence, 600)
        cache.keep(sequence, wanted=wanted)
        cache.take_operations()
        cache.make_room(1000)
        stored_first = isinstance(cache.take_operations()[0], Store)
        assert stored_first == wanted


def test_without_a_store_nothing_is_stored() -> None:
    cache = cache_of()
    sequence = cache.open(tokens(600), "", None)
    cache.append(sequence, 600)
    cache.keep(sequence, wanted=True)
    cache.take_operations()
    cache.make_room(1000)
    assert cache.take_operations() == (Clear(0),)


def test_a_place_is_claimed_from_what_is_kept_but_never_from_what_runs() -> None:
    cache = PrefixCache(1000, 2, Rules(shares=False), lambda _slot: 0, 1)
    running = cache.open(tokens(100), "", None)
    cache.append(running, 100)
    kept = cache.open(tokens(300, 5000), "", None)
    cache.append(kept, 300)
    cache.keep(kept)
    assert cache.claim(700) == kept.slot
    cache.adopt(kept.slot, tokens(700, 9000), "", n_stored=700)
    again = cache.find(tokens(800, 9000), "")
    assert again is not None
    assert again.n_tokens == 700
    second = cache.open(tokens(800, 9000), "", again)
    assert cache.claim(10) is None
    assert second.running


def test_one_that_is_taken_is_not_closed_by_those_that_come_meanwhile() -> None:
    store = ColdStore(20, whole=False)
    first = stored(300)
    store.put(first)
    store.take(first)
    for n in range(1, 4):
        store.put(stored(300, first=1000 * n))
    assert not first.state.closed
    store.put(first)
    assert not first.state.closed
    assert (len(store), store.n_bytes) == (2, 20)


def test_a_shared_beginning_survives_that_the_id_for_a_third_is_taken_from_one_of_its_two() -> None:
    """Two kept sequences share a beginning, every id is taken, and a third request begins alike."""
    cache = PrefixCache(10_000, 2, Rules(n_spare=1), lambda _slot: 0, 1)
    texts = [np.concatenate([tokens(100), tokens(50, 1000 * n)]) for n in (1, 2)]
    for text in texts:
        reuse = cache.find(text, "")
        sequence = cache.open(text, "", reuse)
        cache.append(sequence, len(text) - sequence.n_cells)
        cache.keep(sequence)
    other = cache.open(tokens(40, 7000), "", None)
    cache.append(other, 40)
    cache.take_operations()
    third = np.concatenate([tokens(100), tokens(30, 9000)])
    reuse = cache.find(third, "")
    assert reuse is not None
    sequence = cache.open(third, "", reuse)
    cache.append(sequence, len(third) - sequence.n_cells)
    assert cache.n_pinned == 130 + 40
    again = cache.find(np.append(third, 1).astype(np.int32), "")
    assert again is not None
    assert again.n_tokens == 130
    cache.make_room(10_000 - 170)
    cache.keep(sequence)
    cache.keep(other)
    while cache.evict_oldest():
        pass
    assert (cache.n_pinned, cache.n_kept) == (0, 0)
