"""How well predictors rank the neurons of each layer, on held-out tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import RequestError
from svdengine.files.predictor_file import require_relu_family

if TYPE_CHECKING:
    from svdengine.converters.ffn_layer import FfnLayer, Neurons
    from svdengine.converters.predictor_quality import Scorer, Selection
    from svdengine.converters.statistics import LayerStatistics, Statistics
    from svdengine.kernels.predictor import LayerPredictor, Predictor
    from svdengine.llm import LLM

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is, and all

WINDOW = 256  # tokens
FIT_ROWS = 4096  # tokens that predictors are fitted to
HELD_OUT_ROWS = 1024  # tokens that they are measured on
COMPARED_LAYERS = 12  # of a deep model, in which predictors are made to compare with: that takes seconds a layer
OWN = "this model's"


@dataclass(frozen=True)
class LayerStudy:
    """One layer: every predictor's ranking, and what the model's own one and others with thresholds select."""

    layer: int
    auroc: dict[str, float]  # name of a predictor -> its AUROC, NaN where no neuron is active on some tokens only
    compared: bool  # whether those that are made to compare with are among them
    active_density: float  # share of neurons whose gate is not zero
    selections: dict[str, Selection]  # by predictor


@dataclass(frozen=True)
class NeuronScores:
    """Scores of one neuron by the model's own predictor, which computes it where they are above 0."""

    layer: int
    neuron: int
    active: tuple[float, ...]  # on tokens for which the neuron is active
    inactive: tuple[float, ...]


@dataclass(frozen=True)
class PredictorStudy:
    """All layers, and one neuron of the middle one."""

    layers: tuple[LayerStudy, ...]
    neuron: NeuronScores | None  # None: the model has no predictor
    fit_tokens: int
    held_out_tokens: int


def study_predictors(
    llm: LLM, text: str, progress: Progress | None = None, predictors: Mapping[str, Predictor] | None = None
) -> PredictorStudy:
    """Fit predictors of several kinds to four fifths of `text`, and measure them and the model's own on the rest.

    `predictors`: those of the model to measure, by name, the first one in most detail; by default its own.

    `llm` must be idle. Raises RequestError for a model outside the ReLU family, ConversionError when the text is too
    short.
    """
    from svdengine.converters.calibration_size import LARGE
    from svdengine.converters.ffn_layer import read_ffn_layer, run_neurons
    from svdengine.converters.parallel import one_blas_thread, over_parts

    require_relu_family(llm.model_file)
    if llm.config.expert_count:
        raise RequestError("predictors of a mixture of experts are not compared: each expert has its own; leave it out")
    if predictors is None:
        predictors = {OWN: llm.predictor} if llm.predictor is not None else {}
    statistics = _gather(llm, text, progress)
    count, done = llm.config.layer_count, 0
    middle: list[NeuronScores] = []

    def study(part: slice) -> LayerStudy:
        nonlocal done
        index = part.start
        own = {name: predictor.layers[index] for name, predictor in predictors.items()}
        layer = read_ffn_layer(llm.model_file, index)
        x = statistics.held_out[index].astype(np.float32)
        neurons = run_neurons(layer, x)
        found = _study_layer(index, layer, statistics.layers[index], own, x, neurons, compared=index in chosen)
        if own and index == count // 2:
            middle.append(_neuron_scores(index, next(iter(own.values())), x, neurons))
        with told:
            done += 1
            if progress is not None:
                progress("layers", done, count)
        return found

    chosen = compared_layers(count)
    told = Lock()
    if llm.config.hidden_size < LARGE:
        with one_blas_thread():
            layers = over_parts(study, count, size=1)
    else:  # one of them fills memory, and its matrix products all cores
        layers = [study(slice(index, index + 1)) for index in range(count)]
    return PredictorStudy(tuple(layers), middle[0] if middle else None, statistics.tokens, statistics.held_out.shape[1])


