"""Charts as inline SVG with the colours of the report: classes c0, c1, ... of a series, and axis, grid, mark, point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
_LETTER, _LINE = 7.2, 12.0  # about the size of a letter of a label
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line; points that are not finite interrupt it."""

    name: str
    points: tuple[Point, ...]
    dashed: bool = False
    labels: tuple[str, ...] = ()  # of the points, all of which are shown; empty: none


@dataclass(frozen=True)
class Axes:
    """Where values lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, point: Point) -> Point:
        """Data coordinates to those of the picture."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    x_format: Format = "{:g}".format,
    y_format: Format = "{:g}".format,
) -> str:
    """Lines with points, and a legend. Raises ValueError when there is no finite point."""
    points = [p for one in series for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        raise ValueError("there is nothing to draw")
    ys = y_range or _room([p[1] for p in points])
    axes = Axes(_room([p[0] for p in points]), ys)
    body = _frame(axes, x_label, y_label, x_format, y_format)
    labelled: list[Box] = []
    for number, one in enumerate(series):
        body += _line(axes, number, one, x_format, y_format)
    for one in series:  # after all lines, which would cross them
        body += _labels(axes, one, labelled)
    return _picture(body, f"{y_label} against {x_label}") + _legend([(one.name, one.dashed) for one in series])


def histogram(groups: Sequence[tuple[str, Sequence[float]]], x_label: str, mark: float, mark_label: str) -> str:
    """Values of each group as bars over the same bins, one group in front of another, and a vertical mark."""
    values = sorted(v for _, group in groups for v in group if math.isfinite(v))
    if not values:
        raise ValueError("there is nothing to draw")
    # The outermost values in a thousand would squeeze the rest.
    low, high = values[len(values) // 1000], values[-1 - len(values) // 1000]
    low, high = _room([low, high, mark])
    bins = 48
    counts = [_bin(group, low, high, bins) for _, group in groups]
    axes = Axes((low, high), (0.0, 1.08 * max(max(c) for c in counts) or 1.0))
    body = _frame(axes, x_label, "tokens", "{:g}".format, "{:g}".format)
    width = (high - low) / bins
    for number, group in enumerate(counts):
        for i, count in enumerate(group):
            if count:
                x0, y0 = axes.place((low + i * width, count))
                x1, y1 = axes.place((low + (i + 1) * width, 0))
                title = f"{groups[number][0]}: {count} tokens from {low + i * width:.3g} to {low + (i + 1) * width:.3g}"
                body += (
                    f'<rect class="bar c{number}" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}"'
                    f' height="{y1 - y0:.1f}"><title>{escape(title)}</title></rect>'
                )
    x, top = axes.place((mark, axes.y[1]))
    side = "end" if x > WIDTH / 2 else "start"
    body += f'<line class="mark" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
    body += f'<text class="label" x="{x + (-6 if side == "end" else 6):.1f}" y="{top + 12:.1f}" text-anchor="{side}">'
    body += f"{escape(mark_label)}</text>"
    return _picture(body, f"histogram of {x_label}") + _legend([(name, False) for name, _ in groups])


def share_map(rows: Sequence[tuple[int, Sequence[tuple[float, bool]]]], x_label: str, y_label: str) -> str:
    """Squares of shares, a line a row: the darker, the larger; each row is a number, and its shares, marked or not."""
    columns = max(len(cells) for _, cells in rows)
    axes = Axes((-0.5, columns - 0.5), (len(rows) - 0.5, -0.5))  # the first row on top
    most = max((share for _, cells in rows for share, _ in cells), default=0.0) or 1.0
    body = _labels_of_axes(x_label, y_label)
    for index in _some(columns):
        x, _ = axes.place((index, 0.0))
        body += f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{index}</text>'
    shown = set(_some(len(rows)))
    for line, (number, cells) in enumerate(rows):
        left, top = axes.place((-0.5, line - 0.5))
        right, bottom = axes.place((0.5, line + 0.5))
        width, height = right - left, bottom - top
        if line in shown:
            body += f'<text x="{LEFT - 7}" y="{top + height / 2 + 4:.1f}" text-anchor="end">{number}</text>'
        for column, (share, marked) in enumerate(cells):
            x, wide, high = left + column * width, 0.94 * width, 0.94 * height
            title = f"{y_label} {number}, {x_label} {column}: {100 * share:.2f} %"
            body += f'<rect class="bar c0" x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            body += f' style="opacity:{0.04 + 0.96 * share / most:.2f}"><title>{escape(title)}</title></rect>'
            if marked:
                middle = f'cx="{x + wide / 2:.1f}" cy="{top + high / 2:.1f}"'
                body += f'<circle class="dot" {middle} r="{max(1.0, min(3.0, width / 5, height / 5)):.1f}"/>'
    return _picture(body, f"{y_label} by {x_label}")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _room(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with a margin."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _bin(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        if low <= value <= high:
            counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    return counts


def _frame(axes: Axes, x_label: str, y_label: str, x_format: Format, y_format: Format) -> str:
    body = ""
    for value in ticks(*axes.y):
        _, y = axes.place((axes.x[0], value))
        body += f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        body += f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(value))}</text>'
    for value in ticks(*axes.x):
        x, _ = axes.place((value, axes.y[0]))
        body += f'<line class="axis" x1="{x:.1f}" y1="{HEIGHT - BOTTOM}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM + 4}"/>'
        body += f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(x_format(value))}</text>'
    body += f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>'
    return body + _labels_of_axes(x_label, y_label)


