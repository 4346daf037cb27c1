"""What calibration needs to know of a model's FFN inputs, gathered in one pass over tokens.

For each layer: the mean and the second moment of the inputs in float64, and two samples of rows. Windows of tokens
are either for fitting or held out; the moments and one sample come from the former, the other sample from the latter.
Memory depends on the model and on the sizes of the samples, never on the length of the text. Where second moments
would fill it, they come from the sampled rows, a layer at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.parallel import over_parts
from svdengine.converters.split_text import HELD_OUT_EVERY, SplitText, Windows, one_in_five
from svdengine.errors import ConversionError
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import TensorWriter
from svdengine.kernels.batch import Batch
from svdengine.models.tensors import Place

Progress = Callable[[int, int], None]  # windows done, windows in all

FIT_ROWS = 8192
FEWEST_FIT, FEWEST_HELD = 128, 32  # sampled tokens that must reach an expert for it to have a predictor
HELD_OUT_ROWS = 2048
_SUMMED_ROWS = 1024
_SAVE_SECONDS = 60.0


class FfnInputs(Protocol):
    """An executor that shows what its FFNs read."""

    max_batch_rows: int
    block_size: int  # tokens in a KV block

    def ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """Run a dense step; the FFN inputs of every layer after the norm, (layers, n, d) float32."""
        ...


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one layer's FFN inputs x."""

    mean: NDArray[np.float64]  # (d,) E[x]
    second_moment: NDArray[np.float64]  # (d, d) E[x x^T]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """E[(x - mean) (x - mean)^T], (d, d)."""
        return self.second_moment - np.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Statistics:
    """Everything that predictors and thresholds are made from."""

    layers: Sequence[LayerStatistics]
    fit: NDArray[np.float16]  # (layers, rows, d) sample of the fitting windows
    held_out: NDArray[np.float16]  # (layers, rows, d) sample of the held-out windows
    tokens: int  # that the moments come from
    # (layers, rows, active experts) numbers of the experts that each sampled row has; no rows without experts
    fit_experts: NDArray[np.int16] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int16))
    held_out_experts: NDArray[np.int16] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int16))


def layer_sample(statistics: Statistics, place: Place, *, held_out: bool) -> np.ndarray:
    """FFN inputs (n, d) float32 of one layer, or of the tokens that reach one of its experts."""
    rows = (statistics.held_out if held_out else statistics.fit)[place.layer]
    if place.expert is not None:
        chosen = (statistics.held_out_experts if held_out else statistics.fit_experts)[place.layer]
        rows = rows[(chosen == place.expert).any(1)]
    return rows.astype(np.float32)


class SampledMoments(Sequence[LayerStatistics]):
    """Moments of rows (layers, n, d), made for a layer whenever it is asked for."""

    def __init__(self, rows: NDArray[np.float16]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[index] for index in range(*layer.indices(len(self)))]
        x = self._rows[layer].astype(np.float32)
        return LayerStatistics(x.mean(0, dtype=np.float64), (x.T @ x).astype(np.float64) / len(x))


def needed_tokens(hidden_size: int) -> int:
    """Fewest tokens for fitting: the second moment of fewer than d rows is singular."""
    return max(256, hidden_size)


class Reservoir:
    """A uniform sample of rows, the same tokens in every layer: those of smallest random priority.

    Priorities depend only on the seed and on how many rows came before, so that an interrupted pass ends as any other.
    """

    def __init__(self, layers: int, rows: int, hidden_size: int, seed: int, experts: int = 0) -> None:
        """`experts`: how many numbers of experts are kept of each row."""
        self.rows = np.zeros((layers, rows, hidden_size), np.float16)
        self.experts = np.zeros((layers, rows, experts), np.int16)
        self.priorities = np.full(rows, np.inf)
        self.seen = 0
        self._seed = seed

    def add(self, inputs: NDArray[np.float32], experts: NDArray[np.int32] | None = None) -> None:
        """Offer the rows (layers, n, d) of the next n tokens, and the experts (layers, n, ...) that these had."""
        n = inputs.shape[1]
        fresh = np.random.default_rng((self._seed, self.seen)).random((n,))
        self.seen += n
        merged = np.concatenate([self.priorities, fresh])
        kept = np.argsort(merged, kind="stable")[: len(self.priorities)]
        arrivals = kept[kept >= len(self.priorities)] - len(self.priorities)
        free = np.setdiff1d(np.arange(len(self.priorities)), kept)
        limit = np.float32(np.finfo(np.float16).max)

        def place(part: slice) -> None:
            self.rows[part, free] = np.clip(inputs[part, arrivals], -limit, limit)

        over_parts(place, len(self.rows))
        if experts is not None:
            self.experts[:, free] = experts[:, arrivals]
        self.priorities[free] = fresh[arrivals]

    def sample(self) -> NDArray[np.float16]:
        """The rows sampled so far: (layers, at most the capacity, d)."""
        return self.rows[:, np.isfinite(self.priorities)]

    def sampled_experts(self) -> NDArray[np.int16]:
        """The experts of the rows sampled so far, in their order."""
        return self.experts[:, np.isfinite(self.priorities)]


