"""What a run has done so far, in a folder beside the output: an interrupted run goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from svdengine.converters.checkpoint import Checkpoint, describe_files
from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import SvdEngineError
from svdengine.tools.relufy.settings import Settings
from svdengine.tools.relufy.text import Text, Windows

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes from one run
    fcntl = None  # type: ignore[assignment]

_PATHS = ("source", "student", "output", "text")  # of the settings: what lies there counts, not where
_IDENTITY, _TEXT, _STATE, _LOCK = "run.json", "text.npz", "state.pt", "lock"


class SavedRun:
    """The folder of a run. Raises SvdEngineError when it holds a run with other settings or on other files."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.folder = settings.output.with_name(settings.output.name + ".partial")
        identity = _identity(settings, checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        known = self._read_identity()
        if known is None:
            _replace(self.folder / _IDENTITY, lambda path: path.write_text(json.dumps(identity, indent=2)))
        elif known != identity:
            changed = ", ".join(name for name in identity if known.get(name) != identity[name])
            raise SvdEngineError(
                f"{self.folder}: an unfinished run with other settings or files ({changed});"
                " go on with those, or remove the folder to begin anew"
            )

    def load_text(self) -> Text | None:
        """The windows of the run, if they were saved."""
        path = self.folder / _TEXT
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Text(*(Windows(arrays[part], arrays[f"{part}_given"]) for part in ("train", "held_out")))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise SvdEngineError(f"{path}: cannot be read ({error}); remove the folder to begin anew") from error

    def save_text(self, text: Text) -> None:
        """Keep the windows: text that was sampled, or files that may change meanwhile."""

        def write(path: Path) -> None:
            train, held_out = text.train, text.held_out
            with path.open("wb") as stream:
                np.savez(
                    stream,
                    train=train.tokens,
                    train_given=train.given,
                    held_out=held_out.tokens,
                    held_out_given=held_out.given,
                )

        _replace(self.folder / _TEXT, write)

    def load_state(self) -> dict[str, Any]:
        """What `save_state` kept last; empty when the run has just begun."""
        path = self.folder / _STATE
        if not path.exists():
            return {}
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler meets
            raise SvdEngineError(f"{path}: cannot be read ({error}); remove the folder to begin anew") from error
        return state

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state: plain values and tensors."""
        _replace(self.folder / _STATE, lambda path: torch.save(dict(state), path))

    def remove(self) -> None:
        """The run is complete."""
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another process go on with the run."""
        self._lock.close()

    def _read_identity(self) -> dict[str, Any] | None:
        path = self.folder / _IDENTITY
        if not path.exists():
            return None
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SvdEngineError(f"{path}: cannot be read ({error}); remove the folder to begin anew") from error
        return known if isinstance(known, dict) else {}


def _locked(folder: Path) -> IO[bytes]:
    """A file that keeps other processes from the folder until it is closed. Raises SvdEngineError when one is there."""
    stream = (folder / _LOCK).open("wb")
    if fcntl is not None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise SvdEngineError(f"{folder}: another process is at work on this run; wait for it, or stop it") from None
    return stream


def _identity(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """What makes two runs the same: settings, source and text."""
    values = {name: value for name, value in asdict(settings).items() if name not in _PATHS}
    values["source"] = describe_files(checkpoint.files)
    values["student"] = settings.student and describe_files(open_checkpoint(settings.student).files)
    values["text"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in settings.text]
    return json.loads(json.dumps(values))


def _replace(path: Path, write: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".new")
    write(partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)
