"""The log of a server: a line for each request when it is done. What was asked is in it only if that is wanted."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from svdengine.errors import RequestError

log = logging.getLogger("svdengine.server")

_QUIET_PATHS = frozenset(("/health", "/metrics"))  # monitors ask for them all the time
_LONGEST = 200  # characters of a path
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up_log(*, verbose: bool, quiet: bool, file: Path | None) -> None:
    """Have the server's log written: to a file, or to standard error. Raises RequestError where it cannot be.

    quiet: errors and warnings only. verbose: also what monitors and browsers ask for.
    """
    try:
        handler: logging.Handler = (
            logging.FileHandler(file, encoding="utf-8") if file is not None else logging.StreamHandler(sys.stderr)
        )
    except OSError as error:
        raise RequestError(f"cannot write the log {file}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(_FORMAT))
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def log_request(client: str, method: str, path: str, status: int, seconds: float, *, page: bool) -> None:
    """A line on a request that is done. `page`: it is for a file of the chat page."""
    level = logging.WARNING if status >= 500 else logging.DEBUG if page or path in _QUIET_PATHS else logging.INFO
    log.log(level, "%s %s %s %d %.3f s", client or "-", method, _shown(path), status, seconds)


def log_prompt(path: str, body: Any) -> None:
    """What was asked, where that is wanted."""
    log.info("%s asked %s", _shown(path), json.dumps(body, ensure_ascii=True))


def _shown(path: str) -> str:
    """A path without what could pass for a line of the log, or for a key."""
    return "".join(c if c.isprintable() else "?" for c in path)[:_LONGEST]