def _gather(llm: LLM, text: str, progress: Progress | None) -> Statistics:
    from svdengine.converters.statistics import StatisticsCollector, collect_statistics

    source: Any = llm.executor
    if not hasattr(source, "ffn_inputs"):
        raise RequestError(f"the device {source.name} cannot show what its FFNs read; use --device cpu")
    tokens = llm.tokenizer.encode(text, bos=False)
    size = min(WINDOW, llm.context, max(2, len(tokens) // 10))  # so that a short text has windows to hold out
    windows = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    windows = [window for window in windows if len(window) > 1]
    config = llm.config
    collector = StatisticsCollector(
        config.layer_count, config.hidden_size, fit_rows=FIT_ROWS, held_out_rows=HELD_OUT_ROWS
    )
    report = (lambda done, total: progress("windows", done, total)) if progress is not None else None
    return collect_statistics(source, windows, collector, progress=report)


def _study_layer(
    index: int,
    layer: FfnLayer,
    statistics: LayerStatistics,
    own: Mapping[str, LayerPredictor],
    x: NDArray[np.float32],
    neurons: Neurons,
    *,
    compared: bool,
) -> LayerStudy:
    from svdengine.converters.predictor_quality import mean_auroc, select
    from svdengine.kernels.predictor import scores

    scorers = _scorers(layer, statistics, own) if compared else _scorers_of(own)
    auroc = {name: mean_auroc(scorer(x), neurons.active) for name, scorer in scorers}
    chosen = {name: select(scores(predictor, x) > 0, neurons) for name, predictor in own.items()}
    return LayerStudy(index, auroc, compared, float(neurons.active.mean()), chosen)


def _scorers(
    layer: FfnLayer, statistics: LayerStatistics, predictors: Mapping[str, LayerPredictor]
) -> Iterator[tuple[str, Scorer]]:
    """The model's own predictors, then those to compare with; ranks and bits are the first one's where it has them."""
    from svdengine.converters.predictor_quality import oracle_scorer, random_scorer, scorer_of, sign_scorer
    from svdengine.converters.predictors import build_predictor, find_basis

    yield from _scorers_of(predictors)
    own = next(iter(predictors.values()), None)
    hidden = layer.gate.shape[1]
    rank = min(own.rank, *layer.gate.shape) if own is not None and own.rank else max(1, hidden // 8)
    bits = own.residual_bits if own is not None and own.residual_bits else 2
    for kind in ("svd", "svd-naive"):
        basis = find_basis(kind, layer.gate, statistics, rank)
        yield f"{kind}, rank {rank}", scorer_of(build_predictor(kind, layer, statistics, rank, 0, basis=basis))
        if kind == "svd":
            name = f"svd, rank {rank} + {bits} bits"
            yield name, scorer_of(build_predictor("svd+lowbit", layer, statistics, rank, bits, basis=basis))
    yield f"lowbit, {bits} bits", scorer_of(build_predictor("lowbit", layer, statistics, 0, bits))
    yield "sign bits", sign_scorer(layer)
    yield "random", random_scorer(layer)
    yield "oracle", oracle_scorer(layer)


def _scorers_of(predictors: Mapping[str, LayerPredictor]) -> Iterator[tuple[str, Scorer]]:
    from svdengine.converters.predictor_quality import scorer_of

    for name, predictor in predictors.items():
        yield name, scorer_of(predictor)


def compared_layers(count: int) -> frozenset[int]:
    """Of so many layers those in which predictors are made to compare with: all, or some that are evenly spread."""
    some = min(count, COMPARED_LAYERS)
    return frozenset(round(i * (count - 1) / max(some - 1, 1)) for i in range(some))


def _neuron_scores(index: int, own: LayerPredictor, x: NDArray[np.float32], neurons: Neurons) -> NeuronScores:
    """Of the neuron that is active about as often as the layer's mean."""
    from svdengine.kernels.predictor import scores

    found = scores(own, x)
    share = neurons.active.mean(0)
    neuron = int(np.abs(share - max(share.mean(), 0.1)).argmin())
    truth = neurons.active[:, neuron]
    return NeuronScores(
        layer=index,
        neuron=neuron,
        active=tuple(map(float, found[truth, neuron])),
        inactive=tuple(map(float, found[~truth, neuron])),
    )


def mean_aurocs(study: PredictorStudy) -> dict[str, float]:
    """Each predictor's AUROC, averaged over those layers in which all were measured and that have one."""
    means = {}
    for name in study.layers[0].auroc:
        found = [x.auroc[name] for x in study.layers if x.compared and math.isfinite(x.auroc[name])]
        means[name] = sum(found) / len(found) if found else math.nan
    return means
