"""Counters and histograms, in the text format that Prometheus reads. For the event loop's thread only."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from svdengine.completion import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """How many observations lie at or below each bound."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Add one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The samples."""
        below = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {below}"


class Metrics:
    """What the server did since it started."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.finished: Counter[str] = Counter()  # completions by finish reason
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token = Histogram(_SECONDS)
        self.next_token = Histogram(_TOKEN_SECONDS)  # mean of each completion
        self.duration = Histogram(_SECONDS)

    def completed(self, stats: Stats, finish_reason: str) -> None:
        """Note a completion."""
        self.finished[finish_reason] += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.generated_tokens += stats.generated_tokens
        self.duration.observe(stats.seconds)
        if stats.generated_tokens:
            self.first_token.observe(stats.time_to_first_token)
        if stats.tokens_per_second:
            self.next_token.observe(1 / stats.tokens_per_second)

    def text(self, gauges: Iterable[tuple[str, str, float]] = ()) -> str:
        """All of it. `gauges`: name, help and value of what is measured now."""
        lines = [
            *_counter(
                "http_responses_total",
                "Responses by path and status.",
                {(("path", path), ("status", str(status))): n for (path, status), n in self.responses.items()},
            ),
            *_counter(
                "completions_total",
                "Completions by what ended them.",
                {(("finish_reason", reason),): n for reason, n in self.finished.items()},
            ),
            *_counter("prompt_tokens_total", "Tokens of prompts.", {(): self.prompt_tokens}),
            *_counter("cached_tokens_total", "Of these, tokens found in the KV cache.", {(): self.cached_tokens}),
            *_counter("generated_tokens_total", "Tokens generated.", {(): self.generated_tokens}),
            *_histogram("time_to_first_token_seconds", "From a request to its first token.", self.first_token),
            *_histogram("time_per_output_token_seconds", "Mean of each completion, after the first.", self.next_token),
            *_histogram("completion_seconds", "From a request to its end.", self.duration),
        ]
        for name, help_text, value in gauges:
            lines += [*_described(name, help_text, "gauge"), f"svdengine_{name} {value:g}"]
        memory = resident_bytes()
        if memory is not None:
            lines += [
                "# HELP process_resident_memory_bytes Memory in use.",
                "# TYPE process_resident_memory_bytes gauge",
            ]
            lines.append(f"process_resident_memory_bytes {memory}")
        return "\n".join(lines) + "\n"


def resident_bytes() -> int | None:
    """Memory of this process that is resident, where the system says."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _counter(name: str, help_text: str, values: dict[Labels, int]) -> Iterator[str]:
    yield from _described(name, help_text, "counter")
    for labels, value in values.items():
        inside = ",".join(f'{label}="{text}"' for label, text in labels)
        yield f"svdengine_{name}{{{inside}}} {value}" if inside else f"svdengine_{name} {value}"


def _histogram(name: str, help_text: str, histogram: Histogram) -> Iterator[str]:
    yield from _described(name, help_text, "histogram")
    yield from histogram.lines(f"svdengine_{name}")


def _described(name: str, help_text: str, kind: str) -> Iterator[str]:
    yield f"# HELP svdengine_{name} {help_text}"
    yield f"# TYPE svdengine_{name} {kind}"
