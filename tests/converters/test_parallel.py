"""Parts of an array on all cores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdengine.converters.parallel import _openblas, one_blas_thread, over_parts


@given(st.integers(0, 50), st.integers(1, 9), st.none() | st.integers(1, 60))
def test_parts_cover_all_once_and_in_order(count: int, least: int, size: int | None) -> None:
    parts = over_parts(lambda part: part, count, least, size)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(part.stop - part.start >= least for part in parts[:-1])


def test_what_a_part_raises_comes_out() -> None:
    values = np.ones(100)

    def work(part: slice) -> float:
        if part.start >= 50:
            raise ValueError("a part failed")
        return float(values[part].sum())

    with pytest.raises(ValueError, match="a part failed"):
        over_parts(work, 100, size=10)


def test_products_take_one_thread_and_then_as_many_as_before() -> None:
    library = _openblas()
    if library is None:
        pytest.skip("NumPy has another library than OpenBLAS")
    before = library.threads()
    library.set_threads(2)
    try:
        with pytest.raises(ValueError), one_blas_thread():
            assert library.threads() == 1
            raise ValueError
        assert library.threads() == 2
    finally:
        library.set_threads(before)