def _some(count: int) -> list[int]:
    """Numbers below `count` that have room at an axis."""
    return [int(tick) for tick in ticks(0, max(count - 1, 1), 8) if tick == int(tick) and tick < count]


def _labels_of_axes(x_label: str, y_label: str) -> str:
    middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    body = f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    turned = f'transform="rotate(-90 13 {height})"'
    return body + f'<text class="label" x="13" y="{height}" text-anchor="middle" {turned}>{escape(y_label)}</text>'


def _line(axes: Axes, number: int, series: Series, x_format: Format, y_format: Format) -> str:
    path, drawing, marks = "", False, ""
    for point in series.points:
        if not all(map(math.isfinite, point)):
            drawing = False
            continue
        x, y = axes.place(point)
        path += f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}"
        drawing = True
        title = f"{series.name}: {x_format(point[0])}, {y_format(point[1])}"
        marks += f'<circle class="point c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
        marks += f"<title>{escape(title)}</title></circle>"
    dashed = ' stroke-dasharray="5 4"' if series.dashed else ""
    return f'<path class="line c{number}" d="{path}"{dashed}/>' + marks


def _labels(axes: Axes, series: Series, taken: list[Box]) -> str:
    """A label beside each point that has one: where it covers no other, or where it covers least."""
    body = ""
    for point, label in zip(series.points, series.labels, strict=False):
        if not label or not all(map(math.isfinite, point)):
            continue
        x, y = axes.place(point)
        width = _LETTER * len(label)
        boxes = [
            (left, y + up - _LINE, left + width, y + up)
            for up in (-7.0, 17.0, -21.0, 31.0, -35.0, 45.0)
            for left in (x + 5, x - 5 - width, x - width / 2)
        ]
        inside = [b for b in boxes if b[0] >= LEFT and b[2] <= WIDTH and b[1] >= 0 and b[3] <= HEIGHT - BOTTOM]
        best = min(inside or boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(best)
        body += f'<text class="label" x="{best[0]:.1f}" y="{best[3]:.1f}">{escape(label)}</text>'
    return body


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _picture(body: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>{body}</svg>'


def _legend(entries: Sequence[tuple[str, bool]]) -> str:
    items = [
        f'<li><span class="key c{number}{" dashed" if dashed else ""}"></span>{escape(name)}</li>'
        for number, (name, dashed) in enumerate(entries)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
