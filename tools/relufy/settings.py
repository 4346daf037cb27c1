"""How a model is ReLU-fied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAINED = ("ffn", "layers", "all")
ACTIVATIONS = ("fatrelu", "relu")
ROUNDED = ("q4",)  # formats whose rounding is worth training with


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Two runs with equal settings on the same files do the same."""

    source: Path  # Hugging Face folder or GGUF file
    output: Path  # Hugging Face folder to write
    student: Path | None = None  # output of an earlier run to go on from; None: the source itself, and stage 1
    text: tuple[Path, ...] = ()  # UTF-8 text, or chats as .jsonl
    sampled_tokens: int | None = (
        None  # of text that the teacher writes; None: what fits the budget where no text is given
    )
    seconds: float = 3600.0  # what everything together may take, about
    sparsity: float = 0.9  # share of the gates that shall be zero
    activation: str = "fatrelu"  # of ACTIVATIONS: thresholds that rise, or relu and a penalty on gates
    window: int = 256  # tokens
    rows: int = 8  # windows of a step
    layer_tokens: int | None = None  # that stage 1 trains a layer on; None: what fits the budget
    layer_epochs: int = 2
    layer_rate: float = 5e-3  # Adam's, at the start of each layer
    steps: int | None = None  # of stage 2; None: what fits the budget
    rate: float = 2e-4  # Adam's, in stage 2
    train: str = "ffn"  # of TRAINED, in stage 2
    dtype: str | None = None  # of ROUNDED: what the file will hold; None: nothing is rounded
    embedding_dtype: str | None = None  # the same for embedding and output projection
    down_dtype: str | None = None  # "q8" where `down` is stored so, whose rounding is not worth training with
    device: str = "cpu"  # cpu or cuda
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of either stage."""
        return self.rows * self.window
