"""Where this user's files lie that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_directory() -> Path:
    """svdengine's folder of compiled kernels, operators and models to measure with. It need not exist yet."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "svdengine"
