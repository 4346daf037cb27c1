"""Calibrate a model: statistics of its FFN inputs, a predictor for each layer, and thresholds that meet one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from svdengine.converters.calibration_size import CalibrationSize, calibration_size, paper_rank
from svdengine.converters.end_to_end import LossMeter, SparseCost, SparseExecutor, latest_states, tells_hidden_states
from svdengine.converters.expert_choice import choose_for_experts, expert_shapes, find_subjects
from svdengine.converters.ffn_layer import Neurons, read_ffn_layer, require_sparse, run_neurons
from svdengine.converters.loss_search import Scale, search_strictness
from svdengine.converters.output_head import OutputHead, read_output_head
from svdengine.converters.paper_predictor import SHARE, Ablation, PaperOptions, build_paper_predictor
from svdengine.converters.powerinfer import POWERINFER, Network, PowerInferFile, build_network, open_powerinfer
from svdengine.converters.predictor_choice import AUTO, PredictorShape, build_candidate, candidate_shapes, choose_shape
from svdengine.converters.predictor_folder import PredictorFolder, open_predictor_folder
from svdengine.converters.predictor_quality import mean_auroc, select
from svdengine.converters.predictors import find_basis, sampled_deviation
from svdengine.converters.split_text import SplitText, Windows, one_in_five
from svdengine.converters.statistics import (
    FEWEST_FIT,
    FEWEST_HELD,
    FIT_ROWS,
    SampledMoments,
    Statistics,
    StatisticsCollector,
    collect_statistics,
    layer_sample,
)
from svdengine.converters.thresholds import (
    CALIBRATORS,
    STRICTNESS,
    Calibrator,
    ThresholdTable,
    calibrate_thresholds,
    fixed_thresholds,
    level_of_strictness,
    make_sample,
)
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile
from svdengine.files.predictor_file import model_fingerprint
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, Predictor, layer_predictor_bytes, scores
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import place_of

TrainedPredictors = PowerInferFile | PredictorFolder

Progress = Callable[[str, int, int], None]  # stage (statistics, layers, loss), steps done, steps in all

MAX_LOSS = 0.00025  # the default budget: at it 99 in 100 of the likeliest tokens stay what they were
GREEDY = "greedy"  # thresholds of the paper, with the paper's predictor
# Where the search for a loss begins, as a multiple of it: a price, or a share of active tokens that is missed.
_FIRST_TRIALS: Mapping[Calibrator, float] = {"error": 2.0, "recall": 4.0, "uniform": 4.0}
_USUAL_TRIALS = 3  # of the loss: for the time left, which nobody knows
_NO_BUDGET = ("trained", GREEDY)  # thresholds that meet none
_REPORT_ROWS = 1024  # held-out tokens that a layer's row of the report is measured on
_PAPER_ROWS = 32_768  # tokens at most, of which each half has its use
EXACT = "exact"  # the kind of an expert that hardly any token reaches, or for which no predictor pays


@dataclass(frozen=True)
class CalibrationOptions:
    """What to build, and the one budget that its thresholds meet: by default `max_loss`.

    Raises ConversionError when two budgets are given or a field is out of range.
    """

    # svd, svd-naive, lowbit, svd+lowbit; auto: whichever reads least in each layer; powerinfer: trained, from `source`
    kind: str = "svd"
    source: Path | None = None  # the GGUF file of trained predictors, or the folder with model_0.pt and so on
    rank: int | None = None  # None: chosen for each layer, by modelled bytes a token
    bits: int | None = None  # of the low-bit part, 1 or 2; None: chosen like the rank
    factor_format: FactorFormat = "q8"
    # trained: as `source` means them; greedy: the paper's predictor and thresholds. Both meet no budget.
    thresholds: Calibrator | Literal["greedy"] = "error"
    share: float | None = None  # the paper's s
    ablation: Ablation | None = None  # of the paper
    max_loss: float | None = None  # rise of perplexity on the worst held-out kind, as a share
    max_error: float | None = None  # share of the FFN output's energy that is missed, in each layer
    density: float | None = None  # share of neurons that are predicted, in each layer

    def __post_init__(self) -> None:
        budgets = [b for b in (self.max_loss, self.max_error, self.density) if b is not None]
        if len(budgets) > 1:
            raise ConversionError("give one budget: max_loss, max_error or density")
        if any(not 0 < b < 1 for b in budgets):
            raise ConversionError(f"a budget is a share between 0 and 1, found {budgets[0]}")
        if (self.kind == POWERINFER) != (self.source is not None):
            raise ConversionError(
                f"a {POWERINFER} predictor, and no other, is read from a GGUF file or a folder (--from)"
            )
        if self.kind == POWERINFER and self.rank is not None:
            raise ConversionError(f"the rank of a {POWERINFER} predictor is that of its file: leave --rank out")
        if self.thresholds == "trained" and (self.kind != POWERINFER or budgets):
            raise ConversionError(f"trained thresholds are those of a {POWERINFER} predictor, and meet no budget")
        if self.thresholds not in (*CALIBRATORS, GREEDY):
            known = ", ".join((*CALIBRATORS, GREEDY))
            raise ConversionError(f"unknown thresholds {self.thresholds!r}; there are {known}")
        self._check_paper(bool(budgets))
        if self.factor_format not in get_args(FactorFormat):
            raise ConversionError(f"the factors can be q8 or q4, found {self.factor_format!r}")

    def _check_paper(self, budget: bool) -> None:
        if self.thresholds != GREEDY:
            if self.share is not None or self.ablation is not None:
                raise ConversionError("s and an ablation belong to greedy thresholds, the paper's")
            return
        if self.kind != "svd" or budget:
            raise ConversionError(
                "greedy thresholds are those of the paper's svd predictor, and meet no budget but their own (--s)"
            )
        _ = self.paper

    @property
    def paper(self) -> PaperOptions:
        """How the paper's predictor is made. Raises ConversionError for what cannot be."""
        share = SHARE if self.share is None else self.share
        return PaperOptions(share, self.ablation or "full", self.factor_format)

    @property
    def budget(self) -> dict[str, float]:
        """The one budget by its name; none for trained thresholds, and s for the paper's."""
        if self.thresholds == GREEDY:
            return {"s": self.paper.share}
        if self.thresholds == "trained":
            return {}
        for name in ("max_error", "density"):
            value = getattr(self, name)
            if value is not None:
                return {name: value}
        return {"max_loss": MAX_LOSS if self.max_loss is None else self.max_loss}


