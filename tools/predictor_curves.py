"""Loss against bytes of kinds of predictors, end to end, on a text that none of them was fitted to.

    python -m svdengine.tools.predictor_curves relu.svdp --text LICENSE -o curves.html

All are fitted to the same text: the default one of `calibrate`, but for what the model writes itself. Those of ours
are measured at several prices of missed energy, the paper's at several shares s. A table is printed, and -o writes the
curves as a page. Scores by sign bits cannot run; `eval --predictors` ranks them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from svdengine.converters.default_text import default_text
from svdengine.converters.end_to_end import LossMeter, SparseCost
from svdengine.converters.ffn_layer import read_ffn_layer, require_sparse, run_neurons
from svdengine.converters.paper_predictor import PaperOptions, build_paper_predictor
from svdengine.converters.predictors import build_predictor
from svdengine.converters.statistics import Statistics, StatisticsCollector, collect_statistics, layer_sample
from svdengine.converters.thresholds import SLACK, error_thresholds, make_sample
from svdengine.files.model_file import ModelFile
from svdengine.kernels.predictor import LayerPredictor, Predictor, scores
from svdengine.llm import LLM
from svdengine.loading import load
from svdengine.measuring.memory_traffic import ffn_bytes, sparse_weight_bytes, weight_bytes
from svdengine.measuring.perplexity import split_text
from svdengine.measuring.svg_chart import Series, line_chart
from svdengine.models.tensors import Place

PRICES = (1e-3, 1e-2, 1e-1)
SHARES = (0.4, 0.6, 0.8)  # the paper's s
ROWS = 4096  # tokens that thresholds are fitted to
WINDOW = 256  # tokens
_TEXT = "text"


@dataclass(frozen=True)
class Kind:
    """A predictor to try."""

    kind: str  # of converters/predictors.py, or greedy: the paper's own
    rank: int = 0
    bits: int = 0

    @property
    def name(self) -> str:
        """For people: svd 64 + 2 bits."""
        name = self.kind.removesuffix("+lowbit")
        name += f" {self.rank}" if self.rank else ""
        bits = f"{self.bits} bits" if self.bits > 1 else "1 bit"
        return f"{name}{' +' if self.rank else ''} {bits}" if self.bits else name


@dataclass(frozen=True)
class Measured:
    """A predictor at one strictness."""

    name: str
    strictness: float  # the price, or s
    cost: SparseCost
    predicted: float  # share of neurons
    computed: float
    bytes_share: float  # of the dense FFNs' bytes


def kinds_of(hidden_size: int) -> tuple[Kind, ...]:
    """Those to compare in a model of this width."""
    small, large = max(1, hidden_size // 9), max(1, hidden_size // 9 * 2)
    return (
        Kind("svd", large),
        Kind("svd-naive", large),
        Kind("lowbit", 0, 1),
        Kind("lowbit", 0, 2),
        Kind("svd+lowbit", small, 2),
        Kind("greedy", large),
    )


def measure(llm: LLM, text: str, kinds: Sequence[Kind], tokens: int, rows: int = ROWS) -> Iterator[Measured]:
    """Every kind at every strictness, on `text`. The model must be idle and dense."""
    file, executor = llm.model_file, llm.executor
    require_sparse(file.config)
    windows = default_text(llm.tokenizer, file.chat_template, tokens, min(WINDOW, llm.context))
    collector = StatisticsCollector(file.config.layer_count, file.config.hidden_size, fit_rows=rows)
    source: Any = executor
    statistics = collect_statistics(source, windows, collector)
    meter = LossMeter(source, {_TEXT: split_text(llm, text, min(2 * WINDOW, llm.context)).windows})
    for kind in kinds:
        for strictness, predictor in _predictors(file, statistics, kind):
            before = executor.neuron_counts()
            cost = meter.costs(predictor)[_TEXT]
            counts = executor.neuron_counts() - before
            shares = counts.predicted_density or 0.0, counts.active_density or 0.0
            yield Measured(kind.name, strictness, cost, *shares, bytes_share(file, predictor, *shares))


def _predictors(file: ModelFile, statistics: Statistics, kind: Kind) -> Iterator[tuple[float, Predictor]]:
    if kind.kind == "greedy":
        for share in SHARES:
            options = PaperOptions(share, "full", "q8")
            built = [
                build_paper_predictor(
                    index, read_ffn_layer(file, index),
                    layer_sample(statistics, Place(index), held_out=False), kind.rank,
                    options, moments,
                )
                for index, moments in enumerate(statistics.layers)
            ]  # fmt: skip
            yield share, Predictor(tuple(built), {})
        return
    layers: list[list[LayerPredictor]] = [[] for _ in PRICES]
    for index, moments in enumerate(statistics.layers):
        layer = read_ffn_layer(file, index)
        predictor = build_predictor(kind.kind, layer, moments, kind.rank, kind.bits)
        x = layer_sample(statistics, Place(index), held_out=False)
        sample = make_sample(scores(predictor, x), run_neurons(layer, x))
        raised = error_thresholds(sample, np.array(PRICES), layer.row_bytes) - np.float32(SLACK) * sample.spread
        for found, thresholds in zip(layers, raised, strict=True):
            found.append(replace(predictor, threshold=predictor.threshold + thresholds))
    for price, found in zip(PRICES, layers, strict=True):
        yield price, Predictor(tuple(found), {})


def bytes_share(file: ModelFile, predictor: Predictor, predicted: float, computed: float) -> float:
    """Bytes that the FFNs of a decoded token read, as a share of the dense ones."""
    around = weight_bytes(file) - ffn_bytes(file)
    return (sparse_weight_bytes(file, predictor, predicted, computed) - around) / ffn_bytes(file)


def markdown(found: Sequence[Measured]) -> str:
    """A table of all."""
    lines = [
        "| predictor | price, or s | perplexity | KL, nats | same likeliest token | predicted | computed | FFN bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        cost = one.cost
        lines.append(
            f"| {one.name} | {one.strictness:g} | {100 * cost.perplexity_rise:+.2f} % | {cost.kl:.5f}"
            f" | {100 * cost.agreement:.1f} % | {100 * one.predicted:.1f} % | {100 * one.computed:.1f} %"
            f" | 1/{1 / one.bytes_share:.2f} |"
        )
    return "\n".join(lines)


def page(found: Sequence[Measured], title: str) -> str:
    """The curves as a page: divergence, as a logarithm, against bytes."""
    names = list(dict.fromkeys(one.name for one in found))
    series = [
        Series(name, tuple(map(_point, (one for one in found if one.name == name))), dashed=name.startswith("greedy"))
        for name in names
    ]
    chart = line_chart(series, "bytes of the FFNs, % of dense", "KL divergence, log10 nats a token")
    style = files("svdengine.measuring").joinpath("report.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{chart}</main></body></html>\n'


def _point(one: Measured) -> tuple[float, float]:
    return 100 * one.bytes_share, math.log10(max(one.cost.kl, 1e-7))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .svdp file of the ReLU family")
    parser.add_argument("--text", type=Path, required=True, help="the text to measure on")
    parser.add_argument("--tokens", type=int, default=16_384, help="of text to fit to")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, help="a page with the curves")
    chosen = parser.parse_args(arguments)
    found = []
    with load(chosen.model, "cpu", "dense", chosen.threads, context=2 * WINDOW, kv_tokens=2 * WINDOW) as llm:
        kinds = kinds_of(llm.config.hidden_size)
        for one in measure(llm, chosen.text.read_text(encoding="utf-8"), kinds, chosen.tokens):
            found.append(one)
            print(markdown([one]).splitlines()[-1], flush=True)
    if chosen.output is not None:
        chosen.output.write_text(page(found, f"Predictors of {chosen.model.name}"), encoding="utf-8")


if __name__ == "__main__":
    main()
