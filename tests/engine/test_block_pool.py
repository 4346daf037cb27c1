"""The block pool: no block is lost or given twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdengine.block_pool import BlockPool
from svdengine.errors import ContextOverflowError


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(ContextOverflowError, match="2 KV blocks are needed and 1 of 3 are free"):
        pool.allocate(2)
    assert pool.free_count == 1


def test_misuse_is_refused() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(ValueError, match="free already"):
        pool.release([block])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share([block])
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("asr"), st.integers(0, 5)), max_size=60))
def test_owners_are_counted(block_count: int, actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(block_count)
    holdings: list[list[int]] = []
    for action, number in actions:
        if action == "a" and pool.can_allocate(number):
            holdings.append(pool.allocate(number))
        elif action == "s" and holdings:
            shared = list(holdings[number % len(holdings)])
            pool.share(shared)
            holdings.append(shared)
        elif action == "r" and holdings:
            pool.release(holdings.pop(number % len(holdings)))
        owned = [block for holding in holdings for block in holding]
        assert all(pool.owner_count(block) == owned.count(block) for block in range(block_count))
        assert pool.free_count == block_count - len(set(owned))
    for holding in holdings:
        pool.release(holding)
    assert sorted(pool.allocate(block_count)) == list(range(block_count))
