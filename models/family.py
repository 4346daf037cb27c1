"""What a model family is: how one kind of checkpoint names its settings and tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]
Build = Callable[[Sequence[Array]], Array]


def only(arrays: Sequence[Array]) -> Array:
    """The checkpoint's tensor as it is."""
    return arrays[0]


def transposed(arrays: Sequence[Array]) -> Array:
    """The checkpoint's matrix with rows and columns exchanged."""
    return arrays[0].T


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor (of one layer) comes from: checkpoint tensors, and what makes ours out of them."""

    names: tuple[str, ...]  # tensors of the checkpoint, read as float32
    build: Build = only  # gives the logical shape of the spec


def plain(config: ModelConfig, tensor: str) -> Build:
    """How most tensors are built: as they are, but for the transposed down projection."""
    return transposed if tensor == "down_T" else only


@dataclass(frozen=True)
class Naming:
    """How one kind of checkpoint names the canonical tensors, and what it stores in another layout.

    A stem is a tensor's name without ".weight" and ".bias", on our side and on the checkpoint's. Some kinds have
    several names for one tensor, and prefixes that a checkpoint may leave out: the first that is there is taken.
    """

    stems: Mapping[str, tuple[str, ...]]  # canonical stem -> the checkpoint's, with {layer}
    prefixes: tuple[str, ...] = ("",)
    build: Callable[[ModelConfig, str], Build] = plain  # canonical tensor name -> what makes it

    def source(self, config: ModelConfig, tensor: str, layer: int | None, available: Container[str]) -> Source:
        """The source of a canonical tensor. Raises ValueError when the checkpoint lacks it."""
        stem, suffix = split_suffix(tensor)
        if stem not in self.stems:
            raise ValueError(f"a {config.family} checkpoint has no name for the tensor {tensor}")
        names = [prefix + name.format(layer=layer) + suffix for name in self.stems[stem] for prefix in self.prefixes]
        for name in names:
            if name in available:
                return Source((name,), self.build(config, tensor))
        raise ValueError(
            f"the checkpoint lacks the tensor {' or '.join(names)}, the {tensor} of a {config.family} model"
        )


def split_suffix(tensor: str) -> tuple[str, str]:
    """The stem of a canonical name, and the suffix of the checkpoint's tensor: q.bias -> q, .bias; q -> q, .weight."""
    suffix = ".bias" if tensor.endswith(".bias") else ".weight"
    return tensor.removesuffix("_T").removesuffix(suffix), suffix


@dataclass(frozen=True)
class GgufFamily:
    """How a GGUF file of this family differs from what all GGUF files have in common."""

    architecture: str  # general.architecture
    naming: Naming
    # (metadata without the architecture's prefix, tensor names) -> fields of ModelConfig that it sets
    fields: Callable[[Mapping[str, Any], Container[str]], dict[str, Any]] = field(default=lambda fields, names: {})
    partial_rotary: bool = False  # whether a part of each head may stay, in heads whose halves are paired


@dataclass(frozen=True)
class Family:
    """One model family: how to recognise it, and how to read its settings and tensors."""

    name: str
    model_types: tuple[str, ...]  # of config.json
    architectures: tuple[str, ...]  # of config.json
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    hf: Naming
    gguf: GgufFamily | None = None  # None: GGUF has no such architecture
    harmless: tuple[str, ...] = ()  # settings that are without effect in this family, beyond those of leftovers.py
