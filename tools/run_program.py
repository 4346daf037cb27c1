"""Other programs, run to their end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from svdengine.errors import SvdEngineError

PATIENCE = 900.0  # seconds after which a program has failed


def run_program(command: Sequence[str], failed: str) -> str:
    """What a program prints. Raises SvdEngineError that begins with `failed` when it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise SvdEngineError(f"{failed}: it took more than {PATIENCE:g} seconds") from error
    except OSError as error:
        raise SvdEngineError(f"{failed}: {error.strerror or error}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise SvdEngineError(f"{failed}: {reason}")
    return done.stdout
