"""The table of a comparison with other engines, in Markdown, to be pasted; and the same as JSON, to be kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdengine.tools.peer_engines import SVDENGINE


@dataclass(frozen=True)
class Side:
    """What one engine reached in one work."""

    values: tuple[float, ...]  # of each repetition, in the row's unit
    bytes_per_token: float | None = None  # read for each token; None where that is not known, or shared by many
    way: str = ""  # how it was run, where it has several ways

    @property
    def median(self) -> float:
        """Of the repetitions."""
        return statistics.median(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the repetitions; 0 of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def gb_per_second(self) -> float | None:
        """Read a second, of a side whose values are tokens a second."""
        return None if self.bytes_per_token is None else self.bytes_per_token * self.median / 1e9


@dataclass(frozen=True)
class Row:
    """One work, done by all. A side is missing where its engine failed, or is not there."""

    work: str
    sides: Mapping[str, Side]  # by the engine's name
    unit: str = "tokens/s"
    bandwidth: float | None = None  # what the machine's memory gave in the same minutes, GB/s
    failures: Mapping[str, str] = field(default_factory=dict)  # by the engine's name, what it said

    def ratio(self, peer: str) -> float | None:
        """Of the medians, ours to the peer's; None where one is missing."""
        if peer not in self.sides or SVDENGINE not in self.sides or not self.sides[peer].median:
            return None
        return self.sides[SVDENGINE].median / self.sides[peer].median


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, and below it what failed and the notes."""
    peers = [name for name in dict.fromkeys(name for row in rows for name in row.sides) if name != SVDENGINE]
    head = ["work", "unit", SVDENGINE]
    for peer in peers:
        head += [peer, f"ours / {peer}"]
    head += ["ours, GB/s", "memory, GB/s"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *(_cells(row, peers) for row in rows)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    failed = [f"{row.work}: {reason}." for row in rows for reason in row.failures.values()]
    return "\n".join([*table, "", *failed, *notes])


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    cells = [row.work, row.unit, _figure(row, SVDENGINE)]
    for peer in peers:
        ratio = row.ratio(peer)
        cells += [_figure(row, peer), "" if ratio is None else f"{ratio:.2f}"]
    ours = row.sides.get(SVDENGINE)
    for value in (None if ours is None else ours.gb_per_second, row.bandwidth):
        cells.append("" if value is None else f"{value:.1f}")
    return cells


def _figure(row: Row, name: str) -> str:
    if name not in row.sides:
        return "failed" if name in row.failures else ""
    side = row.sides[name]
    way = f" ({side.way})" if side.way and name != SVDENGINE else ""
    spread = f" ± {side.deviation:.3g}" if len(side.values) > 1 else ""
    return f"{side.median:.{_places(side.median)}f}{spread}{way}"


def _places(value: float) -> int:
    """Decimal places that leave three or four digits."""
    return 0 if value >= 1000 else 1 if value >= 100 else 2


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain JSON types."""
    return [
        {
            "work": row.work,
            "unit": row.unit,
            "bandwidth_gb_per_second": row.bandwidth,
            "failures": dict(row.failures),
            "ratios": {name: row.ratio(name) for name in row.sides if name != SVDENGINE},
            "sides": {name: _side_dict(side) for name, side in row.sides.items()},
        }
        for row in rows
    ]


def from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows that `as_dicts` made plain. Raises KeyError or TypeError where they are not."""
    rows = []
    for row in dicts:
        sides = {
            name: Side(tuple(side["values"]), side["bytes_per_token"], side["way"])
            for name, side in row["sides"].items()
        }
        rows.append(Row(row["work"], sides, row["unit"], row["bandwidth_gb_per_second"], row["failures"]))
    return rows


def _side_dict(side: Side) -> dict[str, Any]:
    return {
        "median": side.median,
        "stddev": side.deviation,
        "values": list(side.values),
        "way": side.way,
        "bytes_per_token": side.bytes_per_token,
        "gb_per_second": side.gb_per_second,
    }