@dataclass(frozen=True)
class _LayerWork:
    """A layer's predictor before calibration, and how far its thresholds may be raised."""

    predictor: LayerPredictor
    table: ThresholdTable
    kind: str

    def at(self, level: float) -> LayerPredictor:
        return replace(self.predictor, threshold=(self.predictor.threshold + self.table.at(level)).astype(np.float32))


def calibrate(
    model_file: ModelFile,
    executor: SparseExecutor,
    text: SplitText | Windows,
    options: CalibrationOptions | None = None,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Predictor:
    """The predictor of a model, from windows of token ids that resemble what it will read and write.

    From the held-out ones come the errors and densities that are reported, and the loss that bounds them; of windows
    that are not split, one in five is held out. `state` keeps the statistics of an interrupted pass. Raises
    ConversionError when the model has no zeros to skip, the text is too short, or a value is not finite.
    """
    text = text if isinstance(text, SplitText) else one_in_five(text)
    options = options or CalibrationOptions()
    require_sparse(model_file.config)
    if model_file.config.expert_count and (options.thresholds == GREEDY or options.source is not None):
        raise ConversionError(
            "a mixture of experts has a predictor for each expert: greedy thresholds, the paper's, and predictors that"
            " were trained elsewhere are not made for that; leave --calibration greedy and --from out"
        )
    candidates = find_candidates(model_file, options)
    report = progress or _silent
    config, size = model_file.config, calibration_size(model_file.config)
    fingerprint = model_fingerprint(model_file)
    dense = _DenseStates(executor, text, read_output_head(model_file) if "max_loss" in options.budget else None)
    statistics = collect_statistics(
        executor,
        text,
        _collector(config, size, text, options),
        model=fingerprint,
        state=state,
        progress=lambda done, total: report("statistics", done, total),
        look=dense.keep,
    )
    choice = None
    if config.expert_count and options.kind == AUTO and not isinstance(candidates, PowerInferFile | PredictorFolder):
        choice = choose_for_experts(candidates, find_subjects(model_file, statistics), _expert_factors(options))
        candidates = [choice.shape] if choice is not None and choice.shape is not None else []
        options = replace(options, factor_format=choice.factors if choice is not None else options.factor_format)
    work = []
    for index in range(config.ffn_blocks):
        work.append(_calibrate_layer(model_file, statistics, index, candidates, options, size.threshold_rows))
        report("layers", index + 1, config.ffn_blocks)
    held_out = text.held_out_kinds(size.loss_tokens)
    levels, outcome, kinds = _meet_budget(executor, work, held_out, options, report, dense)
    measured = [
        _measure_layer(model_file, statistics, index, w.kind, w.at(level))
        for index, (w, level) in enumerate(zip(work, levels, strict=True))
    ]
    about = {
        "kind": EXACT if choice is not None and choice.shape is None else options.kind,
        "thresholds": options.thresholds,
        **({"ablation": options.paper.ablation} if options.thresholds == GREEDY else {}),
        "budget": options.budget,
        **({"choice": choice.record} if choice is not None else {}),
        "outcome": outcome,
        "kinds": {kind: _rounded(asdict(cost)) for kind, cost in kinds.items()},
        "fingerprint": fingerprint,
        "tokens": statistics.tokens,
        "table": [row for _, row in measured],
    }
    return Predictor(tuple(layer for layer, _ in measured), about)


class _DenseStates:
    """Hidden states of held-out windows on the dense path, kept while statistics are gathered: no second run then."""

    def __init__(self, executor: SparseExecutor, text: SplitText, head: OutputHead | None) -> None:
        self.head = head if tells_hidden_states(executor) else None
        self.states: dict[tuple[int, ...], np.ndarray] = {}  # (n, d) float32
        self._executor, self._text = executor, text

    def keep(self, index: int) -> None:
        """Take those of the window that was just run."""
        if self.head is not None and self._text.held_out[index]:
            self.states[tuple(self._text.windows[index])] = latest_states(self._executor)


def find_candidates(model_file: ModelFile, options: CalibrationOptions) -> Sequence[PredictorShape] | TrainedPredictors:
    """The shapes that a layer's predictor may have, or what has them all trained. Raises ConversionError."""
    if options.source is not None:
        if options.source.suffix == ".pt":
            raise ConversionError(
                f"{options.source}: is the predictor of one layer; give the folder that holds them all"
            )
        opens = open_predictor_folder if options.source.is_dir() else open_powerinfer
        return opens(options.source, model_file, options.thresholds == "trained")
    return find_shapes(model_file.config, options.kind, options.rank, options.bits, options.thresholds)


def find_shapes(
    config: ModelConfig, kind: str, rank: int | None, bits: int | None, thresholds: str
) -> Sequence[PredictorShape]:
    """The shapes that a layer's predictor may have. Raises ConversionError where there is none."""
    if kind == "svd" and rank is None:
        paper = thresholds == GREEDY
        rank = paper_rank(config.hidden_size, config.ffn_size) if paper else calibration_size(config).rank
    try:
        if kind == AUTO and config.expert_count:
            return expert_shapes(config, rank, bits)
        return candidate_shapes(kind, rank, bits, config)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _calibrate_layer(
    model_file: ModelFile,
    statistics: Statistics,
    index: int,
    candidates: Sequence[PredictorShape] | TrainedPredictors,
    options: CalibrationOptions,
    rows: int,
) -> _LayerWork:
    """An FFN block's predictor, with thresholds from at most `rows` tokens: a layer's, or an expert's."""
    place = place_of(model_file.config, "gate", index)
    x, held = layer_sample(statistics, place, held_out=False), layer_sample(statistics, place, held_out=True)
    none_pays = not isinstance(candidates, PowerInferFile | PredictorFolder) and not candidates
    if none_pays or len(x) < FEWEST_FIT or len(held) < FEWEST_HELD:
        return _exact_work(model_file.config)
    layer = read_ffn_layer(model_file, index)
    if options.thresholds == GREEDY and not isinstance(candidates, PowerInferFile | PredictorFolder):
        moments, rank = statistics.layers[place.layer], candidates[0].rank
        paper = build_paper_predictor(index, layer, x, rank, options.paper, moments)
        return _LayerWork(paper, fixed_thresholds(np.zeros_like(paper.threshold)), options.kind)
    x = x[:rows]
    truth = run_neurons(layer, x)
    if isinstance(candidates, PowerInferFile | PredictorFolder):
        kind, name = options.kind, f"{candidates.path}, layer {index}"
        network = _better_reading(candidates.readings(index), x, truth)
        predictor = build_network(network, x, options.factor_format, name)
    else:
        moments, shape = statistics.layers[place.layer], candidates[0]
        if len(candidates) > 1:
            shape = choose_shape(
                candidates, layer, moments, (x, truth), (held, run_neurons(layer, held)), options.factor_format
            )
        kind, basis = shape.kind, None
        if kind == "svd" and isinstance(statistics.layers, SampledMoments):
            basis = find_basis(kind, layer.gate, moments, shape.rank, sampled_deviation(truth.gates))
        predictor = build_candidate(shape, layer, moments, options.factor_format, basis)
    estimates = options.source is None
    sample, held_sample = make_sample(scores(predictor, x), truth, estimates), None
    if not options.budget.keys() <= {"max_loss"}:  # which asks a layer for its own error or density
        held_sample = make_sample(scores(predictor, held), run_neurons(layer, held), estimates)
    calibrator = cast(Calibrator, options.thresholds)
    return _LayerWork(predictor, calibrate_thresholds(calibrator, sample, held_sample, layer.row_bytes), kind)


def _expert_factors(options: CalibrationOptions) -> tuple[FactorFormat, ...]:
    """The formats of factors that are tried for experts: of narrow ones the predictor's bytes count most."""
    return ("q8", "q4") if options.factor_format == "q8" else (options.factor_format,)


def _exact_work(config: ModelConfig) -> _LayerWork:
    """Of an expert that too few tokens reach, or for which no predictor pays: all gates are computed."""
    always, nothing = np.full(config.ffn_size, -1, np.float32), np.zeros(config.ffn_size, np.float32)
    predictor = LayerPredictor(0, "q8", 0, {}, {}, {}, always, nothing)
    return _LayerWork(predictor, fixed_thresholds(nothing), EXACT)


def _collector(
    config: ModelConfig, size: CalibrationSize, text: SplitText, options: CalibrationOptions
) -> StatisticsCollector:
    """What gathers the statistics. The paper's construction keeps all rows: it needs no others."""
    if options.thresholds != GREEDY:
        rows = size.threshold_rows if size.moments else max(FIT_ROWS, size.threshold_rows)
        return StatisticsCollector(
            config.layer_count,
            config.hidden_size,
            fit_rows=rows,
            moments=size.moments,
            experts=config.chosen_blocks,
        )
    tokens = sum(map(len, text.fitting))
    rows = min(max(tokens, 1), _PAPER_ROWS)
    return StatisticsCollector(config.layer_count, config.hidden_size, fit_rows=rows, moments=False)


def _better_reading(networks: Sequence[Network], x: np.ndarray, truth: Neurons) -> Network:
    """Of what a trained predictor may mean, what tells best which neurons are active."""
    if len(networks) == 1:
        return networks[0]
    areas = [mean_auroc(network.scores(x), truth.active) for network in networks]
    return networks[int(np.nanargmax(areas)) if not np.isnan(areas).all() else 0]


def _meet_budget(
    executor: SparseExecutor,
    work: list[_LayerWork],
    held_out: Mapping[str, Windows],
    options: CalibrationOptions,
    report: Progress,
    dense: _DenseStates,
) -> tuple[list[float], dict[str, float], dict[str, SparseCost]]:
    """The level of each layer's thresholds, what the budget came to, and what that costs on each kind of text."""
    if options.thresholds in _NO_BUDGET or all(w.kind == EXACT for w in work):
        return [0.0] * len(work), {}, {}
    ((name, limit),) = options.budget.items()
    if name == "max_error":
        return [0.0 if w.kind == EXACT else w.table.level_of_error(limit) for w in work], {}, {}
    if name == "density":
        return [0.0 if w.kind == EXACT else w.table.level_of_density(limit) for w in work], {}, {}
    return _meet_loss(executor, work, held_out, cast(Calibrator, options.thresholds), limit, report, dense)


def _meet_loss(
    executor: SparseExecutor,
    work: list[_LayerWork],
    held_out: Mapping[str, Windows],
    calibrator: Calibrator,
    limit: float,
    report: Progress,
    dense: _DenseStates,
) -> tuple[list[float], dict[str, float], dict[str, SparseCost]]:
    """Find the strictest level, the same in every layer, at which no kind of held-out text costs more than `limit`."""
    steps, done = _USUAL_TRIALS + 1, 1
    meter = LossMeter(executor, held_out, dense.head, dense.states)
    costs: dict[float, dict[str, SparseCost]] = {}
    report("loss", done, steps)

    def cost_at(strictness: float) -> float:
        nonlocal done
        level = level_of_strictness(calibrator, strictness)
        costs[strictness] = meter.costs(Predictor(tuple(w.at(level) for w in work), {}))
        done += 1
        report("loss", min(done, steps - 1), steps)
        return max(cost.expected_rise for cost in costs[strictness].values())

    low, high = (float(STRICTNESS[calibrator][end]) for end in (0, -1))
    start = min(max(_FIRST_TRIALS[calibrator] * limit, low), high)
    found = search_strictness(cost_at, limit, Scale(low, high, start))
    if found.strictness not in costs:
        cost_at(found.strictness)  # the least strict of all, which costs more than was wanted
    report("loss", steps, steps)
    kinds = costs[found.strictness]
    rise = max(cost.expected_rise for cost in kinds.values())
    name = "price" if calibrator == "error" else "missed"
    outcome = {name: found.strictness, "perplexity": meter.perplexity, "perplexity_rise": rise}
    return [level_of_strictness(calibrator, found.strictness)] * len(work), outcome, kinds


def _measure_layer(
    model_file: ModelFile, statistics: Statistics, index: int, kind: str, predictor: LayerPredictor
) -> tuple[LayerPredictor, dict[str, Any]]:
    """A layer with its neurons' frequencies, and its row of the report, measured on held-out tokens."""
    layer = read_ffn_layer(model_file, index)
    place = place_of(model_file.config, "gate", index)
    held = layer_sample(statistics, place, held_out=True)
    reached = round(len(held) / statistics.held_out.shape[1], 6)
    held = held[:_REPORT_ROWS]
    sizes = {
        "reached": reached,
        "bytes": layer_predictor_bytes(predictor),
        "dense_bytes": round(layer.read_bytes(1, 1)),
    }
    if not len(held):
        return predictor, {"kind": kind, "rank": predictor.rank, "bits": predictor.residual_bits, **sizes}
    truth = run_neurons(layer, held)
    found = scores(predictor, held)
    selection = {name: round(value, 6) for name, value in asdict(select(found > 0, truth)).items()}
    row = {
        "kind": kind,
        "rank": predictor.rank,
        "bits": predictor.residual_bits,
        **({"auroc": _auroc(found, truth)} if kind != EXACT else {}),
        **selection,
        **sizes,
    }
    if kind == EXACT:
        return predictor, row
    return replace(predictor, frequency=(found > 0).mean(0, dtype=np.float32).astype(np.float16)), row


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else round(value, 6) for name, value in values.items()}


def _auroc(found: np.ndarray, truth: Neurons) -> float | None:
    area = mean_auroc(found, truth.active)
    return None if math.isnan(area) else round(area, 6)


def _silent(stage: str, done: int, total: int) -> None:
    """Take progress that nobody asked for."""
