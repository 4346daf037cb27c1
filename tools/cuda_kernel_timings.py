"""Single kernels of the CUDA backend, timed at the shape of a layer: what each reads, how fast, and the least possible.

A work is launched once for each layer of a stack, so that no weight is read twice, and recorded as a graph, as decoding
runs it. Before every timed run other memory is read, which leaves nothing of it in the GPU's cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.attention import attend
from svdengine.kernels.cuda.bandwidth import Reader, read_bandwidth
from svdengine.kernels.cuda.device import Device, Gemm
from svdengine.kernels.cuda.gemm import narrow
from svdengine.kernels.cuda.gemv import multiply, multiply_transposed
from svdengine.kernels.cuda.kv_cache import allocate_cache
from svdengine.kernels.cuda.model import Model, build_model
from svdengine.kernels.cuda.placed_predictor import PlacedPredictor, place_predictor
from svdengine.kernels.cuda.rounding import rounded_for
from svdengine.kernels.cuda.sparse import gate_listed
from svdengine.kernels.cuda.state import State
from svdengine.kernels.cuda.step import ffn
from svdengine.kernels.cuda.workspace import Sizes, Workspace, allocate_workspace, pack_inputs
from svdengine.kernels.executor import FfnPath
from svdengine.kernels.formats import Parts, WeightFormat, padded_columns, quantize
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models import ModelConfig, tensor_specs

_LISTS = 5  # of gathered rows, none in two of them
_FAR = np.float32(1e4)  # beyond every product: decides whether a gate is active


@dataclass(frozen=True)
class Shape:
    """A layer, and the shares of its neurons that sparse works compute; by default of Llama-2-7B."""

    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    head_dim: int = 128
    context: int = 4096  # tokens that decode attention reads
    layers: int = 16
    rank: int = 256  # of the predictor, whose factors are q8
    predicted: float = 0.15
    active: float = 0.10
    gathered: float = 0.10  # rows of the gathered product


@dataclass(frozen=True)
class Work:
    """Something to be timed."""

    name: str
    run: Callable[[], None]  # launches it `count` times, each on weights of its own
    count: int
    bytes: int  # that one of them must read
    recorded: bool = True  # as a graph; the vendor's library cannot be
    against: str = ""  # the work that its speed is compared with
    to_reach: str = ""


@dataclass(frozen=True)
class Timing:
    """What a work took, and the least that its bytes take at the measured read bandwidth."""

    name: str
    microseconds: float  # the median
    megabytes: float
    floor_microseconds: float
    of_bandwidth: float  # floor over time
    against: str  # another work, or ""
    ratio: float | None  # that work's time over this one's: above 1, this one is faster
    to_reach: str


def time_kernels(
    device: Device,
    shape: Shape,
    formats: Sequence[WeightFormat],
    repetitions: int,
    report: Callable[[str], None] = lambda name: None,
) -> tuple[float, list[Timing]]:
    """The device's read bandwidth in GB/s, and timings of all works. Raises DeviceError when memory runs out."""
    reader = Reader(device)
    bandwidth, timings = read_bandwidth(device, reader), []
    # Each builder's works share weights: only those of one are in memory at a time.
    builders: list[Callable[[], list[Work]]] = [partial(_ffn_works, device, shape, name) for name in formats]
    for build in (*builders, lambda: [attention_work(device, shape)]):
        timings += _time_works(device, reader, build(), repetitions, bandwidth, report)
    return bandwidth, timings


def _time_works(
    device: Device,
    reader: Reader,
    works: Sequence[Work],
    repetitions: int,
    bandwidth: float,
    report: Callable[[str], None],
) -> list[Timing]:
    seconds = {}
    for work in works:
        report(work.name)
        seconds[work.name] = _median_seconds(device, reader, work, repetitions)
    return [_timing(work, seconds, bandwidth) for work in works]


def _median_seconds(device: Device, reader: Reader, work: Work, repetitions: int) -> float:
    work.run()  # loads its kernels
    run = work.run
    if work.recorded:
        graph = device.record(work.run)
        run = lambda: device.replay(graph)  # noqa: E731
        run()
    times = []
    for _ in range(repetitions):
        reader.read()
        times.append(device.seconds(run) / work.count)
    return statistics.median(times)


def _timing(work: Work, seconds: Mapping[str, float], bandwidth: float) -> Timing:
    taken, floor = seconds[work.name], work.bytes / bandwidth / 1e9
    other = seconds.get(work.against)
    return Timing(
        name=work.name,
        microseconds=1e6 * taken,
        megabytes=work.bytes / 1e6,
        floor_microseconds=1e6 * floor,
        of_bandwidth=floor / taken,
        against=work.against if other else "",
        ratio=other / taken if other else None,
        to_reach=work.to_reach,
    )


