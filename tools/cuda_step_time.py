"""Model, not measurement: where the time of a decode step goes on an NVIDIA GPU, kernel by kernel.

    python -m svdengine.tools.cuda_step_time --card H200 --dtype f16 --context 512
    python -m svdengine.tools.cuda_step_time --card H200 --prefill 8192

What a step launches is asked of the executor itself, which runs on no device here. A kernel takes as long as its bytes
do at the share of the bandwidth that a copy reaches, or as its instructions do where that is longer; then comes the gap
to the next one. Kernels that start early (kernels/cuda/early_launch.py) would shorten that gap, by how much is not
known. Instructions are counted in the main loop of the machine code that is compiled for the card, which
takes the test extra; with `--bytes-only` they are left out. Activations, lists and sums stay in the GPU's cache and
count nothing. So does whatever makes a kernel wait: a GPU can only be slower. With `--prefill` it is the attention of a
prompt: its instructions on tensor cores, against the time that products of the same size take at the share of the
tensor cores' rate that cuBLAS is known to reach. `svdengine bench --device cuda` measures.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.attention_tiles import most_queries, tiles_kernel
from svdengine.kernels.cuda.compilation import TARGETS, compile_kernel
from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.planned_device import Launch
from svdengine.kernels.cuda.rounding import takes_integers
from svdengine.kernels.executor import FfnPath
from svdengine.kernels.formats import FORMATS, WEIGHT_FORMATS, WeightFormat, padded_columns
from svdengine.models import ModelConfig
from svdengine.tools.machine_code import bytes_per_instruction, disassembled, loops
from svdengine.tools.planned_kernels import step_launches
from svdengine.tools.random_model import SHAPES, shape_config

_REACHED = 0.9  # of the bandwidth, by a copy
_GAP = 1.1e-6  # seconds from a kernel of a graph to the next one, which waits for it
_INSTRUCTIONS = 2.5  # that a multiprocessor issues a cycle
_CUBLAS = 0.75  # of the tensor cores' rate, by large products in float16
_MMA = 4096  # operations of an mma of 16 x 8 x 16
_HOST = 150e-6  # seconds that the host takes from one step to the next
# Of a step in which the GPU waits for the host: the next step is launched ahead (kernels/cuda/ahead.py), by one kernel
# more, but where it needs another KV block.
_WAITING = _HOST / BLOCK_SIZE + _GAP
_KV_BYTES = 2  # of a float16
_ROUNDED_BYTES = 2.25  # of an activation of 16 bits, with its share of a group's scale and sum
_PREDICTOR = 11  # arguments that are a layer of a predictor, and what it reads
_MATRIX = 4  # arguments that are a matrix: words, scale, low and row
_EXPERTS = "_experts"  # how kernels are called that read FFN blocks of a mixture of experts
# Kernels that read weights: what they do, the format, and rows of weights and of activations that a warp has at once.
_NAMED = re.compile(
    r"(gemv_transposed|gemv|gate_up|gate|up|down|heads|normed|activated|route|predicted(?:_[a-z]+\d*_\d))_([a-z]+\d*)"
    r"(?:_f16|_f32|_(\d+)(?:x(\d+))?)?(?:_split|_experts)?"
)


@dataclass(frozen=True)
class Card:
    """A GPU, as its data sheet describes it."""

    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # cycles a second
    tensor: float  # operations a second, float16 with float32 sums, dense
    target: str


CARDS = {
    "H100": Card(3.35e12, 132, 1.83e9, 989e12, "sm_90a"),
    "H200": Card(4.8e12, 132, 1.83e9, 989e12, "sm_90a"),
    "RTX4090": Card(1.008e12, 128, 2.52e9, 165e12, "sm_89"),
    "RTX3090": Card(0.936e12, 82, 1.70e9, 71e12, "sm_86"),
    "Orin": Card(0.2048e12, 16, 1.30e9, 42e12, "sm_87"),
}


@dataclass(frozen=True)
class Work:
    """A step: one token of one sequence."""

    config: ModelConfig
    dtype: WeightFormat
    context: int  # tokens that are cached
    path: FfnPath
    rank: int = 256  # of the predictor
    predicted: float = 0.15  # share of neurons whose gate is computed
    active: float = 0.10  # share of neurons whose up and down are read


@dataclass(frozen=True)
class KernelTime:
    """All launches of a kernel in a step."""

    name: str
    launches: int
    bytes: float  # of weights and of the KV cache
    reading: float  # seconds that the bytes take
    issuing: float  # seconds that the instructions take

    @property
    def seconds(self) -> float:
        """With the gaps behind its launches."""
        return max(self.reading, self.issuing) + self.launches * _GAP


def step_times(work: Work, card: Card, rates: Mapping[str, float]) -> list[KernelTime]:
    """Each kernel of a step. rates: bytes of weights that a kernel reads with an instruction of a warp, where known."""
    launches: dict[str, float] = {}
    read: dict[str, float] = {}
    one, two = (_counted(_launches(work, layers), work) for layers in (1, 2))
    for name in two:
        (first, first_bytes), (second, second_bytes) = one.get(name, (0, 0.0)), two[name]
        more = work.config.layer_count - 1
        launches[name] = first + more * (second - first)
        read[name] = first_bytes + more * (second_bytes - first_bytes)
    found = []
    for name, count in launches.items():
        issued = read[name] / rates[name] if name in rates else 0.0
        found.append(
            KernelTime(
                name,
                round(count),
                read[name],
                read[name] / (_REACHED * card.bandwidth),
                issued / (_INSTRUCTIONS * card.multiprocessors * card.clock),
            )
        )
    return sorted(found, key=lambda kernel: -kernel.seconds)


def instruction_rates(work: Work, card: Card) -> dict[str, float]:
    """Bytes of weights an instruction of a warp, in the main loop of each kernel of a step that reads weights."""
    kernels = {launch.kernel.name: launch.kernel for launch in _launches(work, 1)}
    found = {}
    for name, kernel in kernels.items():
        share = weight_share(name)
        if share is not None:
            _, (cubin,) = compile_kernel(kernel, [TARGETS[card.target]])
            found[name] = share * bytes_per_instruction(disassembled(cubin))
    return {name: rate for name, rate in found.items() if rate}


def weight_share(name: str) -> float | None:
    """Which share of what a kernel's main loop loads is weights, and not activations; None for other kernels."""
    match = _NAMED.fullmatch(name)
    if match is None or match[2] not in FORMATS:
        return None
    kind, stored = match[1], next(stored for name, stored in FORMATS.items() if name == match[2])
    kernels = kernels_of(stored.name)
    weights = stored.row_bytes(kernels.chunk_columns)
    rows, tile = (int(match[3] or 1), int(match[4] or 1)) if kind == "gemv" else (1, 1)
    read = _ROUNDED_BYTES if takes_integers(stored.name) else 4
    activations = 0 if kind in ("gemv_transposed", "down") else read * kernels.chunk_columns * tile
    return rows * weights / (rows * weights + activations)


