"""svdengine list: what is in the models folder."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from svdengine.files.models_folder import KeptModel


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def command(as_json: bool) -> None:
    """Show the models that were converted by name: name, commit, format, predictor, size and day.

    The folder is the one that SVDENGINE_MODELS names, or `models` in the user's cache.
    """
    from svdengine.files.models_folder import kept_models, models_folder

    models = kept_models()
    if as_json:
        click.echo(json.dumps([_record(model) for model in models], indent=2))
        return
    if models:
        click.echo("\n".join(_table(models)))
    total = sum(model.size_bytes for model in models) / 1e9
    click.echo(f"{len(models)} files, {total:.2f} GB in {models_folder()}", err=True)


def _record(model: KeptModel) -> dict[str, Any]:
    return {
        "name": str(model.name) if model.name else None,
        "commit": model.commit,
        "file": str(model.path),
        "dtype": model.dtype,
        "predictor": model.predictor,
        "finished": model.finished,
        "size_bytes": model.size_bytes,
    }


def _table(models: list[KeptModel]) -> list[str]:
    rows: list[tuple[str, ...]] = [("name", "commit", "format", "predictor", "GB", "made")]
    for model in models:
        name = str(model.name) if model.name else model.path.name
        predictor = model.predictor or ("-" if model.finished else "unfinished")
        day = time.strftime("%Y-%m-%d", time.localtime(model.changed))
        cells = (name, model.commit[:7] or "-", model.dtype, predictor, f"{model.size_bytes / 1e9:.2f}", day)
        rows.append(tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
