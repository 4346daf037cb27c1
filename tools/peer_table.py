"""The table of a comparison with llama.cpp, in Markdown, to be pasted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """What one engine reached in one work."""

    seconds: tuple[float, ...]  # of each repetition
    tokens: int  # that a repetition processed
    weight_bytes: int | None  # read for each token; None where many tokens share a read, in prefill

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def speed(self) -> float:
        """Tokens a second, the median."""
        return statistics.median(self.speeds)

    @property
    def deviation(self) -> float:
        """Standard deviation of the repetitions; 0 of a single one."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    @property
    def gb_per_second(self) -> float | None:
        """Weights read a second."""
        return None if self.weight_bytes is None else self.weight_bytes * self.speed / 1e9


@dataclass(frozen=True)
class Row:
    """One work, done by both."""

    work: str
    llama_cpp: Side
    svdengine: Side

    @property
    def ratio(self) -> float:
        """Of the medians: above 1, svdengine is faster."""
        return self.svdengine.speed / self.llama_cpp.speed


_HEADER = (
    "| work | llama.cpp tok/s | svdengine tok/s | ratio | llama.cpp GB/s | svdengine GB/s |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
)


def markdown(rows: Sequence[Row], bandwidth: float, notes: Sequence[str]) -> str:
    """The table, and below it the notes. `bandwidth` is what the machine's memory gives, in GB/s."""
    lines = [*_HEADER, *(_line(row, bandwidth) for row in rows), ""]
    lines.append(f"Read bandwidth of the machine: {bandwidth:.1f} GB/s; shares of it in parentheses.")
    return "\n".join([*lines, *notes])


def as_dicts(rows: Sequence[Row], bandwidth: float) -> list[dict[str, Any]]:
    """The rows as plain JSON types."""
    return [
        {
            "work": row.work,
            "ratio": row.ratio,
            "bandwidth_gb_per_second": bandwidth,
            "llama_cpp": _side_dict(row.llama_cpp),
            "svdengine": _side_dict(row.svdengine),
        }
        for row in rows
    ]


def _line(row: Row, bandwidth: float) -> str:
    a, b = row.llama_cpp, row.svdengine
    cells = [row.work, _speed(a), _speed(b), f"{row.ratio:.2f}", _share(a, bandwidth), _share(b, bandwidth)]
    return f"| {' | '.join(cells)} |"


def _speed(side: Side) -> str:
    return f"{side.speed:.2f} ± {side.deviation:.2f}"


def _share(side: Side, bandwidth: float) -> str:
    reached = side.gb_per_second
    return "" if reached is None else f"{reached:.1f} ({reached / bandwidth:.0%})"


def _side_dict(side: Side) -> dict[str, Any]:
    return {
        "tokens_per_second": side.speed,
        "stddev": side.deviation,
        "repetitions": side.speeds,
        "bytes_per_token": side.weight_bytes,
        "gb_per_second": side.gb_per_second,
    }