def _ffn_works(device: Device, shape: Shape, weight_format: WeightFormat) -> list[Work]:
    return FfnStack(device, shape, weight_format).works()


class FfnStack:
    """Layers of FFNs in one format. Every layer has the same random weights, in memory of its own.

    The predictor's thresholds and the gates' biases say which neurons are predicted and active, whatever is read.
    """

    def __init__(self, device: Device, shape: Shape, weight_format: WeightFormat) -> None:
        self.device, self.shape, self.format = device, shape, weight_format
        self.config = _config(shape, hidden=shape.hidden, ffn=shape.ffn, heads=1, head_dim=64)
        random = np.random.default_rng(0)
        self.part = quantize(random.standard_normal((shape.ffn, shape.hidden), np.float32), weight_format)
        order = random.permutation(shape.ffn)
        self.predicted, self.active = (order[: round(share * shape.ffn)] for share in (shape.predicted, shape.active))
        layer_predictor = self._layer_predictor()
        self.predictor_bytes = sum(p.nbytes for p in (*layer_predictor.a.values(), *layer_predictor.b.values()))
        self.model = self._model()
        self.predictor: PlacedPredictor = place_predictor(
            device, self.config, Predictor((layer_predictor,) * shape.layers, {}), [None] * shape.layers
        )
        self.work: Workspace = allocate_workspace(device, Sizes.of(self.config, 1, BLOCK_SIZE))
        for to, columns in ((self.work.normed, shape.hidden), (self.work.hidden, shape.ffn)):
            device.write(to, random.standard_normal(columns, np.float32))
        self.state = State(device, self.model, self.work, allocate_cache(device, self.config, 1, "f16"), None)

    @property
    def row_bytes(self) -> float:
        """Stored bytes of one row of gate, up or down."""
        return sum(part.nbytes for part in self.part.values()) / self.shape.ffn

    def works(self) -> list[Work]:
        """Dense and gathered products, and whole FFNs."""
        shape, name, row = self.shape, self.format, self.row_bytes
        size, own = f"{shape.ffn} x {shape.hidden}", name == "f16"
        matrix = round(shape.ffn * row)
        dense = Work(
            f"dense {name} GEMV {size}", self._multiply, shape.layers, matrix,
            against="cuBLAS" if own else "", to_reach="85 % of bandwidth, and cuBLAS" if own else "",
        )  # fmt: skip
        transposed = Work(f"dense {name} GEMV {size}, transposed", self._multiply_transposed, shape.layers, matrix)
        count = round(shape.gathered * shape.ffn)
        lists = min(_LISTS, shape.ffn // count)
        gathered = Work(
            f"gathered {name} GEMV, {_percent(shape.gathered)} of {size}", self._gather(count, lists),
            lists * shape.layers, round(count * row), to_reach="60 % of bandwidth" if own else "",
        )  # fmt: skip
        whole = Work(f"dense {name} FFN", lambda: self._ffn("dense"), shape.layers, 3 * matrix)
        read = self.predictor_bytes + row * (len(self.predicted) + 2 * len(self.active))
        shares = f"rank {shape.rank}, {_percent(shape.predicted)} predicted, {_percent(shape.active)} active"
        sparse = Work(
            f"sparse {name} FFN, {shares}", lambda: self._ffn("predict"), shape.layers, round(read),
            against=whole.name, to_reach="4 x dense" if own else "",
        )  # fmt: skip
        works = [dense, transposed, gathered, whole, sparse]
        if own and self.device.has_blas:
            works.insert(0, Work("cuBLAS", self._library(), shape.layers, matrix, recorded=False))
        return works

    def _layer_predictor(self) -> LayerPredictor:
        """Factors of zeros, which are read like others, and thresholds that name the predicted neurons."""
        shape = self.shape
        threshold = np.full(shape.ffn, _FAR)
        threshold[self.predicted] = -_FAR
        a = quantize(np.zeros((shape.ffn, shape.rank), np.float32), "q8")
        b = quantize(np.zeros((shape.rank, shape.hidden), np.float32), "q8")
        return LayerPredictor(shape.rank, "q8", 0, a, b, {}, threshold, np.ones_like(threshold))

    def _model(self) -> Model:
        bias = np.full(self.shape.ffn, -_FAR)
        bias[self.active] = _FAR
        parts = dict.fromkeys(("gate", "up", "down_T"), self.part)
        arrays, formats = _arrays(self.config, parts, self.format)
        arrays["gate.bias"] = np.broadcast_to(bias, arrays["gate.bias"].shape)
        return build_model(self.device, self.config, arrays, formats, BLOCK_SIZE)

    def _multiply(self) -> None:
        work, sizes = self.work, self.work.sizes
        x = rounded_for(self.device, [self.format], work.normed, work.rounded, sizes.hidden, 1)
        for layer in self.model.layers:
            multiply(self.device, layer.up, x, sizes.hidden, work.gate_up, sizes.gate_up, 1)

    def _multiply_transposed(self) -> None:
        for layer in self.model.layers:
            multiply_transposed(self.device, layer.down, self.work.hidden, self.work.sizes.ffn, self.work.partial, 1)

    def _library(self) -> Callable[[], None]:
        """The same product as `_multiply` by the vendor's library."""
        device, work, shape = self.device, self.work, self.shape
        stride = work.sizes.hidden
        x = device.zeros(stride, np.float16)
        device.launch(narrow, (-(-stride // 512), 1), 256, work.normed, x, stride, stride)
        gemm = Gemm(shape.ffn, stride, 1, stride, stride, work.sizes.gate_up, False, 1.0, False)

        def run() -> None:
            for layer in self.model.layers:
                device.gemm(layer.up.words.view(np.float16), x, work.gate_up, gemm)

        return run

    def _gather(self, count: int, lists: int) -> Callable[[], None]:
        """The products of `lists` lists of `count` rows, as gates of a model without ups are computed."""
        device, work = self.device, self.work
        order = np.random.default_rng(1).permutation(self.shape.ffn)[: lists * count]
        listed = [
            replace(work, neurons=device.upload(np.sort(part).astype(np.int32))) for part in order.reshape(lists, count)
        ]
        length = device.upload(np.array([count], np.int32))

        def run() -> None:
            for one in listed:
                for layer in self.model.layers:
                    alone = replace(layer, gate=None)
                    gate_listed(device, self.model, replace(one, lengths=length), alone, work.normed, 1)

        return run

    def _ffn(self, path: FfnPath) -> None:
        for index, layer in enumerate(self.model.layers):
            ffn(self.state, self.predictor, index, layer, self.work.normed, 1, path)


def attention_work(device: Device, shape: Shape) -> Work:
    """Decode attention of one row that sees the whole context, whose keys and values are float16."""
    config = _config(shape, hidden=64, ffn=64, heads=shape.heads, head_dim=shape.head_dim)
    part = quantize(np.zeros((64, 64), np.float32), "f16")
    arrays, formats = _arrays(config, dict.fromkeys(("gate", "up", "down_T"), part), "f16")
    model = build_model(device, config, arrays, formats, shape.context)
    work = allocate_workspace(device, Sizes.of(config, 1, shape.context))
    blocks = -(-shape.context // BLOCK_SIZE)
    cache = allocate_cache(device, config, blocks, "f16")
    values: dict[str, NDArray] = {
        "positions": np.array([shape.context - 1]),
        "tiles": np.array([[0, 1]]),
        "block_tables": np.arange(blocks),
    }
    device.write(work.inputs, pack_inputs(work.sizes, values))

    def run() -> None:
        for index in range(shape.layers):
            attend(device, model, index, work, cache, 1, 1, 1)

    size = 2 * shape.context * shape.heads * cache.head_stride * 2
    name = f"decode attention, {shape.context} tokens, {shape.heads} heads of {shape.head_dim}"
    return Work(name, run, shape.layers, size)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _config(shape: Shape, *, hidden: int, ffn: int, heads: int, head_dim: int) -> ModelConfig:
    """A stack of layers of which only some parts have their size."""
    return ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=hidden,
        layer_count=shape.layers,
        head_count=heads,
        kv_head_count=heads,
        head_dim=head_dim,
        ffn_size=ffn,
        max_position=max(shape.context, BLOCK_SIZE),
        norm="rms",
        norm_eps=1e-5,
        activation="relu",
        gated=True,
        rope=None,
        ffn_bias=True,
        tied_embeddings=True,
    )


def _arrays(
    config: ModelConfig, ffn_parts: Mapping[str, Parts], ffn_format: WeightFormat
) -> tuple[dict[str, NDArray], dict[str, WeightFormat]]:
    """Stored arrays of a model: the FFN's matrices are those given, the same in every layer; all else is zero."""
    arrays: dict[str, NDArray] = {}
    formats: dict[str, WeightFormat] = {}
    for spec in tensor_specs(config):
        if not spec.matrix:
            arrays[spec.name] = np.zeros(spec.shape, np.float32)
            continue
        formats[spec.name] = ffn_format if spec.name in ffn_parts else "f16"
        nothing = np.zeros((spec.shape[-2], padded_columns(spec.shape[-1])), np.float16)
        for suffix, part in ffn_parts.get(spec.name, {"": nothing}).items():
            arrays[spec.name + suffix] = np.broadcast_to(part, (*spec.shape[:-2], *part.shape))
    return arrays, formats
