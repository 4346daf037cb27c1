"""Every family that transformers has: same logits from its random model and from ours, read through hf_source."""

from typing import Any

import numpy as np
import pytest
from model_zoo import canonical_weights, make_batch, random_tokens, relative_error

from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import config_from_hf, hf_source
from svdengine.models.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 41

LLAMA = {
    "model_type": "llama",
    "vocab_size": 119,
    "hidden_size": 90,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
OPT = {
    "model_type": "opt",
    "vocab_size": 119,
    "hidden_size": 90,
    "ffn_dim": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "max_position_embeddings": 64,
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 119,
    "hidden_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
}
UNGATED = {key: value for key, value in LLAMA.items() if key != "model_type"}
ARCEE = {**UNGATED, "model_type": "arcee"}
NEMOTRON = {**UNGATED, "model_type": "nemotron", "head_dim": 16}
JAIS2 = {**UNGATED, "model_type": "jais2"}
GEMMA3 = {**UNGATED, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
GEMMA3 = {**GEMMA3, "num_hidden_layers": 4, "sliding_window_pattern": 3, "attention_dropout": 0.0}

CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_relu_tied": {**LLAMA, "hidden_act": "relu", "tie_word_embeddings": True, "rope_theta": 500000.0},
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama_head_dim": {**LLAMA, "head_dim": 24},
    "llama_gelu_tanh": {**LLAMA, "hidden_act": "gelu_pytorch_tanh"},
    "llama_relu2": {**LLAMA, "hidden_act": "relu2"},
    "llama_linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_llama3": {**LLAMA, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    "llama_yarn": {**LLAMA, "rope_scaling": YARN},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "mistral_window": {**LLAMA, "model_type": "mistral", "sliding_window": 7},
    "qwen2": QWEN2,
    "qwen2_window": {**QWEN2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**QWEN3, "tie_word_embeddings": True},
    "qwen3_biases_yarn": {**QWEN3, "attention_bias": True, "rope_parameters": {**YARN, "rope_theta": 1e6}},
    "qwen3_window": {
        **QWEN3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": OPT,
    "opt_gelu_untied": {**OPT, "activation_function": "gelu", "tie_word_embeddings": False},
    "opt_no_biases": {**OPT, "enable_bias": False},
    "falcon_7b": FALCON,
    "falcon_7b_relu_biases": {**FALCON, "activation": "relu", "bias": True},
    "falcon_40b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "tie_word_embeddings": False},
    "falcon_40b_biases": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "bias": True},
    "falcon_11b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    "falcon_sequential": {**FALCON, "parallel_attn": False, "bias": True, "ffn_hidden_size": 150},
    "falcon_many_kv_heads": {**FALCON, "multi_query": False},
    "arcee": {**ARCEE, "hidden_act": "relu2", "head_dim": 16},
    "arcee_yarn_biases": {**ARCEE, "rope_scaling": {**YARN, "mscale": 1.0}, "attention_bias": True, "mlp_bias": True},
    "nemotron": NEMOTRON,
    "nemotron_a_quarter": {**NEMOTRON, "partial_rotary_factor": 0.25, "attention_bias": True, "mlp_bias": True},
    "nemotron_whole_heads": {**NEMOTRON, "partial_rotary_factor": 1.0, "norm_eps": 1e-3, "hidden_act": "silu"},
    "jais2": {**JAIS2, "rope_theta": 500000.0},
    "gemma3": GEMMA3,
    "gemma3_scaled_untied": {
        **GEMMA3,
        "rope_theta": 20000.0,
        "rope_local_base_freq": 3000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 24,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma3_layers_named": {
        **GEMMA3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
        },
    },
    "jais2_no_biases": {**JAIS2, "attention_bias": False, "mlp_bias": False, "layer_norm_eps": 1e-3},
}


def random_model(settings: dict[str, Any]) -> Any:
    """A transformers model with random weights, its norms and biases included."""
    settings = dict(settings)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.5 if "embed" in name else parameter.shape[-1] ** -0.5
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * torch.randn_like(parameter))
    return model


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def tensors_of(model: Any, prefix: str = "") -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): tensor.numpy() for name, tensor in model.state_dict().items()}


def reference_logits(config: ModelConfig, checkpoint: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    executor = ReferenceExecutor(config, canonical_weights(config, checkpoint, hf_source))
    return executor.forward(make_batch([(tokens, 0)], [[4, 1, 9]]))


@pytest.mark.parametrize("name", CASES)
def test_same_logits(name: str) -> None:
    model = random_model(CASES[name])
    config = config_from_hf(CASES[name])
    tokens = random_tokens(config, LENGTH)
    assert relative_error(reference_logits(config, tensors_of(model), tokens), logits_of(model, tokens)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_same_last_hidden_state(name: str) -> None:
    model = random_model(CASES[name])
    config = config_from_hf(CASES[name])
    tokens = random_tokens(config, LENGTH)
    executor = ReferenceExecutor(config, canonical_weights(config, tensors_of(model), hf_source))
    executor.forward(make_batch([(tokens, 0)], [[4, 1, 9]]))
    with torch.no_grad():
        expected = model.base_model(torch.tensor([tokens])).last_hidden_state[0].numpy()
    assert relative_error(executor.hidden_states(), expected) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_config_as_transformers_saves_it(name: str) -> None:
    """It fills in defaults and moves the rope settings; what it writes means the same to us."""
    saved = random_model(CASES[name]).config.to_dict()
    assert config_from_hf(saved) == config_from_hf(CASES[name])


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("llama", "model."), ("opt", "model."), ("opt", "model.decoder."), ("falcon_40b", "transformer.")],
)
def test_checkpoints_without_prefix(name: str, prefix: str) -> None:
    model, config = random_model(CASES[name]), config_from_hf(CASES[name])
    whole = canonical_weights(config, tensors_of(model), hf_source)
    bare = canonical_weights(config, tensors_of(model, prefix), hf_source)
    assert all((bare[key] == whole[key]).all() for key in whole)