def _launches(work: Work, layers: int) -> list[Launch]:
    config = replace(work.config, layer_count=layers)
    return step_launches(config, work.dtype, context=work.context, rank=work.rank, path=work.path)


def _counted(launches: Sequence[Launch], work: Work) -> dict[str, tuple[int, float]]:
    """Launches and bytes of each kernel."""
    found: dict[str, tuple[int, float]] = {}
    for launch in launches:
        count, read = found.get(launch.kernel.name, (0, 0.0))
        found[launch.kernel.name] = count + 1, read + _bytes_of(launch, work)
    return found


def _bytes_of(launch: Launch, work: Work) -> float:
    """Bytes of weights or of the KV cache that a launch reads."""
    name, config = launch.kernel.name, work.config

    def matrix(first: int) -> float:
        return float(sum(array.nbytes for array in launch.arguments[first : first + _MATRIX]))

    if name.endswith(_EXPERTS):
        return config.chosen_blocks * _block_bytes(name, work)
    if name.startswith(("gemv", "project", "score", "heads", "normed", "route")):
        return matrix(0)
    if name.startswith("activated"):  # a matrix and a bias, twice where there is a gate
        return matrix(0) + (matrix(_MATRIX + 1) if config.gated else 0)
    if name.startswith("predicted"):  # all of the predictor, then as gate_up
        return matrix(0) + _residual(launch) + _listed(work, matrix(_PREDICTOR), matrix(_PREDICTOR + _MATRIX + 2))
    if name.startswith("gate_up"):  # a matrix, what may lie in host memory, and a bias, twice
        return _listed(work, matrix(0), matrix(_MATRIX + 2))
    if name.startswith(("gate", "up", "down")):
        return (work.predicted if name.startswith("gate") else work.active) * matrix(0)
    if name.startswith("attention"):
        return 2.0 * _KV_BYTES * work.context * config.kv_head_count * config.head_dim
    if name.startswith("embed"):
        return float(FORMATS[work.dtype].row_bytes(padded_columns(config.hidden_size)))
    return 0.0


