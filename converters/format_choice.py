"""Which format each tensor gets so that a model of a wanted size loses least: bits go where they pay.

Each tensor has a few formats, and of each its bytes and what it loses, measured alone. Losses are taken to add up. The
choice is exact: tensors are few, and of the choices for the first ones only those are kept that no other beats in both
bytes and loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdengine.kernels.formats import WeightFormat


@dataclass(frozen=True)
class Option:
    """A tensor in one format."""

    format: WeightFormat
    size: int  # bytes
    loss: float  # of the model where only this tensor is in this format; any unit, 0 for none


_Partial = tuple[int, float, tuple[Option, ...]]  # size and loss of the options chosen so far


@dataclass(frozen=True)
class Choice:
    """A format for each tensor."""

    formats: Mapping[str, WeightFormat]
    size: int  # bytes of them all
    loss: float  # estimated: the sum of what each loses alone


def choose_formats(options: Mapping[str, Sequence[Option]], budget: int) -> Choice | None:
    """The formats of least loss whose tensors take at most `budget` bytes together; None where there are none.

    More bytes never lose more. Of equal losses the smaller choice is taken.
    """
    affordable = [choice for choice in best_choices(options) if choice.size <= budget]
    return affordable[-1] if affordable else None


def best_choices(options: Mapping[str, Sequence[Option]]) -> list[Choice]:
    """All choices that no other is as small as and loses less than: sizes rise, losses fall."""
    best: list[_Partial] = [(0, 0.0, ())]
    for several in options.values():
        best = _undominated(
            [(size + o.size, loss + o.loss, (*taken, o)) for size, loss, taken in best for o in several]
        )
    return [
        Choice({name: option.format for name, option in zip(options, taken, strict=True)}, size, loss)
        for size, loss, taken in best
    ]


def _undominated(choices: list[_Partial]) -> list[_Partial]:
    kept: list[_Partial] = []
    for choice in sorted(choices, key=lambda choice: choice[:2]):
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    return kept
