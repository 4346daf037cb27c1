"""How tests wait for what happens elsewhere: long, since the machine may be busy. Only a test that fails does so."""

import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds


def eventually(true: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    last = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < last, "it did not happen"
        time.sleep(0.01)
