"""The block pool: no block is lost or given twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdengine.errors import ContextOverflowError
from svdengine.scheduling.block_pool import BlockPool


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
        pool.share(block)
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)


def test_blank_blocks_go_first_then_those_idle_for_longest() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.release([blocks[2], blocks[0], blocks[3]], kept={blocks[0], blocks[2]})
    pool.release([blocks[1]], kept={blocks[1]})
    pool.share(blocks[2])
    pool.release([blocks[2]], kept={blocks[2]})
    assert pool.allocate(1) == [blocks[3]]
    assert pool.idle_blocks == [blocks[0], blocks[1], blocks[2]]
    pool.blank(blocks[2])
    assert (pool.blank_count, pool.idle_count, pool.free_count) == (1, 2, 3)
    assert pool.allocate(3) == [blocks[2], blocks[0], blocks[1]]


_ACTIONS = st.tuples(st.sampled_from("asrkb"), st.integers(0, 5))


@given(st.integers(1, 12), st.lists(_ACTIONS, max_size=60))
def test_owners_are_counted(block_count: int, actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(block_count)
    holdings: list[list[int]] = []
    for action, number in actions:
        if action == "a" and pool.can_allocate(number):
            holdings.append(pool.allocate(number))
        elif action == "s" and (holdings or pool.idle_blocks):
            shared = list(holdings[number % len(holdings)]) if holdings else pool.idle_blocks
            for block in shared:
                pool.share(block)
            holdings.append(shared)
        elif action in "rk" and holdings:
            pool.release(holdings.pop(number % len(holdings)), range(block_count) if action == "k" else ())
        elif action == "b":
            pool.blank(number % block_count)
        owned = [block for holding in holdings for block in holding]
        assert all(pool.owner_count(block) == owned.count(block) for block in range(block_count))
        assert pool.free_count == block_count - len(set(owned)) == pool.blank_count + pool.idle_count
        assert not set(pool.idle_blocks) & set(owned)
    for holding in holdings:
        pool.release(holding)
    assert sorted(pool.allocate(block_count)) == list(range(block_count))
