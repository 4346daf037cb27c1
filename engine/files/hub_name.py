"""Names of models on a hub: `org/name`, with a file and a revision where they are wanted.

org/name                      the model as it is on the branch main
org/name@v2                   a branch, a tag, or a commit
org/name:model-q8.gguf        one GGUF file; a part of its name is enough where only one file has it
hf://org/name@v2/a/b.gguf     the same in the form of an address
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from svdengine.errors import RequestError, quoted

MAIN = "main"  # the branch that is meant where no revision is named
SCHEME = "hf://"

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})((?:[:@][^:@]+){{0,2}})")
MODEL_FILES = (".svdp", ".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".txt")  # endings that no repository has
_LONGEST = 96  # characters of a repository's name, by the hub's own rule


@dataclass(frozen=True)
class HubName:
    """A model on a hub."""

    repository: str  # org/name
    file: str | None = None  # a GGUF file, or a part of its name; None: whatever the repository is of
    revision: str = MAIN

    def __str__(self) -> str:
        file = f":{self.file}" if self.file else ""
        return f"{self.repository}{file}" + (f"@{self.revision}" if self.revision != MAIN else "")

    @property
    def stem(self) -> str:
        """The name without the organisation, as `Path.stem` is that of a file."""
        return self.repository.partition("/")[2]


def parse_model(text: str) -> HubName | Path:
    """What a command or a program was given for a model: a name on a hub, or the path of a file.

    A name that is also that of a file or folder here is that file or folder. Raises RequestError on a text that begins
    with hf:// and is no name.
    """
    if text.startswith(SCHEME):
        return _parse_address(text)
    path = Path(text)
    name = None if is_there(path) or (text.endswith(MODEL_FILES) and ":" not in text) else _parse(text)
    return name or path


def is_there(path: Path) -> bool:
    """Whether something has this path. A text that is too long for a path is none."""
    try:
        return path.exists()
    except OSError:
        return False


def _parse_address(text: str) -> HubName:
    """Of hf://org/name, with a file after a colon or, where it ends like a GGUF file, after a slash."""
    rest = text.removeprefix(SCHEME).removeprefix("models/")
    organisation, _, more = rest.partition("/")
    repository, _, file = more.partition("/")
    found = _parse(rest)
    if file.endswith(".gguf") and ":" not in rest:
        beginning = _parse(f"{organisation}/{repository}")
        found = HubName(beginning.repository, file, beginning.revision) if beginning is not None else None
    if found is None:
        raise RequestError(f"{quoted(text)} is not the name of a model; expected hf://ORG/NAME, such as hf://org/model")
    return found


def _parse(text: str) -> HubName | None:
    found = _NAME.fullmatch(text)
    if found is None or len(found[1]) > _LONGEST or "--" in found[1] or ".." in found[1]:
        return None
    parts = re.findall(r"([:@])([^:@]+)", found[2])
    given = dict(parts)
    if len(given) != len(parts):
        return None  # two files, or two revisions
    return HubName(found[1], given.get(":"), given.get("@", MAIN))
