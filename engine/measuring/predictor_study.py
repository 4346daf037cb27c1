"""How well predictors rank and choose the neurons of each layer, on held-out tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.calibration_size import LARGE, calibration_size
from svdengine.converters.ffn_layer import FfnLayer, read_ffn_layer, run_neurons
from svdengine.converters.parallel import one_blas_thread, over_parts
from svdengine.converters.predictor_quality import (
    Scorer,
    mean_auroc,
    oracle_scorer,
    pooled,
    random_scorer,
    scorer_of,
    select,
    sign_scorer,
)
from svdengine.converters.predictors import build_predictor, find_basis
from svdengine.converters.statistics import (
    FEWEST_HELD,
    LayerStatistics,
    Statistics,
    StatisticsCollector,
    collect_statistics,
    layer_sample,
)
from svdengine.errors import RequestError
from svdengine.files.model_file import ModelFile
from svdengine.files.predictor_file import require_relu_family
from svdengine.kernels.predictor import LayerPredictor, Predictor, layer_predictor_bytes, scores
from svdengine.measuring.study_results import OWN, BlockStudy, LayerStudy, NeuronScores, PredictorStudy
from svdengine.models.tensors import place_of

if TYPE_CHECKING:
    from svdengine.llm import LLM

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is, and all

WINDOW = 256  # tokens
FIT_ROWS = 4096  # tokens that predictors are fitted to
HELD_OUT_ROWS = 1024  # tokens that they are measured on
COMPARED_LAYERS = 12  # of a deep model, in which predictors are made to compare with: that takes seconds a layer
COMPARED_EXPERTS = 48  # in all of these layers together, for the same reason


def study_predictors(
    llm: LLM, text: str, progress: Progress | None = None, predictors: Mapping[str, Predictor] | None = None
) -> PredictorStudy:
    """Fit predictors of several kinds to four fifths of `text`, and measure them and the model's own on the rest.

    `predictors`: those of the model to measure, by name, the first one in most detail; by default its own.

    `llm` must be idle. Raises RequestError for a model outside the ReLU family, ConversionError when the text is too
    short.
    """
    require_relu_family(llm.model_file)
    if predictors is None:
        predictors = {OWN: llm.predictor} if llm.predictor is not None else {}
    statistics = _gather(llm, text, progress)
    count, done = llm.config.layer_count, 0
    chosen = compared_layers(count)
    layer_of = partial(LayerAtWork, llm.model_file, statistics, predictors)
    middle: list[NeuronScores] = []

    def study(part: slice) -> LayerStudy:
        nonlocal done
        layer = layer_of(part.start)
        found = layer.study(compared=part.start in chosen)
        if predictors and part.start == count // 2 and (scores := layer.neuron_scores(found)) is not None:
            middle.append(scores)
        with told:
            done += 1
            if progress is not None:
                progress("layers", done, count)
        return found

    told = Lock()
    if llm.config.hidden_size < LARGE:
        with one_blas_thread():
            layers = over_parts(study, count, size=1)
    else:  # one of them fills memory, and its matrix products all cores
        layers = [study(slice(index, index + 1)) for index in range(count)]
    return PredictorStudy(tuple(layers), middle[0] if middle else None, statistics.tokens, statistics.held_out.shape[1])


def _gather(llm: LLM, text: str, progress: Progress | None) -> Statistics:
    source: Any = llm.executor
    if not hasattr(source, "ffn_inputs"):
        raise RequestError(f"the device {source.name} cannot show what its FFNs read; use --device cpu")
    tokens = llm.tokenizer.encode(text, bos=False)
    size = min(WINDOW, llm.context, max(2, len(tokens) // 10))  # so that a short text has windows to hold out
    windows = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    windows = [window for window in windows if len(window) > 1]
    config = llm.config
    collector = StatisticsCollector(
        config.layer_count,
        config.hidden_size,
        fit_rows=FIT_ROWS,
        held_out_rows=HELD_OUT_ROWS,
        moments=calibration_size(config).moments,
        experts=config.chosen_blocks,
    )
    report = (lambda done, total: progress("windows", done, total)) if progress is not None else None
    return collect_statistics(source, windows, collector, progress=report)


class LayerAtWork:
    """A layer at work: its FFN blocks, and the held-out tokens that reach each."""

    def __init__(
        self, model_file: ModelFile, statistics: Statistics, predictors: Mapping[str, Predictor], number: int
    ) -> None:
        self._file, self._statistics, self._predictors, self._number = model_file, statistics, predictors, number
        self._blocks = model_file.config.blocks_of(number)

    def study(self, *, compared: bool) -> LayerStudy:
        """Everything that is told of the layer."""
        inputs = [self._inputs(block) for block in self._blocks]
        ranked = self._ranked([len(x) for x in inputs])
        moments = self._statistics.layers[self._number] if compared else None
        blocks, dense, exact = [], 0.0, 0.0
        for block, x in zip(self._blocks, inputs, strict=True):
            if not len(x):
                blocks.append(self._unreached(block))
                continue
            layer = read_ffn_layer(self._file, block)
            found = self._study_block(block, layer, x, moments if block in ranked else None)
            dense += found.rows * layer.read_bytes(1, 1)
            exact += found.rows * layer.read_bytes(1, found.active_density)
            blocks.append(found)
        tokens, own = self._statistics.held_out.shape[1], self._predictors
        best = [blocks[block - self._blocks.start] for block in ranked]
        total = sum(found.rows for found in blocks)
        pools = {name: pooled([(b.rows, b.selections[name]) for b in blocks if b.rows]) for name in own}
        return LayerStudy(
            layer=self._number,
            auroc=_mean_of_blocks(best),
            compared=compared and bool(best),
            compared_blocks=len(best),
            active_density=sum(b.rows * b.active_density for b in blocks) / total,
            selections={name: selection for name, selection in pools.items() if selection is not None},
            read={name: sum(b.rows * b.read[name] for b in blocks) / tokens for name in own},
            dense_bytes=dense / tokens,
            exact_bytes=exact / tokens,
            blocks=tuple(blocks),
        )

    def neuron_scores(self, found: LayerStudy) -> NeuronScores | None:
        """Of the block that most tokens reach, its neuron that is active about as often as the mean of all.

        None where the first predictor scores no block.
        """
        name, own = next(iter(self._predictors.items()))
        scored = [i for i, block in enumerate(found.blocks) if block.rows and name not in block.exact]
        if not scored:
            return None
        index = max(scored, key=lambda i: found.blocks[i].rows)
        block = self._blocks[index]
        x = self._inputs(block)
        values, truth = scores(own.layers[block], x), run_neurons(read_ffn_layer(self._file, block), x).active
        share = truth.mean(0)
        neuron = int(np.abs(share - max(share.mean(), 0.1)).argmin())
        active = truth[:, neuron]
        return NeuronScores(
            layer=self._number,
            expert=found.blocks[index].expert,
            neuron=neuron,
            active=tuple(map(float, values[active, neuron])),
            inactive=tuple(map(float, values[~active, neuron])),
        )

    def _inputs(self, block: int) -> NDArray[np.float32]:
        return layer_sample(self._statistics, place_of(self._file.config, "up", block), held_out=True)

    def _ranked(self, rows: Sequence[int]) -> list[int]:
        """The blocks whose predictors are compared: those that most tokens reach, as many in each layer.

        Where the first predictor scores some blocks, only these.
        """
        reached = [(count, b) for count, b in zip(rows, self._blocks, strict=True) if count >= FEWEST_HELD]
        if len(rows) == 1:
            return list(self._blocks)
        first = next(iter(self._predictors.values()), None)
        scored = [(n, b) for n, b in reached if first is not None and not _is_exact(first.layers[b])]
        most = max(1, COMPARED_EXPERTS // len(compared_layers(self._file.config.layer_count)))
        return [block for _, block in sorted(scored or reached, key=lambda one: (-one[0], one[1]))[:most]]

    def _study_block(
        self, block: int, layer: FfnLayer, x: NDArray[np.float32], moments: LayerStatistics | None
    ) -> BlockStudy:
        """`moments`: of the layer's inputs, where predictors are made to compare with."""
        own = {name: predictor.layers[block] for name, predictor in self._predictors.items()}
        exact = self._exact(block)
        neurons = run_neurons(layer, x)
        known = {name: predictor for name, predictor in own.items() if name not in exact}
        scorers = _scorers(layer, moments, known) if moments is not None else _scorers_of(known)
        chosen = {name: select(scores(predictor, x) > 0, neurons) for name, predictor in own.items()}
        return BlockStudy(
            expert=self._expert(block),
            rows=len(x),
            auroc={name: mean_auroc(scorer(x), neurons.active) for name, scorer in scorers},
            active_density=float(neurons.active.mean()),
            selections=chosen,
            read={
                name: layer_predictor_bytes(own[name]) + layer.read_bytes(s.predicted_density, s.computed_density)
                for name, s in chosen.items()
            },
            exact=exact,
        )

    def _unreached(self, block: int) -> BlockStudy:
        read = dict.fromkeys(self._predictors, 0.0)
        return BlockStudy(self._expert(block), 0, {}, 0.0, {}, read, self._exact(block))

    def _expert(self, block: int) -> int | None:
        return place_of(self._file.config, "up", block).expert

    def _exact(self, block: int) -> tuple[str, ...]:
        return tuple(name for name, predictor in self._predictors.items() if _is_exact(predictor.layers[block]))


