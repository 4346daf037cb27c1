"""CANN as this process finds it: the `acl` module, the operator libraries, and the version. Tests put others in place.

`acl` is part of CANN and no package of an index: `source <CANN>/set_env.sh` makes it importable and sets the variables
that the operator libraries need.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.signatures import signature_of

Function = Callable[..., Any]

NO_CANN = "no Ascend runtime (CANN) was found"
ADVICE = "install Huawei's CANN 8 (toolkit and operator package) and source its set_env.sh"
LEAST_VERSION = (8, 0)

# Names of the operator libraries since CANN 8.0; an installation has some of them. The first holds the descriptors.
_BASE = "libnnopbase.so"
_OPERATORS: tuple[str, ...] = ("libopapi.so", "libopapi_math.so", "libopapi_nn.so", "libopapi_transformer.so")
_OPERATORS += ("libaclnn_math.so", "libaclnn_ops_infer.so")


class Libraries(Protocol):
    """Where C functions come from."""

    def find(self, symbol: str) -> Function | None:
        """A function with the types of signatures.py, or None where no library has it."""
        ...


class SharedLibraries:
    """Libraries that are loaded by ctypes."""

    def __init__(self, libraries: Sequence[ctypes.CDLL]) -> None:
        self._libraries = libraries

    def find(self, symbol: str) -> Function | None:
        """See Libraries."""
        for library in self._libraries:
            found = getattr(library, symbol, None)
            if found is not None:
                found.restype, found.argtypes = signature_of(symbol)
                return found
        return None


class Cann:
    """The runtime and the operators of one process."""

    def __init__(self, acl: Any, libraries: Libraries, version: str) -> None:
        self.acl = acl
        self.version = version  # such as 8.1.RC1, or "unknown"
        self._libraries = libraries
        self._functions: dict[str, Function | None] = {}
        self._lock = threading.Lock()
        self._started = False

    def start(self) -> None:
        """Initialise the runtime, once a process: it cannot be initialised again after it was finalised."""
        with self._lock:
            if not self._started:
                code = self.acl.init()
                if code not in (0, _REPEATED_START):
                    raise DeviceError(self.failure("acl.init", code))
                self._started = True

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of `acl` gives besides its return code: nothing, a value, or several.

        A function returns the code alone, or last of a tuple. Raises DeviceError where it is not 0.
        """
        function = self.acl
        for part in name.split("."):
            function = getattr(function, part)
        result = function(*arguments)
        *values, code = result if isinstance(result, tuple) else (result,)
        if code:
            raise DeviceError(self.failure(f"acl.{name}", code))
        return values[0] if len(values) == 1 else tuple(values)

    def find(self, symbol: str) -> Function | None:
        """A C function, or None where this CANN lacks it."""
        if symbol not in self._functions:
            self._functions[symbol] = self._libraries.find(symbol)
        return self._functions[symbol]

    def function(self, symbol: str) -> Function:
        """A C function. Raises DeviceError where this CANN lacks it."""
        found = self.find(symbol)
        if found is None:
            raise DeviceError(
                f"CANN {self.version} has no {symbol}; it comes with the operator package of CANN 8.0 and newer"
            )
        return found

    def failure(self, call: str, code: int) -> str:
        """One line on a call that returned an error: the code, what it means, and the runtime's own words."""
        meaning = f" ({_MEANINGS[code]})" if code in _MEANINGS else ""
        said = " ".join(str(self.acl.get_recent_err_msg() or "").split())
        return f"{call} failed with {code}{meaning}{': ' + said[:600] if said else ''}"


_REPEATED_START = 100002  # the process has initialised the runtime before

# "aclError" in the runtime's and "aclnn return code" in the operators' documentation.
_MEANINGS = {
    100000: "invalid parameter",
    100001: "the runtime is not initialised",
    107000: "invalid parameter",
    107002: "no context on this thread",
    161001: "a null pointer",
    161002: "a shape, type or format that the operator does not take",
    200000: "out of memory",
    207000: "not supported by this device",
    207001: "out of device memory",
    361001: "the runtime failed",
    500000: "an internal error",
    561000: "an internal error",
    561002: "no tiling for these shapes",
    561003: "no kernel for this device: install the operator package of its SoC",
    561103: "an internal null pointer",
    561107: "ASCEND_OPP_PATH is not set: source CANN's set_env.sh",
    561112: "no kernel package for this device: install the operator package of its SoC",
}


@cache
def load_cann() -> Cann:
    """CANN of this process. Raises DeviceError, with what to install, where something is missing."""
    try:
        acl = importlib.import_module("acl")
    except ImportError as error:
        raise DeviceError(f"{NO_CANN} (no module acl: {error}); {ADVICE}") from error
    version = installed_version()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < LEAST_VERSION:
        raise DeviceError(f"CANN {version} was found, and 8.0 or newer is needed")
    base = _library(_BASE)
    operators = [library for name in _OPERATORS if (library := _library(name)) is not None]
    if base is None or not operators:
        missing = _BASE if base is None else _OPERATORS[0]
        raise DeviceError(f"CANN {version} was found, but {missing} cannot be loaded; source its set_env.sh")
    return Cann(acl, SharedLibraries([base, *operators]), version)


def toolkit_folder() -> Path | None:
    """The installation that set_env.sh names."""
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        folder = os.environ.get(variable)
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


def installed_version() -> str:
    """CANN's version as its installation states it, or "unknown"."""
    folder = toolkit_folder()
    if folder is None:
        return "unknown"
    try:
        text = (folder / "version.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = folder.resolve().name
    # Lines such as `runtime_running_version=[7.7.0.1.238:8.1.RC1]`, or a folder cann-8.5.0.
    found = re.search(r":(\d+\.\d[\w.]*)\]", text) or re.search(r"(\d+\.\d[\w.]*)", text)
    return found[1] if found else "unknown"


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
