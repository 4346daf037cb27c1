"""The library of our own kernels: which file it is, loading it, and building it with CANN's toolkit.

CANN's build makes a shared library that holds the device code and registers it when it is loaded, with a C function
for each kernel ("Kernel Launch" in the Ascend C guide): `extern "C" uint32_t aclrtlaunch_<kernel>(blocks, stream,
arguments...)`. Addresses and numbers are passed as they are, so that ctypes calls it without a wrapper of ours.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import ADVICE, Cann, Function, Libraries, SharedLibraries, installed_version
from svdengine.kernels.ascend.cann import toolkit_folder as find_toolkit
from svdengine.kernels.ascend.soc import SUPPORTED, soc_of

SOURCES = Path(__file__).parent / "ops"
BUILD_COMMAND = "svdengine build-ascend-ops"
_LIBRARY = "libsvdengine_ops.so"


@dataclass(frozen=True)
class CustomOps:
    """The launch functions of our kernels."""

    score: Function
    gate: Function
    up_down: Function
    sum: Function


def library_path(folder: Path, soc: str, version: str) -> Path:
    """Where the library of a device and a CANN version lies under `folder`: other sources have another name."""
    digest = hashlib.sha256(f"{soc} {version}".encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h", ".txt"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return folder / digest.hexdigest()[:16] / _LIBRARY


def load_custom_ops(cann: Cann, soc: str, folder: Path) -> CustomOps:
    """The kernels for a device. Raises DeviceError, with what to do, where they were not built or cannot be loaded."""
    path = library_path(folder, soc, cann.version)
    if not path.is_file():
        raise DeviceError(f"the sparse FFN's kernels are not built; run: {BUILD_COMMAND}")
    cann.start()  # loading registers the device code, which needs the runtime
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DeviceError(f"the sparse FFN's kernels cannot be loaded ({error}); run: {BUILD_COMMAND}") from error
    return find_kernels(SharedLibraries([library]))


def find_kernels(libraries: Libraries) -> CustomOps:
    """The kernels of a library. Raises DeviceError where it lacks one."""

    def kernel(name: str) -> Function:
        found = libraries.find(f"aclrtlaunch_{name}")
        if found is None:
            raise DeviceError(f"the library of kernels has no {name}; run: {BUILD_COMMAND}")
        return found

    return CustomOps(kernel("svd_score"), kernel("svd_gate"), kernel("svd_up_down"), kernel("svd_sum"))


def build_custom_ops(soc: str, folder: Path, report: Callable[[str], None]) -> Path:
    """Compile the kernels for a device into `folder` and return the library.

    Raises DeviceError where the toolkit or CMake is missing, the device is none of theirs, or the build fails.
    """
    if soc_of(soc) is None:
        raise DeviceError(f"found the device {soc!r}; supported are {SUPPORTED}")
    toolkit = find_toolkit()
    if toolkit is None:
        raise DeviceError(f"no CANN toolkit was found (ASCEND_HOME_PATH is not set or no folder); {ADVICE}")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise DeviceError("cmake was not found, which builds the kernels; install CMake 3.16 or newer")
    version = installed_version()
    output = library_path(folder, soc, version)
    output.parent.mkdir(parents=True, exist_ok=True)
    report(f"building the kernels of the sparse FFN for {soc} with CANN {version}")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="build-") as build:
        options = [f"-DSOC_VERSION={soc}", f"-DASCEND_CANN_PACKAGE_PATH={toolkit}"]
        _run([cmake, "-S", str(SOURCES), "-B", build, *options])
        _run([cmake, "--build", build])
        built = next(Path(build).rglob(_LIBRARY), None)
        if built is None:
            raise DeviceError(f"the build made no {_LIBRARY}")
        built.replace(output)
    return output


def _run(command: list[str]) -> None:
    """Run a program. Raises DeviceError with the last lines that say something."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise DeviceError(f"the build of the kernels failed ({done.returncode}): {' | '.join(errors[-4:])[:800]}")
