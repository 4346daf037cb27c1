"""Kinds of values that commands take, and checks of them before any work."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from svdengine.commands.help_pages import FromOption
from svdengine.files.hub_name import MODEL_FILES, HubName, is_there, parse_model


class Number(click.FloatRange):
    """A finite number; click takes "nan" for one that lies in any range."""

    name = "number"

    def _describe_range(self) -> str:
        """For help, which would call a range without ends x<=None."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, in its range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"expected a finite number, found {value!r}", param, ctx)
        return number


class ModelArgument(click.ParamType):
    """A model: the path of a file or folder, or a name on a hub."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files, and names of models that were converted."""
        from svdengine.errors import SvdEngineError
        from svdengine.files.models_folder import kept_models

        names: list[str] = []
        with suppress(SvdEngineError, OSError):
            names = sorted({str(model.name) for model in kept_models() if model.name is not None})
        return [
            *(CompletionItem(name) for name in names if name.startswith(incomplete)),
            CompletionItem(incomplete, type="file"),
        ]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HubName | Path:
        """Tell the two apart."""
        from svdengine.errors import RequestError

        if isinstance(value, HubName | Path):
            return value
        try:
            return parse_model(str(value))
        except RequestError as error:
            self.fail(str(error), param, ctx)


class ModelOrQuestion(ModelArgument):
    """A model, or a text that is neither a file nor a name: what is asked of the demo model, or a mistyped name.

    A text that -m gave is a model in any case.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Tell them apart: HubName, Path or Question."""
        found = super().convert(value, param, ctx)
        told = isinstance(value, str) and not isinstance(value, FromOption)
        return Question(value) if told and isinstance(found, Path) and _no_path(value, found) else found


class Question(str):
    """A text that names no model."""

    __slots__ = ()

    @property
    def sure(self) -> bool:
        """Whether it is a question; a word alone could be a mistyped name."""
        return len(self.split()) > 1 or self.endswith("?")


def _no_path(text: str, path: Path) -> bool:
    """Whether a text has nothing of a path, not even of one that leads nowhere."""
    if is_there(path) or text.startswith(("/", "./", "../", "~")) or text.endswith(MODEL_FILES):
        return False
    return len(path.parts) < 2 or not path.parent.is_dir()


def existing_file(model: Path) -> Path:
    """The path of a file that is there. Raises ModelFileError with what a model can be, where nothing is."""
    from svdengine.errors import ModelFileError

    if is_there(model):
        return model
    raise ModelFileError(
        f"{model}: there is no such file; a model is a .svdp file, or the name of a model on a hub, such as"
        " openbmb/MiniCPM-S-1B-sft. svdengine list shows those that are here"
    )


def kept_file(model: HubName | Path) -> Path:
    """The file of a model that is here. Raises ModelFileError on a name of which nothing was converted."""
    from svdengine.files.models_folder import kept_path

    return kept_path(model) if isinstance(model, HubName) else existing_file(model)


def check_extra(extra: str, *modules: str) -> None:
    """Raise SvdEngineError with what to install when a module of an optional part is missing."""
    from svdengine.errors import SvdEngineError

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SvdEngineError(f'this needs {" and ".join(missing)}; run: pip install "svdengine[{extra}]"')


def check_writable(output: Path) -> None:
    """Find out before the work whether there is a folder to write to. Raises RequestError."""
    from svdengine.errors import RequestError

    if not output.parent.is_dir():
        raise RequestError(f"{output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise RequestError(f"{output}: the folder {output.parent} cannot be written to")