def test_fatrelu_is_an_activation_of_a_llama() -> None:
    settings = {**LLAMA, "hidden_act": "relu"}
    model = random_model(settings)
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lambda x: torch.where(x > 0.3, x, torch.zeros_like(x))
    config = config_from_hf({**settings, "hidden_act": "fatrelu", "hidden_act_param": 0.3})
    tokens = random_tokens(config, LENGTH)
    assert relative_error(reference_logits(config, tensors_of(model), tokens), logits_of(model, tokens)) < 1e-4


def test_bamboo_is_a_mistral_with_two_relus() -> None:
    settings = {**LLAMA, "model_type": "mistral", "hidden_act": "relu", "sliding_window": 9}
    model = random_model(settings)

    def forward(mlp: Any, x: Any) -> Any:
        return mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))

    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)
    config = config_from_hf({**settings, "model_type": "bamboo"})
    assert config == config_from_hf({**settings, "architectures": ["BambooForCausalLM"]})
    tokens = random_tokens(config, LENGTH)
    assert relative_error(reference_logits(config, tensors_of(model), tokens), logits_of(model, tokens)) < 1e-4


def test_minicpm_is_a_llama_with_scaled_weights() -> None:
    scales = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 30}
    settings = {**LLAMA, "hidden_act": "relu"}
    model = random_model(settings)
    checkpoint = {name: tensor.copy() for name, tensor in tensors_of(model).items()}
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3.0
        model.lm_head.weight *= 30 / 90
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1.4 / 2**0.5
            layer.mlp.down_proj.weight *= 1.4 / 2**0.5
    config = config_from_hf({**settings, **scales, "model_type": "minicpm", "tie_word_embeddings": False})
    tokens = random_tokens(config, LENGTH)
    assert relative_error(reference_logits(config, checkpoint, tokens), logits_of(model, tokens)) < 1e-4


BITNET = {**UNGATED, "model_type": "bitnet", "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
BITNET |= {"intermediate_size": 160, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
PACKING = {"quant_method": "bitnet", "linear_class": "autobitlinear", "modules_to_not_convert": None}


def bitnet_model(rounded_activations: bool) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model whose projections are rounded as transformers does, its master weights, and its packed ones."""
    from transformers.integrations.bitnet import pack_weights

    model = random_model(BITNET)
    master = {name: tensor.copy() for name, tensor in tensors_of(model).items()}
    packed = dict(master)
    for name, layer in model.named_modules():
        if not name.endswith("_proj"):
            continue
        with torch.no_grad():
            scale = layer.weight.abs().mean().clamp(min=1e-5)
            signs = (layer.weight / scale).round().clamp(-1, 1)
            layer.weight.copy_(signs * scale)
        packed[f"{name}.weight"] = pack_weights(signs.clone()).numpy()
        packed[f"{name}.weight_scale"] = scale.reshape(1).numpy()
        if rounded_activations:
            layer.register_forward_pre_hook(
                lambda _, x: (torch.round(x[0] * (unit := 127 / x[0].abs().amax(-1, keepdim=True))) / unit,)
            )
    return model, master, packed


def test_bitnet_from_master_weights_and_from_packed_ones() -> None:
    model, master, packed = bitnet_model(rounded_activations=False)
    online, offline = (
        {**BITNET, "quantization_config": {**PACKING, "quantization_mode": m}} for m in ("online", "offline")
    )
    config = config_from_hf(online)
    assert config == config_from_hf(offline) == config_from_hf(BITNET)
    tokens = random_tokens(config, LENGTH)
    expected = logits_of(model, tokens)
    assert relative_error(reference_logits(config, master, tokens), expected) < 1e-4
    assert relative_error(reference_logits(config, packed, tokens), expected) < 1e-4
    rounded = tensors_of(model)  # what is ternary already stays as it is
    assert relative_error(reference_logits(config, rounded, tokens), expected) < 1e-4


def test_bitnet_keeps_more_of_activations_than_it_was_trained_with() -> None:
    """transformers rounds what products read to 8 bits; we do not. The next token is nearly as likely."""
    model, master, _ = bitnet_model(rounded_activations=True)
    config = config_from_hf(BITNET)
    tokens = random_tokens(config, LENGTH)
    expected, found = logits_of(model, tokens), reference_logits(config, master, tokens)
    assert 1e-4 < relative_error(found, expected) < 0.1
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9
