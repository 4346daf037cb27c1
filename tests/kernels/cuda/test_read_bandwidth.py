"""The kernel that measures read bandwidth reads every word once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from svdengine.kernels.cuda import bandwidth
from svdengine.kernels.cuda.bandwidth import Reader, read_bandwidth, read_words


@pytest.mark.parametrize("count", [4, 2048, 4 * 64 * 9 + 12])
def test_every_word_is_read_once(device: Any, count: int) -> None:
    words = np.random.default_rng(count).integers(0, 1 << 32, count, np.uint32)
    sums = device.upload(np.full(64, 7, np.uint32))
    device.launch(read_words, (2,), 32, device.upload(words), sums, count)
    assert np.bitwise_xor.reduce(device.download(sums)) == np.bitwise_xor.reduce(words)


def test_bandwidth_is_bytes_over_time(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BLOCKS", 1)
    monkeypatch.setattr(bandwidth, "THREADS", 32)
    monkeypatch.setattr(device, "seconds", lambda work: work() or 1e-6)
    reader = Reader(device, 1000)
    assert reader.size == 992
    assert read_bandwidth(device, reader) == pytest.approx(0.992)
