"""Rope tables against transformers, for every scaling."""

from typing import Any

import numpy as np
import pytest
from model_zoo import zoo

from svdengine.kernels.rope import rope_tables
from svdengine.models import config_from_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear_old_key": {"type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn_attention": {"rope_type": "yarn", **YARN, "attention_factor": 0.9},
    "yarn_betas": {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn_mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_no_original": {"rope_type": "yarn", "factor": 2.0},
    "yarn_narrow": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_match_transformers(name: str) -> None:
    scaling = SCALINGS[name]
    theirs = transformers.LlamaConfig(**SIZES, rope_scaling=dict(scaling) if scaling else None)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    positions = [0, 1, 2, 17, 300, 2000]
    cos, sin = rope_tables(config_from_hf({**SIZES, "model_type": "llama", "rope_scaling": scaling}), positions)
    expected = rotary(torch.zeros(1, 1), torch.tensor([positions]))
    assert cos.dtype == np.float32 and cos.shape == (6, 32)
    # float32 angles, which transformers computes with, are off by 2000 * 2^-24.
    for found, wanted in zip((cos, sin), expected, strict=True):
        assert np.abs(found - wanted[0, :, :32].numpy()).max() < 3e-4
        assert np.abs(found[:4] - wanted[0, :4, :32].numpy()).max() < 3e-6


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "llama3"])
def test_where_a_part_of_a_head_turns_the_rest_stays(name: str) -> None:
    """The tables of the part are those of a head as small as it, but for YaRN's blend, which transformers has too."""
    sizes = {**SIZES, "rope_parameters": {**(SCALINGS[name] or {"rope_type": "default"}), "rope_theta": 500000.0}}
    theirs = transformers.NemotronConfig(**sizes, partial_rotary_factor=0.375)
    rotary = transformers.models.nemotron.modeling_nemotron.NemotronRotaryEmbedding(theirs)
    settings = {**sizes, "model_type": "nemotron", "hidden_act": "relu2", "partial_rotary_factor": 0.375}
    positions = [0, 1, 2, 17]
    cos, sin = rope_tables(config_from_hf(settings), positions)
    expected = rotary(torch.zeros(1, 1), torch.tensor([positions]))
    assert expected[0].shape[-1] == 24 and cos.shape == sin.shape == (4, 32)
    for found, wanted in zip((cos, sin), expected, strict=True):
        assert np.abs(found[:, :12] - wanted[0, :, :12].numpy()).max() < 3e-6
    assert (cos[:, 12:] == 1).all() and (sin[:, 12:] == 0).all()


def test_no_rope_no_tables() -> None:
    with pytest.raises(ValueError, match="no rotary embedding"):
        rope_tables(zoo()["opt"], [0])
