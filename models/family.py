"""What a model family is: how one kind of checkpoint names its settings and tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig, Router
from svdengine.models.tensors import ROUTER, place_of

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
    # Of a stack the only tensor that is read, counted from 0: (one, of how many). `build` gets it alone.
    item: tuple[int, int] | None = None


def part_of(build: Build, stem: str, part: int, size: int) -> Build:
    """How one FFN block is built of a wider FFN: from `size` neurons of it, which are columns of down."""
    neurons = slice(part * size, (part + 1) * size)

    def cut(arrays: Sequence[Array]) -> Array:
        return build([arrays[0][:, neurons] if stem.endswith("down") else arrays[0][neurons]])

    return cut


def plain(config: ModelConfig, tensor: str) -> Build:
    """How most tensors are built: as they are, but for the transposed down projection."""
    return transposed if tensor == "down_T" else only


@dataclass(frozen=True)
class Naming:
    """How one kind of checkpoint names the canonical tensors, and what it stores in another layout.

    A stem is a tensor's name without ".weight" and ".bias", on our side and on the checkpoint's. Some kinds have
    several names for one tensor, and prefixes that a checkpoint may leave out: the first that is there is taken.
    """

    # Canonical stem -> the checkpoint's, with {layer}. Those of experts begin with "expert_" and have {expert}, or are
    # stacks of all experts of a layer; those of an FFN beside them begin with "shared_".
    stems: Mapping[str, tuple[str, ...]]
    prefixes: tuple[str, ...] = ("",)
    build: Callable[[ModelConfig, str], Build] = plain  # canonical tensor name -> what makes it

    def source(self, config: ModelConfig, tensor: str, layer: int | None, available: Container[str]) -> Source:
        """The source of a canonical tensor, the `layer`-th of its stack. Raises ValueError when there is none."""
        stem, suffix = split_suffix(tensor)
        place = None if layer is None else place_of(config, tensor, layer)
        expert = None if place is None else place.expert
        part = None if place is None else place.part
        if expert is not None and expert >= config.expert_count:
            stem, part, expert = f"shared_{stem}", expert - config.expert_count, None
        elif expert is not None:
            stem = f"expert_{stem}"
        if stem not in self.stems:
            raise ValueError(f"a {config.family} checkpoint has no name for the tensor {tensor}")
        known = {"layer": None if place is None else place.layer, "expert": expert}
        names = {prefix + name.format(**known) + suffix: name for name in self.stems[stem] for prefix in self.prefixes}
        if tensor == ROUTER and config.shared_gate:
            return self._gated_router(config, list(names), known, available)
        for name, pattern in names.items():
            if name in available:
                build = self.build(config, tensor)
                if part is not None:
                    build = part_of(build, stem, part, config.ffn_size)
                stacked = expert is not None and "{expert}" not in pattern
                return Source((name,), build, (expert, config.expert_count) if expert is not None and stacked else None)
        raise ValueError(
            f"the checkpoint lacks the tensor {' or '.join(names)}, the {tensor} of a {config.family} model"
        )

    def _gated_router(
        self, config: ModelConfig, names: Sequence[str], known: Mapping[str, int | None], available: Container[str]
    ) -> Source:
        """A router whose last row is the gate of the shared FFN, a vector or a matrix of one row in a checkpoint."""
        stem = self.stems["shared_router"][0].format(**known) + ".weight"
        gates = [prefix + stem for prefix in self.prefixes]
        found = [next((name for name in several if name in available), None) for several in (names, gates)]
        if found[0] is None or found[1] is None:
            lacking = names if found[0] is None else gates
            raise ValueError(f"the checkpoint lacks the tensor {' or '.join(lacking)} of a {config.family} model")
        return Source((found[0], found[1]), lambda arrays: np.concatenate([arrays[0], arrays[1].reshape(1, -1)]))


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
    router: Router | None = None  # how its experts are weighed; None: it has none


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
    experts: bool = False  # whether it is a mixture of experts
