"""Counters and histograms, in the text format that Prometheus reads. For the event loop's thread only."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from svdengine.scheduling.completion import Stats
from svdengine.scheduling.engine_loop import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


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
        self.first_token = Histogram(_SECONDS)
        self.next_token = Histogram(_TOKEN_SECONDS)  # mean of each completion
        self.duration = Histogram(_SECONDS)

    def completed(self, stats: Stats, finish_reason: str) -> None:
        """Note a completion."""
        self.finished[finish_reason] += 1
        self.duration.observe(stats.seconds)
        if stats.generated_tokens:
            self.first_token.observe(stats.time_to_first_token)
        if stats.tokens_per_second:
            self.next_token.observe(1 / stats.tokens_per_second)

    def text(self, engine: EngineStats, request_count: int, capacity: int) -> str:
        """All of it. `request_count` completions run or wait, at most `capacity`."""
        responses = {_labels(path=path, status=str(status)): n for (path, status), n in self.responses.items()}
        finished = {_labels(finish_reason=reason): n for reason, n in self.finished.items()}
        steps = {_labels(ffn=path): n for path, n in engine.steps.items()}
        rows = {_labels(ffn=path): n for path, n in engine.rows.items()}
        blocks = {"used": engine.blocks_used, "cached": engine.blocks_cached, "free": engine.blocks_free}
        sequences = {"running": engine.running, "waiting": engine.waiting}
        lines = [
            *_samples("http_responses_total", "counter", "Responses by path and status.", responses),
            *_samples("completions_total", "counter", "Completions by what ended them.", finished),
            *_samples("prompt_tokens_total", "counter", "Tokens read in prompts.", engine.prompt_tokens),
            *_samples(
                "prefix_hit_tokens_total", "counter", "Tokens not read: known already.", engine.prefix_hit_tokens
            ),
            *_samples("generated_tokens_total", "counter", "Tokens generated.", engine.generated_tokens),
            *_samples("steps_total", "counter", "Steps of the model, by how the FFN ran.", steps),
            *_samples("step_tokens_total", "counter", "Tokens of these steps.", rows),
            *_samples("preemptions_total", "counter", "Sequences put back into the queue.", engine.preemptions),
            *_histogram("time_to_first_token_seconds", "From a request to its first token.", self.first_token),
            *_histogram("time_per_output_token_seconds", "Mean of each completion, after the first.", self.next_token),
            *_histogram("completion_seconds", "From a request to its end.", self.duration),
            *_samples("requests", "gauge", "Completions that run or wait.", request_count),
            *_samples("request_capacity", "gauge", "Most completions that may run or wait.", capacity),
            *_samples(
                "sequences", "gauge", "Of these, in the engine.", {_labels(state=k): n for k, n in sequences.items()}
            ),
            *_samples(
                "kv_blocks", "gauge", "Blocks of the KV cache.", {_labels(state=k): n for k, n in blocks.items()}
            ),
        ]
        lines += _expert_lines(engine.experts)
        memory = resident_bytes()
        if memory is not None:
            name = "process_resident_memory_bytes"
            lines += [f"# HELP {name} Memory in use.", f"# TYPE {name} gauge", f"{name} {memory}"]
        return "\n".join(lines) + "\n"


def _expert_lines(layers: Sequence[Sequence[int]]) -> Iterator[str]:
    """Of a mixture, a line a layer: each expert's own would be thousands."""
    if not layers:
        return
    chosen = {_labels(layer=str(i)): sum(layer) for i, layer in enumerate(layers)}
    used = {_labels(layer=str(i)): sum(map(bool, layer)) for i, layer in enumerate(layers)}
    busiest = {_labels(layer=str(i)): max(layer) for i, layer in enumerate(layers)}
    yield from _samples("expert_choices_total", "counter", "Experts chosen for tokens, by layer with experts.", chosen)
    yield from _samples("busiest_expert_choices_total", "counter", "Of these, the expert chosen most.", busiest)
    yield from _samples("experts_used", "gauge", "Experts that some token had.", used)


def resident_bytes() -> int | None:
    """Memory of this process that is resident, where the system says."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def _samples(name: str, kind: str, help_text: str, values: int | Mapping[str, int]) -> Iterator[str]:
    """One value, or values by their labels."""
    yield from _described(name, help_text, kind)
    for labels, value in values.items() if isinstance(values, Mapping) else [("", values)]:
        yield f"svdengine_{name}{labels} {value}"


def _histogram(name: str, help_text: str, histogram: Histogram) -> Iterator[str]:
    yield from _described(name, help_text, "histogram")
    yield from histogram.lines(f"svdengine_{name}")


def _described(name: str, help_text: str, kind: str) -> Iterator[str]:
    yield f"# HELP svdengine_{name} {help_text}"
    yield f"# TYPE svdengine_{name} {kind}"
