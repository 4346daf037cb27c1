"""svdengine rm: remove models from the models folder, or what was downloaded for them."""

from __future__ import annotations

from pathlib import Path

import click

from svdengine.commands.arguments import ModelArgument
from svdengine.files.hub_name import HubName


@click.command("rm")
@click.argument("names", nargs=-1, required=True, type=ModelArgument(), metavar="NAME...")
@click.option(
    "--downloads",
    is_flag=True,
    help="Remove what was downloaded of it from the hub's cache instead, which other programs may use too.",
)
def command(names: tuple[HubName | Path, ...], downloads: bool) -> None:
    """Remove models that `svdengine list` shows: all files of a NAME, or only those of NAME@REVISION or NAME:FILE.

    A model that a program has loaded stays usable there until that program ends.
    """
    from svdengine.errors import RequestError

    for name in names:
        if not isinstance(name, HubName):
            raise RequestError(f"{name} is not the name of a model on a hub; expected org/name or hf://org/name")
        if downloads:
            _remove_downloads(name)
        else:
            _remove_models(name)


def _remove_models(name: HubName) -> None:
    from svdengine.errors import RequestError
    from svdengine.files.models_folder import kept_models, means

    found = [model for model in kept_models() if means(name, model, all_of_it=True)]
    if not found:
        raise RequestError(f"{name} is not in the models folder; svdengine list shows what is")
    for model in found:
        model.path.unlink()
        click.echo(f"removed {model.path} ({model.size_bytes / 1e6:.1f} MB)", err=True)


def _remove_downloads(name: HubName) -> None:
    from svdengine.errors import RequestError
    from svdengine.files.hub import cache_folder, remove_downloads

    freed = remove_downloads(name.repository)
    if not freed:
        raise RequestError(f"nothing of {name.repository} is in {cache_folder()}")
    click.echo(f"removed {freed / 1e6:.1f} MB of {name.repository} from {cache_folder()}", err=True)