def _block_bytes(name: str, work: Work) -> float:
    """Bytes that a kernel for mixtures of experts reads of a block that a token has."""
    config, stored = work.config, FORMATS[work.dtype]
    row = stored.stored_bytes(config.ffn_size, config.hidden_size)  # gate, up, or down with a row a neuron
    listed = _listed(work, row, row)
    factors = FORMATS["q8"]
    found = {
        "activated": (1 + config.gated) * row,
        "normed": stored.stored_bytes(config.hidden_size, config.ffn_size),
        "gemv_transposed": row,
        "project": factors.stored_bytes(work.rank, config.hidden_size),
        "predicted": factors.stored_bytes(config.ffn_size, work.rank) + listed,
        "gate_up": listed,
        "down": work.active * row,
    }
    return float(next((read for kind, read in found.items() if name.startswith(kind)), 0))


def _residual(launch: Launch) -> float:
    """Bytes of a predictor's low-bit part, which follows its second factor."""
    return float(sum(array.nbytes for array in launch.arguments[_MATRIX : _MATRIX + 2]))


def _listed(work: Work, gate: float, up: float) -> float:
    """Bytes that are read of a gate and an up."""
    return work.predicted * gate + (work.active * up if work.config.gated else 0)


@dataclass(frozen=True)
class PrefillTime:
    """The attention of a prompt in all layers, in seconds."""

    issuing: float  # what its instructions take
    library: float  # products of this size at cuBLAS's rate

    @property
    def seconds(self) -> float:
        """The slower of both: no more of the tensor cores' rate is reached than cuBLAS reaches."""
        return max(self.issuing, self.library)


def prefill_time(config: ModelConfig, tokens: int, card: Card, each: float) -> PrefillTime:
    """The attention of a prompt; each: instructions for an mma in the loop over keys and values."""
    # Scores and sums of values, a multiply-add being two operations; half of the positions are seen.
    operations = 2 * 2 * tokens**2 / 2 * config.head_dim * config.head_count * config.layer_count
    issued = operations / _MMA * each
    return PrefillTime(
        issued / (_INSTRUCTIONS * card.multiprocessors * card.clock),
        operations / (_CUBLAS * card.tensor),
    )


def instructions_an_mma(config: ModelConfig, card: Card) -> float:
    """In the loop of prefill attention that has most of them."""
    group = config.head_count // config.kv_head_count
    kernel = tiles_kernel(config.head_dim, min(group, most_queries(config.head_dim)))
    _, (cubin,) = compile_kernel(kernel, [TARGETS[card.target]])
    counts = [(sum(one.name.startswith("HMMA") for one in loop), len(loop)) for loop in loops(*disassembled(cubin))]
    most = max(count for count, _ in counts)
    return min(size for count, size in counts if count == most) / most