def _mean_of_blocks(blocks: Sequence[BlockStudy]) -> dict[str, float]:
    """Each predictor's AUROC, as the tokens that reach each block weigh it."""
    means: dict[str, float] = {}
    for name in {name: None for block in blocks for name in block.auroc}:
        known = [(b.rows, b.auroc[name]) for b in blocks if math.isfinite(b.auroc.get(name, math.nan))]
        rows = sum(count for count, _ in known)
        means[name] = sum(count * area for count, area in known) / rows if rows else math.nan
    return means


def _is_exact(predictor: LayerPredictor) -> bool:
    """Whether a block has no scores: then all its gates are computed."""
    return not predictor.rank and not predictor.residual_bits


def _scorers(
    layer: FfnLayer, statistics: LayerStatistics, predictors: Mapping[str, LayerPredictor]
) -> Iterator[tuple[str, Scorer]]:
    """The model's own predictors, then those to compare with; ranks and bits are the first one's where it has them."""
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
    for name, predictor in predictors.items():
        yield name, scorer_of(predictor)


def compared_layers(count: int) -> frozenset[int]:
    """Of so many layers those in which predictors are made to compare with: all, or some that are evenly spread."""
    some = min(count, COMPARED_LAYERS)
    return frozenset(round(i * (count - 1) / max(some - 1, 1)) for i in range(some))
