"""A model by its name on a hub: found, downloaded and converted once, into the models folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.conversion import (
    Wanted,
    announce,
    check_room,
    convert_file,
    forecast_of,
    free_bytes,
    shown_bytes,
    working_bytes,
)
from svdengine.files.hub_name import HubName
from svdengine.files.models_folder import UNFINISHED, file_name, find_kept, models_folder

if TYPE_CHECKING:
    from svdengine.files.hub import Repository

_GGUF_GROWS = 2  # a model file in q8 is up to so many times a GGUF file, whose config is known only afterwards


def named_model(name: HubName) -> Path:
    """The model file of a name. The first time it is made; later no network is needed, and none is asked."""
    kept = next(find_kept(name), None)
    return kept.path if kept is not None else make_model(name, Wanted(), newest=False)


def make_model(name: HubName, wanted: Wanted, *, newest: bool = True) -> Path:
    """Download and convert what a name stands for now, unless that was done before. Raises SvdEngineError.

    newest: ask the hub, although there is a model of that name. Without that, what another program has made while
    this one waited for it is taken.
    """
    from svdengine.files.hub import find_repository
    from svdengine.files.temporary_file import alone_in

    with alone_in(models_folder(), lambda: _say("another program is making a model; waiting for it")):
        kept = None if newest else next(find_kept(name), None)
        if kept is not None:
            return kept.path
        repository = find_repository(name)
        kept = next(find_kept(replace(name, revision=repository.commit)), None)
        if wanted == Wanted() and kept is not None:
            _say(f"{name} is there already, at {repository.short_commit}: {kept.path}")
            return kept.path
        begin = time.perf_counter()
        source, file = _download(repository, wanted, models_folder())
        path = _convert(repository, source, file, wanted)
        _say(f"{path}: {shown_bytes(path.stat().st_size)} in {time.perf_counter() - begin:.0f} s")
        return path


def download_model(name: HubName, wanted: Wanted, target: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a name, in the hub's cache, to be converted into the folder `target`; and what it is there.

    Raises SvdEngineError.
    """
    from svdengine.files.hub import find_repository

    repository = find_repository(name)
    source, file = _download(repository, wanted, target)
    return source, _provenance(repository, file)


def _download(repository: Repository, wanted: Wanted, target: Path) -> tuple[Path, str | None]:
    """The checkpoint in the hub's cache, and which file of the repository it is, where it is one.

    Of a folder it is announced what will come; the config of a GGUF file is known only when it is here.
    """
    from svdengine.converters.needed_files import is_folder
    from svdengine.errors import ConversionError

    try:
        if repository.name.file is None and is_folder(repository.files):
            return _download_folder(repository, wanted, target), None
        return _download_gguf(repository, target)
    except ConversionError as error:
        if repository.offline:
            raise ConversionError(
                f"not all of {repository.name} is on this machine, and the hub is not: {error}"
            ) from error
        raise


def _download_folder(repository: Repository, wanted: Wanted, target: Path) -> Path:
    """A checkpoint folder: first what is small, so that what cannot run is refused before the weights come."""
    from svdengine.converters.hf_checkpoint import read_hf_config
    from svdengine.converters.needed_files import settings_files, weight_files
    from svdengine.files.hub import download

    folder = download(repository, settings_files(repository.files))
    config, notes = read_hf_config(folder, wanted.activation)
    weights = weight_files(repository.files, folder)
    told = forecast_of(config, wanted)
    _tell_download(repository, weights)
    announce(config, wanted, notes)
    copies = 2 if told.calibration_seconds is not None else 1  # a predictor is written into a copy
    room = max(copies * told.file_bytes, told.file_bytes + working_bytes(config, wanted))
    _check_room(repository, weights, target, room)
    return download(repository, weights)


def _download_gguf(repository: Repository, target: Path) -> tuple[Path, str]:
    """A GGUF file, with all its parts."""
    from svdengine.commands.arguments import check_extra
    from svdengine.converters.needed_files import gguf_files
    from svdengine.files.hub import download

    files = gguf_files(repository.files, repository.name)
    check_extra("convert", "gguf")
    _tell_download(repository, files)
    _check_room(repository, files, target, _GGUF_GROWS * sum(repository.files[file] for file in files))
    return download(repository, files) / files[0], files[0]


def _convert(repository: Repository, source: Path, file: str | None, wanted: Wanted) -> Path:
    """Convert into the models folder. Where only the predictor fails, the model is kept without one."""
    from svdengine.converters.conversion import open_checkpoint
    from svdengine.errors import ConversionError

    checkpoint = open_checkpoint(source, wanted.activation)
    config = checkpoint.config
    if file is not None:
        announce(config, wanted, checkpoint.notes)
    name, folder = repository.name, models_folder()

    def path_of(variant: str) -> Path:
        return folder / file_name(name.repository, repository.commit, file, variant)

    kind = wanted.predictor_kind(config)
    path = path_of(wanted.variant(kind))
    if path.exists():
        return path
    weights = path.with_name(f"{path.stem}{UNFINISHED}{path.suffix}")
    try:
        convert_file(source, path, wanted, kind, weights=weights, hub=_provenance(repository, file))
    except ConversionError as error:
        if wanted.kind is not None or not weights.exists():
            raise
        path = path_of(wanted.variant(None))
        weights.replace(path)
        _say(f"warning: it has no predictor and runs dense: {error.__cause__ or error}")
    return path


def _provenance(repository: Repository, file: str | None) -> dict[str, Any]:
    """What a model file keeps of where it came from (models_folder.py); `source` is a name that makes it again."""
    name = repository.name
    return {
        "source": str(HubName(name.repository, file, repository.commit)),
        "repository": name.repository,
        "revision": name.revision,
        "asked": name.file,
        "commit": repository.commit,
        "file": file,
    }


def _tell_download(repository: Repository, files: list[str]) -> None:
    from svdengine.files.hub import bytes_to_download, cache_folder, hub_address

    size, left = sum(repository.files[file] for file in files), bytes_to_download(repository, files)
    what = f"{repository.name} at {repository.short_commit}"
    if not left:
        _say(f"{what}: {shown_bytes(size)}, downloaded before")
        return
    part = "" if left == size else f" of {shown_bytes(size)}"
    folder = cache_folder()
    _say(
        f"{what}: {shown_bytes(left)}{part} to download from {hub_address()} into {folder}, where"
        f" {shown_bytes(free_bytes(folder))} are free"
    )


def _check_room(repository: Repository, files: list[str], target: Path, file_bytes: int) -> None:
    from svdengine.files.hub import bytes_to_download, cache_folder

    check_room((cache_folder(), bytes_to_download(repository, files)), (target, file_bytes))


def _say(text: str) -> None:
    click.echo(text, err=True)