def table(times: Sequence[KernelTime]) -> list[str]:
    """A table of a step."""
    lines = [
        "| kernel | launches | MB | bytes ms | instructions ms | gaps ms | together ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in times:
        numbers = (one.reading, one.issuing, one.launches * _GAP, one.seconds)
        cells = " | ".join(f"{1e3 * number:.3f}" for number in numbers)
        lines.append(f"| {one.name} | {one.launches} | {one.bytes / 1e6:.1f} | {cells} |")
    return lines


def _print_prefill(name: str, shape: str, config: ModelConfig, tokens: int) -> None:
    card = CARDS[name]
    each = instructions_an_mma(config, card)
    found = prefill_time(config, tokens, card, each)
    print(f"A model, not a measurement: {name}, {shape}, attention of a prompt of {tokens} tokens:")
    issuing, library = 1e3 * found.issuing, 1e3 * found.library
    print(f"{each:.1f} instructions an mma take {issuing:.0f} ms; as many products by cuBLAS, at {_CUBLAS:.0%} of the")
    print(f"tensor cores' rate, take {library:.0f} ms: attention takes {found.seconds / found.library:.1f} times that")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.cuda_step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=CARDS, default="H200")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--dtype", choices=WEIGHT_FORMATS, default="f16", help="of all weights (default: f16)")
    parser.add_argument("--context", type=int, default=512, help="tokens that are cached (default: 512)")
    for name, what in (("predicted", "whose gate is computed"), ("active", "whose up and down are")):
        default = getattr(Work, name)
        parser.add_argument(
            f"--{name}", type=float, default=default, help=f"share of neurons {what} (default: {default})"
        )
    parser.add_argument("--rank", type=int, default=Work.rank, help=f"of the predictor (default: {Work.rank})")
    parser.add_argument("--bytes-only", action="store_true", help="compile nothing, and count no instructions")
    parser.add_argument("--prefill", type=int, metavar="TOKENS", help="the attention of a prompt instead of a step")
    options = parser.parse_args(arguments)
    card, config, seconds = CARDS[options.card], shape_config(options.shape, activation="relu"), {}
    if options.prefill:
        _print_prefill(options.card, options.shape, config, options.prefill)
        return
    shares = f"rank {options.rank}, {options.predicted:.0%} predicted, {options.active:.0%} active"
    print(f"A model, not a measurement: {options.card}, {options.shape}, {options.dtype}, one token,")
    print(f"{options.context} tokens cached, {shares}; {_REACHED:.0%} of {card.bandwidth / 1e9:.0f} GB/s is reached,")
    print(
        f"{_INSTRUCTIONS} instructions a cycle, {1e6 * _GAP:.1f} us between kernels,"
        f" {1e6 * _HOST:.0f} us of the host every {BLOCK_SIZE} steps"
    )
    paths: tuple[FfnPath, ...] = ("dense", "predict")
    for path in paths:
        work = Work(
            config, options.dtype, options.context, path, options.rank, options.predicted, options.active
        )  # fmt: skip
        times = step_times(work, card, {} if options.bytes_only else instruction_rates(work, card))
        seconds[path] = sum(one.seconds for one in times) + _WAITING
        read = sum(one.bytes for one in times)
        print("", *table(times), "", sep="\n")
        print(
            f"{path}: {1e3 * seconds[path]:.2f} ms, {1 / seconds[path]:.0f} tokens/s, {read / 1e9:.2f} GB,"
            f" {sum(one.launches for one in times)} launches,"
            f" {read / seconds[path] / card.bandwidth:.0%} of the bandwidth"
        )
    print(f"the sparse step is {seconds['dense'] / seconds['predict']:.2f} times as fast")


if __name__ == "__main__":
    main()
