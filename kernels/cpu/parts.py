"""The parts of compiled code: each is one file of object code, with the pieces (pieces.py) that it has.

Nothing here needs a compiler: what runs a model only loads the parts that the model needs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from svdengine.models import ModelConfig

INTERLEAVE, BANDWIDTH = "interleave", "bandwidth"  # what no step needs


@dataclass(frozen=True)
class Part:
    """One file of object code."""

    pieces: tuple[str, ...]  # what it exports
    module: str  # of this package, which defines them when it is imported
    seconds: float  # of one core of the machine of BENCHMARKS.md, to compile it


PARTS: dict[str, Part] = {
    "sparse": Part(("sparse_row", "sparse_batch", "list_neurons", "gate_listed", "up_listed"), "step", 12),
    "step": Part(("run", "call_members"), "step", 8),
    "rows": Part(("gemv", "gemv_few", "gemm"), "step", 9),
    "rows_alike": Part(("gemv_many",), "step", 7),
    "attention": Part(("attention",), "step", 5),
    "panels": Part(("multiply_panels", "multiply_in_panels"), "step", 7),
    "neuron_rows": Part(("add_rows", "gemm_transposed"), "step", 6),
    "ffn": Part(("ffn", "dense_row"), "step", 3),
    "experts": Part(("route", "choose_experts", "experts"), "step", 6),
    INTERLEAVE: Part(("interleave",), "interleaving", 2),
    BANDWIDTH: Part(("read_range",), "read_range", 1),
}


def symbol_of(piece: str) -> str:
    """The name that object code has a piece under."""
    return f"svdengine_{piece}"


def needed_parts(config: ModelConfig, copied: Collection[str], *, deterministic: bool) -> frozenset[str]:
    """The parts that steps of a model need, of which the matrices `copied` are interleaved."""
    head = "embedding" if config.tied_embeddings else "lm_head"
    multiplied = {"q", "k", "v", "o", head, "up"} | ({"gate"} if config.gated else set())
    if not config.sparse_ffn:
        multiplied.add("down")
    needed = {"step", "attention", "ffn"}
    if copied:
        needed |= {"panels", INTERLEAVE}
    if multiplied - set(copied):
        needed |= {"rows", "rows_alike"} if deterministic else {"rows", "panels"}
    if config.sparse_ffn:
        needed |= {"neuron_rows", "sparse"}
    if config.expert_count:
        needed.add("experts")
    return frozenset(needed)
