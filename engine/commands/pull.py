"""svdengine pull: models by their names on a hub, downloaded and converted before they are needed."""

from __future__ import annotations

from pathlib import Path

import click

from svdengine.commands.arguments import ModelArgument
from svdengine.files.hub_name import HubName


@click.command("pull")
@click.argument("names", nargs=-1, required=True, type=ModelArgument(), metavar="NAME...")
def command(names: tuple[HubName | Path, ...]) -> None:
    """Download and convert models into the models folder, or newer versions of those that are there.

    \b
    A NAME is org/name, and may say more:
      org/name@v2             a branch, a tag or a commit; by default the branch main
      org/name:Q4_K_M.gguf    one GGUF file; a part of its name is enough where only one file has it
      hf://org/name           the same, whatever files are here

    `chat`, `generate`, `serve`, `bench` and `eval` do the same with a NAME that is not there yet. `convert` does it in
    other formats.
    """
    from svdengine.commands.conversion import Wanted
    from svdengine.commands.named_model import make_model
    from svdengine.errors import RequestError

    for name in names:
        if not isinstance(name, HubName):
            raise RequestError(f"{name} is not the name of a model on a hub; expected org/name or hf://org/name")
    for name in names:
        assert isinstance(name, HubName)
        make_model(name, Wanted())
