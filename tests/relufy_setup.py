"""What the tests of ReLU-fication share: a small random SwiGLU checkpoint, and runs of seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_zoo import random_weights
from small_checkpoints import CONFIG, checkpoint_weights, hf_tensors, write_hf

from svdengine.models.config import ModelConfig

torch = pytest.importorskip("torch")

from svdengine.tools.relufy.decoder import Decoder, parameter  # noqa: E402
from svdengine.tools.relufy.settings import Settings  # noqa: E402

SILU = replace(CONFIG, activation="silu")


class Silent:
    """A status line that can do something at its nth update."""

    def __init__(self, at: int | None = None, act: Any = None) -> None:
        self.at, self.act, self.updates, self.said = at, act, 0, []

    def show(self, text: str) -> None:
        self.updates += 1
        if self.updates == self.at:
            self.act()

    def say(self, text: str) -> None:
        self.said.append(text)


def source(folder: Path, ffn_scale: float = 1.0) -> Path:
    weights = checkpoint_weights(SILU)
    weights["down"] *= ffn_scale
    return write_hf(folder / "source", hf_tensors(weights, SILU), hidden_act="silu")


def settings(folder: Path, name: str = "out", **changes: Any) -> Settings:
    """A run of a few seconds."""
    small = Settings(
        folder / "source", folder / name, sampled_tokens=4096, sparsity=0.6, window=32, layer_tokens=2048,
        layer_epochs=6, layer_rate=3e-3, steps=60, rate=2e-3,
    )  # fmt: skip
    return replace(small, **changes)


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def decoder(config: ModelConfig) -> tuple[Decoder, dict[str, Any]]:
    weights = random_weights(config)
    model = Decoder(config)
    with torch.no_grad():
        for name, w in weights.items():
            if len(w) == config.layer_count and w.ndim > 1 and name not in ("embedding", "lm_head"):
                for layer, part in enumerate(w):
                    parameter(model, name, layer).copy_(torch.from_numpy(part))
            else:
                parameter(model, name, None).copy_(torch.from_numpy(w))
    return model.requires_grad_(False), weights
