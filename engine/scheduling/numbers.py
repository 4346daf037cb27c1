"""Numbers that programs give, checked once, where they enter: of the right kind, finite, and in range.

Whole numbers of Python have no end: one of 400 digits is no float, and one of 5,000 cannot even be printed. So they are
compared before they are used for anything else, and shown with care.
"""

from __future__ import annotations

import math
from typing import Any

from svdengine.errors import RequestError, shown


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise RequestError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and _odd(value)):
        raise RequestError(f"{name} must be a number, found {shown(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must lie between {low:g} and {high:g}, found {shown(value)}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raise RequestError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, found {shown(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must lie between {low} and {high}, found {shown(value)}")


def _odd(value: float) -> bool:
    return not math.isfinite(value)