class StatisticsCollector:
    """Accumulates statistics window by window; `save` and `load` keep the state of an unfinished pass."""

    def __init__(
        self,
        layer_count: int,
        hidden_size: int,
        *,
        fit_rows: int = FIT_ROWS,
        held_out_rows: int = HELD_OUT_ROWS,
        seed: int = 0,
        moments: bool = True,
        experts: int = 0,
    ) -> None:
        """`moments`: whether they are summed over all tokens of fitting windows, or come from the sample of them.

        `experts`: how many a token has, in a model that has some.
        """
        self.windows_done = 0
        self.tokens = 0  # in fitting windows
        self._sum = np.zeros((layer_count, hidden_size))
        self._products = np.zeros((layer_count if moments else 0, hidden_size, hidden_size))
        self._pending: list[NDArray[np.float32]] = []  # inputs that are not in the sums yet
        self._fit = Reservoir(layer_count, fit_rows, hidden_size, 2 * seed, experts)
        self._held_out = Reservoir(layer_count, held_out_rows, hidden_size, 2 * seed + 1, experts)

    def add(self, inputs: NDArray[np.float32], held_out: bool, experts: NDArray[np.int32] | None = None) -> None:
        """Take the FFN inputs (layers, n, d) of n tokens, and their experts (layers, n, ...) where they have some.

        Raises ConversionError where they are not finite.
        """
        finite = np.isfinite(inputs).all((1, 2))
        if not finite.all():
            layer = int(np.flatnonzero(~finite)[0])
            raise ConversionError(
                f"layer {layer}: the FFN's input holds NaN or infinity; the model's weights may be damaged"
            )
        if held_out:
            self._held_out.add(inputs, experts)
            return
        self._fit.add(inputs, experts)
        self.tokens += inputs.shape[1]
        if len(self._products):
            self._pending.append(inputs)
            if sum(one.shape[1] for one in self._pending) >= _SUMMED_ROWS:
                self._sum_up()

    def _sum_up(self) -> None:
        """Add what is pending to the sums: of many rows at once, since a sum fills the memory of a matrix a layer."""
        for layer in range(len(self._products) if self._pending else 0):
            x = np.concatenate([inputs[layer] for inputs in self._pending])
            self._sum[layer] += x.sum(0, dtype=np.float64)
            self._products[layer] += x.T @ x
        self._pending.clear()

    def result(self) -> Statistics:
        """The statistics. Raises ConversionError when there were too few tokens, with how many are needed."""
        self._sum_up()
        layers, d = self._sum.shape
        needed = needed_tokens(d if len(self._products) else 0)
        if self.tokens < needed or not self._held_out.seen:
            every = HELD_OUT_EVERY
            raise ConversionError(
                f"the calibration text has {self.tokens} tokens for fitting and {self._held_out.seen} held out;"
                f" this model needs at least {needed} for fitting, so about {needed * every // (every - 1) + 1} in all,"
                f" in at least {every} windows"
            )
        fit = self._fit.sample()
        moments: Sequence[LayerStatistics] = SampledMoments(fit)
        if len(self._products):
            moments = [
                LayerStatistics(self._sum[i] / self.tokens, self._products[i] / self.tokens) for i in range(layers)
            ]
        experts = self._fit.sampled_experts(), self._held_out.sampled_experts()
        return Statistics(moments, fit, self._held_out.sample(), self.tokens, *experts)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state atomically. `fingerprint` says what is being measured; `load` must give the same."""
        arrays = self._state()
        names = {"float64": "F64", "float16": "F16", "int64": "I64", "int16": "I16"}
        declared = {name: (array.shape, names[array.dtype.name]) for name, array in arrays.items()}
        metadata = {"format": "svdp-statistics", "fingerprint": fingerprint}
        with TensorWriter(path, declared, metadata) as writer:
            for name, array in arrays.items():
                writer.write(name, array)

    def load(self, path: Path, fingerprint: str) -> None:
        """Go on from a saved state. Raises ConversionError when it belongs to another text, model or sample size."""
        file = TensorFile(path)
        state = self._state()
        fits = file.header.metadata.get("fingerprint") == fingerprint and all(
            name in file.arrays and file.arrays[name].shape == array.shape and file.arrays[name].dtype == array.dtype
            for name, array in state.items()
        )
        if not fits:
            raise ConversionError(
                f"{path}: was made from another text or model, or for another calibration; delete it, or give another"
                " name"
            )
        for name, array in state.items():
            array[...] = file.arrays[name]
        self.windows_done, self.tokens, self._fit.seen, self._held_out.seen = (int(n) for n in state["counts"])
        file.close()

    def _state(self) -> dict[str, NDArray]:
        self._sum_up()
        experts = {"fit.experts": self._fit.experts, "held_out.experts": self._held_out.experts}
        return {
            **{name: array for name, array in experts.items() if array.size},
            "sum": self._sum,
            "products": self._products,
            "fit.rows": self._fit.rows,
            "fit.priorities": self._fit.priorities,
            "held_out.rows": self._held_out.rows,
            "held_out.priorities": self._held_out.priorities,
            "counts": np.array([self.windows_done, self.tokens, self._fit.seen, self._held_out.seen], np.int64),
        }


def collect_statistics(
    source: FfnInputs,
    text: SplitText | Windows,
    collector: StatisticsCollector,
    *,
    model: str = "",
    state: Path | None = None,
    progress: Progress | None = None,
    look: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the windows of `text` through `source` and return their statistics.

    `look` is called with the number of each window that one step has run, before the next. Of windows that are not
    split, one in five is held out.
    With `state`, progress is kept in that file now and then and taken up from it; after a whole pass it holds the
    result, from which other predictors can be made at once. `model`, the model's fingerprint, tells such files apart.
    Raises ConversionError on inputs that are not finite, on too few tokens, and on a state file of another text.
    """
    text = text if isinstance(text, SplitText) else one_in_five(text)
    windows = text.windows
    fingerprint = f"{model} {windows_fingerprint(text)}"
    if state is not None and state.exists():
        collector.load(state, fingerprint)
    saved, first, whole = time.monotonic(), collector.windows_done, True
    try:
        for index in range(collector.windows_done, len(windows)):
            batches = window_batches(windows[index], source)
            steps, chosen = [], []
            for batch in batches:
                steps.append(source.ffn_inputs(batch))
                chosen.append(getattr(source, "kept_experts", None))
            inputs = steps[0] if len(steps) == 1 else np.concatenate(steps, 1)
            known = [experts for experts in chosen if experts is not None]
            if look is not None and len(steps) == 1:
                look(index)
            whole = False  # an interruption must not leave a state with half a window
            collector.add(inputs, text.held_out[index], np.concatenate(known, 1) if known else None)
            collector.windows_done, whole = index + 1, True
            if progress is not None:
                progress(index + 1, len(windows))
            if state is not None and time.monotonic() - saved > _SAVE_SECONDS:
                collector.save(state, fingerprint)
                saved = time.monotonic()
    finally:
        if state is not None and whole and collector.windows_done > first:
            collector.save(state, fingerprint)
    return collector.result()


def windows_fingerprint(text: SplitText) -> str:
    """A hash of all token ids, of where the windows end, and of which are held out."""
    digest = hashlib.sha256()
    for window, held_out in zip(text.windows, text.held_out, strict=True):
        digest.update(np.asarray([*window, -2 if held_out else -1], np.int64).tobytes())
    return digest.hexdigest()


def window_batches(window: Sequence[int], source: FfnInputs, logits: bool = False) -> list[Batch]:
    """The steps that run one window as a sequence of its own, in the first KV blocks of the pool."""
    table = np.arange(-(-len(window) // source.block_size), dtype=np.int32)[None]
    batches = []
    for start in range(0, len(window), source.max_batch_rows):
        chunk = np.asarray(window[start : start + source.max_batch_rows], np.int32)
        rows = np.arange(len(chunk), dtype=np.int32)
        batches.append(
            Batch(
                tokens=chunk,
                positions=start + rows,
                sequences=np.zeros_like(rows),
                block_tables=table,
                context_lengths=np.array([start + len(chunk)], np.int32),
                logit_rows=rows if logits else rows[:0],
            )
        )
    return batches
