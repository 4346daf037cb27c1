"""Which predictor the experts of a mixture get, and whether one pays: measured on some, by the bytes a token reads.

A predictor of rank r reads r (d + f) weights to save the gates of neurons that it leaves out. An expert is narrow: at
d = 1536 and f = 768 the ranks that suit a wide FFN cost more than they save, and skipping exact zeros, which computes
every gate, reads less. So all experts get the one shape that reads least, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from svdengine.converters.calibration_size import LARGE, paper_rank
from svdengine.converters.ffn_layer import FfnLayer, read_ffn_layer, run_neurons
from svdengine.converters.predictor_choice import (
    TYPICAL_ERROR,
    PredictorShape,
    Tokens,
    build_candidate,
    first_rows,
    modelled_bytes,
)
from svdengine.converters.predictors import find_basis
from svdengine.converters.statistics import FEWEST_FIT, FEWEST_HELD, LayerStatistics, Statistics, layer_sample
from svdengine.files.model_file import ModelFile
from svdengine.kernels.predictor import FactorFormat, layer_predictor_bytes
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import Place

PAYS = 0.9  # of what exact zeros leave: a predictor must read less, for what it misses and the time of its scores
SAMPLED = 6  # experts on which shapes are tried, spread over the layers
_RANKS = (64, 128, 256)


@dataclass(frozen=True)
class Trial:
    """One shape, as the mean of the experts that it was tried on. Bytes are of one expert and one token."""

    kind: str
    rank: int
    bits: int
    factors: FactorFormat  # of an SVD
    scoring: float  # bytes of the predictor
    read: float  # bytes of predictor and weights, at the typical error


@dataclass(frozen=True)
class ExpertChoice:
    """What was tried, and what came of it."""

    shape: PredictorShape | None  # None: no predictor pays, and exact zeros alone are skipped
    factors: FactorFormat
    trials: tuple[Trial, ...]
    experts: int  # that were tried
    exact: float  # bytes that a token reads of an expert where exact zeros are skipped
    dense: float
    gate: float  # of these, the gate's

    @property
    def record(self) -> dict[str, Any]:
        """In plain JSON types, for the predictor's file."""
        best = min(self.trials, key=lambda trial: trial.read)
        sizes = {"exact_bytes": self.exact, "dense_bytes": self.dense, "gate_bytes": self.gate}
        return {
            "exact": self.shape is None,
            "best": {**asdict(best), "scoring": round(best.scoring), "read": round(best.read)},
            "tried": self.experts,
            **{name: round(value) for name, value in sizes.items()},
        }


@dataclass(frozen=True)
class Subject:
    """An expert to try shapes on: its weights, and tokens that reach it."""

    layer: FfnLayer
    moments: LayerStatistics  # of the inputs of its layer
    fit: Tokens
    held_out: Tokens


def expert_shapes(config: ModelConfig, rank: int | None, bits: int | None) -> list[PredictorShape]:
    """The shapes that are tried: ranks up to the paper's, and in a small model low-bit copies of the gate too."""
    most = min(config.hidden_size, config.ffn_size)
    ranks = {min(r, most) for r in (*_RANKS, paper_rank(config.hidden_size, config.ffn_size))}
    shapes = [PredictorShape("svd", r, 0) for r in sorted({rank} if rank is not None else ranks)]
    if config.hidden_size < LARGE and rank is None:
        shapes += [PredictorShape("lowbit", 0, b) for b in ((bits,) if bits is not None else (1, 2))]
    return shapes


def find_subjects(model_file: ModelFile, statistics: Statistics) -> list[Subject]:
    """The experts that most tokens reach, of layers that are evenly spread; none where too few tokens reach any."""
    config, subjects = model_file.config, list[Subject]()
    layers = config.expert_layers
    for layer in sorted({layers[round(i * (len(layers) - 1) / max(SAMPLED - 1, 1))] for i in range(SAMPLED)}):
        numbers = np.bincount(statistics.held_out_experts[layer].ravel(), minlength=config.expert_count)
        for expert in np.argsort(-numbers[: config.expert_count], kind="stable")[: max(1, SAMPLED // len(layers))]:
            place = Place(layer, expert=int(expert))
            x, held = (layer_sample(statistics, place, held_out=kept) for kept in (False, True))
            if len(x) < FEWEST_FIT or len(held) < FEWEST_HELD:
                continue
            ffn = read_ffn_layer(model_file, config.blocks_of(layer).start + int(expert))
            tokens = [(one, run_neurons(ffn, one)) for one in (x, held)]
            subjects.append(Subject(ffn, statistics.layers[layer], *tokens))
    return subjects


def choose_for_experts(
    shapes: Sequence[PredictorShape], subjects: Sequence[Subject], factors: Sequence[FactorFormat]
) -> ExpertChoice | None:
    """The shape with the fewest bytes a token, where these are less than `PAYS` of what exact zeros leave.

    The factors of an SVD are tried in all formats of `factors`. None where there is nothing to try it on.
    """
    if not subjects:
        return None
    tried = [(shape, one) for shape in shapes for one in (factors if shape.rank else factors[:1])]
    scoring, read = np.zeros((2, len(subjects), len(tried)))
    exact, dense, gate = np.zeros((3, len(subjects)))
    most = max((shape.rank for shape in shapes), default=0)
    for number, subject in enumerate(subjects):
        layer, held_out = subject.layer, first_rows(subject.held_out)
        basis = find_basis("svd", layer.gate, subject.moments, most) if most else None
        for at, (shape, one) in enumerate(tried):
            predictor = build_candidate(shape, layer, subject.moments, one, basis if shape.rank else None)
            scoring[number, at] = layer_predictor_bytes(predictor)
            read[number, at] = modelled_bytes(predictor, layer, first_rows(subject.fit), held_out, TYPICAL_ERROR)
        exact[number] = layer.read_bytes(1, float(held_out[1].active.mean()))
        dense[number], gate[number] = layer.read_bytes(1, 1), layer.read_bytes(1, 0)
    trials = tuple(
        Trial(shape.kind, shape.rank, shape.bits, one, float(scoring[:, at].mean()), float(read[:, at].mean()))
        for at, (shape, one) in enumerate(tried)
    )
    best = int(np.argmin([trial.read for trial in trials]))
    pays = trials[best].read < PAYS * exact.mean()
    sizes = float(exact.mean()), float(dense.mean()), float(gate.mean())
    shape, one = tried[best]
    return ExpertChoice(shape if pays else None, one, trials, len(subjects), *sizes)
