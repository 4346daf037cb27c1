"""What sequences are expected to need: against a simulation of their growth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.scheduling.forecast import AnswerLengths, most_further_blocks
from svdengine.scheduling.sequence import Sequence, blocks_for


def sequence(given: int, generated: int = 0, most: int | None = None, blocks: int | None = None) -> Sequence:
    one = Sequence([0] * given, most_tokens=most)
    one.tokens += [0] * generated
    one.block_table = list(range(blocks_for(len(one)) if blocks is None else blocks))
    return one


class Told(AnswerLengths):
    """Each sequence ends when it says so."""

    def remaining(self, sequence: Sequence) -> int:
        assert sequence.most_tokens is not None
        return sequence.most_tokens - len(sequence)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=8))
def test_the_most_is_what_a_simulation_finds(shapes: list[tuple[int, int, int]]) -> None:
    sequences = [sequence(given, generated, given + generated + more) for given, generated, more in shapes]
    held = sum(len(one.block_table) for one in sequences)
    most = 0
    for step in range(61):
        needed = sum(
            blocks_for(len(one) + step) for one, (_, _, more) in zip(sequences, shapes, strict=True) if more >= step
        )
        most = max(most, needed - held)
    assert most_further_blocks(sequences, Told()) == most


def test_what_is_shared_is_not_given_back() -> None:
    ends, goes_on = sequence(64, 0, 64), sequence(64, 0, 64 + 64)
    assert most_further_blocks([ends, goes_on], Told()) == 0
    ends.reused = 64
    assert most_further_blocks([ends, goes_on], Told()) == 4


def test_answers_are_expected_to_be_as_long_as_those_before() -> None:
    lengths = AnswerLengths()
    assert lengths.remaining(sequence(10)) == 256
    assert lengths.remaining(sequence(10, 0, 50)) == 40
    for length in range(1, 65):
        lengths.learn(sequence(10, 2 * length))
    assert 90 <= lengths.remaining(sequence(10)) <= 102
    assert 16 <= lengths.remaining(sequence(10, 100)) <= 24  # three quarters of those longer than 100
    assert lengths.remaining(sequence(10, 500)) == BLOCK_SIZE
    assert lengths.remaining(sequence(10, 500, 511)) == 1
    for _ in range(64):
        lengths.learn(sequence(10, 1000))
    assert lengths.remaining(sequence(10)) == 1000


def test_those_that_give_no_answer_do_not_grow() -> None:
    lengths = AnswerLengths()
    assert lengths.remaining(Sequence([1, 2], all_logits=True)) == 0
    lengths.learn(sequence(10))
    assert lengths.remaining(sequence(10)) == 256
