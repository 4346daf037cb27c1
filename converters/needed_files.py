"""Which files of a repository are the checkpoint: as little as the converter needs of what there is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from svdengine.converters.checkpoint import read_json
from svdengine.errors import ConversionError, quoted
from svdengine.files.hub_name import HubName

# Beside the weights: settings and tokenizer, as converters/hf_checkpoint.py and converters/hf_tokenizer.py read them.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Weights in order of preference: one file, or an index that names the shards. Pickles are the last resort.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
_NO_MODEL = ("mmproj", "imatrix")  # in names of GGUF files that are not a language model
_MOST_LISTED = 12


def settings_files(files: Iterable[str]) -> list[str]:
    """The small files of a checkpoint folder: settings, tokenizer, and the index of its weights."""
    there = set(files)
    names = [name for name in _TEXTS if name in there]
    for whole, index in _WEIGHTS:
        if whole in there:
            break
        if index in there:
            return [*names, index]
    return names


def weight_files(files: Iterable[str], folder: Path) -> list[str]:
    """The files with the weights, by the index in `folder`, where `settings_files` are. Raises ConversionError."""
    there = set(files)
    for whole, index in _WEIGHTS:
        if whole in there:
            return [whole]
        if index in there:
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ConversionError(f"{index}: expected a weight_map")
            names = sorted({str(name) for name in shards.values()})
            for name in names:
                if name not in there:
                    raise ConversionError(f"{index} names the file {quoted(name)}, which the repository lacks")
            return names
    raise ConversionError("found neither model.safetensors nor its index")


def is_folder(files: Iterable[str]) -> bool:
    """Whether the repository is a checkpoint folder: settings, and weights as transformers names them."""
    there = set(files)
    return "config.json" in there and any(name in there for names in _WEIGHTS for name in names)


def gguf_files(files: Mapping[str, int], name: HubName) -> list[str]:
    """The GGUF file that a name means, with all its parts; `files`: path -> bytes of all that there is.

    `name.file` is a path, the name of a file, or a part of it that only one has. Raises ConversionError, with the
    choices.
    """
    models = _models(files)
    if not models:
        raise ConversionError(_nothing(files, name))
    found = list(models) if name.file is None else _matching(models, name.file)
    if len(found) == 1:
        return models[found[0]]
    some = (found or list(models))[:_MOST_LISTED]
    if name.file is None:
        problem = f"{name} has {len(models)} GGUF files"
    else:
        count = f"{len(found)} GGUF files are" if found else "no GGUF file is"
        problem = f"{name.repository}: {count} like {quoted(name.file)}"
    choices = ", ".join(f"{Path(m).name} ({_size(sum(files[f] for f in models[m]))})" for m in some)
    left = len(found or models) - len(some)
    more = f" and {left} more" if left else ""
    raise ConversionError(f"{problem}; name one, such as {replace(name, file=Path(some[0]).name)}: {choices}{more}")


def _models(files: Mapping[str, int]) -> dict[str, list[str]]:
    """The first part of each model -> all its parts, the smallest model first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        if not file.lower().endswith(".gguf") or any(word in file.lower() for word in _NO_MODEL):
            continue
        part = _PART.fullmatch(file)
        groups.setdefault((part[1], part[2]) if part else (file, ""), []).append(file)
    return {group[0]: group for group in sorted(groups.values(), key=lambda g: sum(files[f] for f in g))}


def _matching(models: Iterable[str], wanted: str) -> list[str]:
    models, low = list(models), wanted.lower()
    for fits in (
        lambda path: path == wanted,
        lambda path: Path(path).name == wanted,
        lambda path: re.search(rf"(?<![a-z0-9]){re.escape(low)}(?![a-z0-9_])", path.lower()) is not None,
        lambda path: low in path.lower(),
    ):
        if found := [path for path in models if fits(path)]:
            return found
    return []


def _nothing(files: Mapping[str, int], name: HubName) -> str:
    if name.file is not None:
        return f"{name.repository} has no GGUF file; where it is a checkpoint folder, leave :{name.file} out"
    kinds = ", ".join(sorted({Path(f).suffix for f in files if Path(f).suffix})[:8]) or "no files"
    return f"{name} has no weights that can be converted; expected model.safetensors or a .gguf file, found {kinds}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
