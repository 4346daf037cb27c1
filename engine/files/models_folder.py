"""The models folder: what was converted from a hub, each under a name made of all that it was made from.

It is the folder that SVDENGINE_MODELS names, or `models` in the user's cache. What a file was made from stands in its
provenance, so that files may be renamed and copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svdengine.errors import ModelFileError, SvdEngineError
from svdengine.files.hub_name import MAIN, HubName
from svdengine.files.tensor_file import read_header
from svdengine.kernels.user_cache import lasting_cache_directory

HUB = "hub"  # in a file's provenance: repository, revision and file as asked for; commit and file that were meant
UNFINISHED = ".unfinished"  # before .svdp: weights whose predictor is still to be made

_COMMIT = 12  # characters of a commit in a file's name
_SHORTEST = 7  # characters by which a commit may be named


@dataclass(frozen=True)
class KeptModel:
    """A model file in the models folder."""

    path: Path
    name: HubName | None  # as it was asked for; None: not from a hub
    commit: str
    file: str | None  # that of the repository which it was made from, where it was one
    dtype: str
    predictor: str | None  # its kind
    size_bytes: int
    changed: float  # seconds since 1970

    @property
    def finished(self) -> bool:
        """Whether all of it is there that was to be made."""
        return not self.path.stem.endswith(UNFINISHED)


def models_folder() -> Path:
    """The folder, which is made where it is not there. Raises SvdEngineError, with what to set."""
    chosen = os.environ.get("SVDENGINE_MODELS")
    if not chosen:
        folder = lasting_cache_directory() / "models"
        folder.mkdir(exist_ok=True)
        return folder
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise SvdEngineError(f"cannot make the models folder {folder}: {reason}; set SVDENGINE_MODELS") from error
    if not os.access(folder, os.W_OK):
        raise SvdEngineError(f"the models folder {folder} cannot be written to; set SVDENGINE_MODELS")
    return folder


def file_name(repository: str, commit: str, file: str | None, variant: str) -> str:
    """The name of a model's file: org--name--0123456789ab--q8-lowbit.svdp, with that of a GGUF file in it."""
    parts = [*repository.split("/"), commit[:_COMMIT]]
    if file is not None:
        parts.append(re.sub(r"[^\w.-]", "-", file.removesuffix(".gguf")))
    return "--".join([*parts, variant]) + ".svdp"


def kept_models() -> list[KeptModel]:
    """All model files in the folder, by name, the newest of a name first. What is damaged is left out."""
    found = [model for path in models_folder().glob("*.svdp") if (model := _read(path)) is not None]
    return sorted(found, key=lambda m: (str(m.name or "~"), -m.changed))


def find_kept(name: HubName) -> Iterator[KeptModel]:
    """Finished models that a name means, the newest first: the revision as it was asked for, or its commit."""
    for model in sorted(kept_models(), key=lambda m: -m.changed):
        if model.finished and means(name, model):
            yield model


def kept_path(name: HubName) -> Path:
    """The newest file that a name means. Raises ModelFileError, with the command that makes it."""
    for model in find_kept(name):
        return model.path
    raise ModelFileError(
        f"{name}: no such file, and no model of that name was converted here; run: svdengine pull {name}"
    )


def means(name: HubName, model: KeptModel, *, all_of_it: bool = False) -> bool:
    """Whether a name is that of a model. `all_of_it`: a name without a file or revision is that of all of them."""
    was = model.name
    if was is None or name.repository.lower() != was.repository.lower():
        return False
    same_file = name.file == was.file or (name.file is not None and name.file == model.file)
    same_commit = len(name.revision) >= _SHORTEST and model.commit.startswith(name.revision.lower())
    same_revision = name.revision == was.revision or same_commit
    return (same_file or (all_of_it and name.file is None)) and (same_revision or (all_of_it and name.revision == MAIN))


def _read(path: Path) -> KeptModel | None:
    try:
        metadata = read_header(path).metadata
        provenance = json.loads(metadata.get("provenance", "{}"))
        predictor = json.loads(metadata["predictor"]).get("kind") if "predictor" in metadata else None
        hub = provenance.get(HUB) or {}
        name = HubName(str(hub["repository"]), hub.get("asked"), str(hub["revision"])) if hub else None
        status = path.stat()
        return KeptModel(
            path=path,
            name=name,
            commit=str(hub.get("commit", "")),
            file=hub.get("file"),
            dtype=str(provenance.get("dtype", "?")),
            predictor=predictor,
            size_bytes=status.st_size,
            changed=status.st_mtime,
        )
    except (ModelFileError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
