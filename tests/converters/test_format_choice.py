"""Which format each tensor gets: the budget is kept, nothing is better, and more bytes never lose more."""

import itertools
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svdengine.converters.format_choice import Option, best_choices, choose_formats

FORMATS: Any = ("q8", "q6", "q4")
SIZES = st.integers(1, 1000)
LOSSES = st.integers(0, 1000).map(float)  # whole numbers, so that sums are exact in any order
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TENSORS = st.lists(st.lists(st.tuples(SIZES, LOSSES), min_size=1, max_size=3), min_size=1, max_size=4)


def options_of(tensors: list[list[tuple[int, float]]]) -> dict[str, list[Option]]:
    return {
        str(number): [Option(FORMATS[i], size, loss) for i, (size, loss) in enumerate(several)]
        for number, several in enumerate(tensors)
    }


@RELAXED
@given(TENSORS, st.integers(0, 4000))
def test_it_is_the_best_that_fits(tensors: list[list[tuple[int, float]]], budget: int) -> None:
    options = options_of(tensors)
    fitting = [
        (sum(option.loss for option in every), sum(option.size for option in every))
        for every in itertools.product(*options.values())
        if sum(option.size for option in every) <= budget
    ]
    found = choose_formats(options, budget)
    if found is None:
        assert not fitting
        return
    assert found.size <= budget
    assert (found.loss, found.size) == min(fitting)
    chosen = [next(o for o in options[name] if o.format == one) for name, one in found.formats.items()]
    assert (sum(o.size for o in chosen), sum(o.loss for o in chosen)) == (found.size, found.loss)
    assert found.formats.keys() == options.keys()


@RELAXED
@given(TENSORS, st.integers(0, 4000), st.integers(0, 1000))
def test_more_bytes_never_lose_more(tensors: list[list[tuple[int, float]]], budget: int, more: int) -> None:
    options = options_of(tensors)
    less = choose_formats(options, budget)
    if less is not None:
        found = choose_formats(options, budget + more)
        assert found is not None and found.loss <= less.loss


@RELAXED
@given(TENSORS)
def test_choices_rise_in_size_and_fall_in_loss(tensors: list[list[tuple[int, float]]]) -> None:
    best = best_choices(options_of(tensors))
    assert all(a.size < b.size and a.loss > b.loss for a, b in itertools.pairwise(best))
    assert best[0].size == sum(min(size for size, _ in several) for several in tensors)
    assert best[-1].loss == sum(min(loss for _, loss in several) for several in tensors)
