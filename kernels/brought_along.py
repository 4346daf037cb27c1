"""Folders of compiled kernels that were made beforehand and brought along. They are only read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ENVIRONMENT = "SVDENGINE_KERNELS"  # folders that `svdengine compile -o` made, separated as those of PATH
PACKAGE = "svdengine_kernels"  # an installed package that is such a folder


def folders_brought_along() -> Iterator[Path]:
    """Those that the environment names, then the package."""
    for folder in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
        if folder:
            yield Path(folder)
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield Path(folder)
