"""What a checkpoint holds beyond what its family reads: known to be harmless, or refused by name.

A setting that is passed over in silence can make the weights mean something else. So whatever a family did not read
(`Noted`) must stand in one of the tables here: without effect whatever its value, or without effect at the value that
it has. The same holds for tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from svdengine.errors import quoted
from svdengine.models.config import ModelConfig
from svdengine.models.settings import finite, shown

_SHOWN = 4  # names in a message
_TEXT_PART = "text_config."  # settings of the part that reads text, in a model that reads other things too

# Settings of config.json that change nothing when a trained model computes its logits, by kind.
_HARMLESS_HF = re.compile(
    "|".join(
        (
            # where the model comes from, and what wrote the file
            r"_name_or_path|_commit_hash|name_or_path|model_name|name|license|.*version|auto_map|architectures|model_type",
            r"custom_pipelines|finetuning_task|task_specific_params|problem_type|(id2label|label2id)",
            r"unsloth.*|transformers\.js_config|is_llama_config|.*_url|author|base_model.*|language|tags|library_name",
            # how programs hold and run it
            r"(torch_)?dtype|.*_dtype|torchscript|use_bfloat16|tf_legacy_loss|use_cache|keys_to_ignore_at_inference",
            r"_attn_implementation.*|attn_implementation|_?(use_)?flash_attn(_2_enabled)?|use_flash_attention(_2)?",
            r"_?experts_implementation|_from_model_config|fused_.*|use_fused_.*|gradient_checkpointing|use_sdpa|softmax_in_fp32",
            r"pretraining_tp|tensor_parallel.*|chunk_size_feed_forward|output_(attentions|hidden_states|scores)",
            r"output_router_logits|return_dict(_in_generate)?|is_decoder|remove_invalid_values|use_return_dict",
            # training
            r".*dropout.*|.*pdrop|.*layerdrop|.*drop_rate|label_smoothing.*|.*_loss_(coef|weight|type)|loss_type",
            r"(.*_)?init(ializer)?_(range|std|factor|method|gain|device|scale)|neftune_.*|mup_denominator|z_loss.*",
            r"ep_size|router_aux_loss_coef|training_.*|ignore_index",
            # tokens and text
            r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token(_ids?)?|tokenizer_(class|type|name)",
            r"tokenizer_padding_side|padding_side|prefix|padding_idx|model_max_length|max_sequence_length|seq_?length",
            r"max_seq_len(gth|_len)?|sequence_length|max_length|chat_template|use_default_system_prompt",
            # sampling, which generation_config.json says today
            r"do_sample|temperature|top_[kp]|typical_p|min_p|min_length|max_new_tokens|num_beams|num_beam_groups",
            r"early_stopping|.*_penalty|.*no_repeat_ngram_size|bad_words_ids|num_return_sequences|.*suppress_tokens",
            r"tie_encoder_decoder|cross_attention_hidden_size",
            # the context before scaling, where no scaling is read that uses it
            r"(rope_(scaling|parameters)\.)?original_max_position_embeddings|(rope_(scaling|parameters)\.)?finetuned",
        )
    )
)

# Keys of a GGUF file, without the architecture's name, that change nothing.
_HARMLESS_GGUF = re.compile(
    r"vocab_size|tensor_data_layout|pooling_type|rope\.scaling\.(finetuned|original_context_length)|.*dropout.*"
)

# A switch that is off does nothing, unless off is the unusual position.
_UNUSUAL_WHEN_OFF = re.compile(
    r"(is_|use_)?causal.*|(use_|apply_)?(rope|rotary(_.*)?|positions?|position_embeddings?|pos_emb.*)|scale_.*|gated.*"
    r"|.*affine|(use_)?gat(e|ing)|(.*_)?(bias|residual)|do_layer_norm_before|(.*_)?pre_?norm|normalize_before|norm_.*"
)

Neutral = Callable[[Any, ModelConfig], bool]


def _one_of(*neutral: Any) -> Neutral:
    return lambda value, _: any(type(value) is type(n) and value == n for n in neutral)


def _close(value: Any, expected: float) -> bool:
    found = finite(value)
    return found is not None and math.isclose(found, expected, rel_tol=1e-4)


def _off(value: Any, _: ModelConfig) -> bool:
    return value is False or (type(value) in (int, float) and value == 0)


def _scale_of_one(value: Any, _: ModelConfig) -> bool:
    return _close(value, 1.0)


def _off_or_one(value: Any, config: ModelConfig) -> bool:
    """GGUF writes 0 for a scale that is not used."""
    return _off(value, config) or _close(value, 1.0)


def _attention_scale(value: Any, config: ModelConfig) -> bool:
    """What scores are multiplied by, as everyone has it; or 0, for a file that leaves it to the program."""
    return _off(value, config) or _close(value, config.head_dim**-0.5)


# Settings that change a model, and the values at which they do not.
_NEUTRAL: Mapping[str, Neutral] = {
    # scores and logits
    "attention_multiplier": _attention_scale,
    "attention_scale": _attention_scale,
    "attention.scale": _attention_scale,
    "query_pre_attn_scalar": lambda value, config: _close(value, config.head_dim),
    "scale_attn_weights": _one_of(True),
    "scale_attention_softmax_in_fp32": _one_of(True, False),
    "scale_attn_by_inverse_layer_idx": _one_of(False),
    "attn_logit_softcapping": _off,
    "final_logit_softcapping": _off,
    "logit_scale": _off_or_one,
    "logits_scaling": _scale_of_one,
    "logits_scale": _scale_of_one,
    "lm_head_multiplier": _scale_of_one,
    "embedding_multiplier": _scale_of_one,
    "embedding_scale": _off_or_one,
    "residual_multiplier": _scale_of_one,
    "residual_scale": _off_or_one,
    "scale_emb": _scale_of_one,
    "mup_width_scale": _scale_of_one,
    "clip_qkv": _off,
    "attention.clamp_kqv": _off,
    "attention.max_alibi_bias": _off,
    # who sees whom
    "causal": _one_of(True),
    "is_causal": _one_of(True),
    "use_causal_mask": _one_of(True),
    "attention.causal": _one_of(True),
    "is_encoder_decoder": _one_of(False),
    "add_cross_attention": _one_of(False),
    # positions
    "position_embedding_type": lambda value, config: (
        value in ("rope", "rotary") if config.rope else value in ("absolute", "learned")
    ),
    "rope_interleaved": _one_of(False),
    "rope_interleave": _one_of(False),
    "use_rope": _one_of(True),
    "rotary": _one_of(True),
    "rotary_dim": lambda value, config: _close(value, config.head_dim),
    "rotary_pct": _scale_of_one,
    "rotary_percent": _scale_of_one,
    "no_rope_layer_interval": _off,
    "no_rope_layers": lambda value, config: isinstance(value, list) and all(item == 1 for item in value),
    **{
        f"{rope}.{name}": _scale_of_one
        for rope in ("rope_scaling", "rope_parameters")
        for name in ("factor", "attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim")
    },
    "rope.scaling.yarn_ext_factor": _off_or_one,
    "rope.scaling.yarn_log_multiplier": _off,
    "rope.scaling.attn_factor": _scale_of_one,
    "rope.scaling.yarn_attn_factor": _scale_of_one,
    # layers
    "head_dim": lambda value, config: _close(value, config.head_dim),
    "v_head_dim": lambda value, config: _close(value, config.head_dim),
    "kv_channels": lambda value, config: _close(value, config.head_dim),
    "num_key_value_heads": lambda value, config: _close(value, config.kv_head_count),
    "attention_bias": lambda value, config: value is (config.qkv_bias and config.output_bias),
    "qkv_bias": lambda value, config: value is config.qkv_bias,
    "mlp_bias": lambda value, config: value is config.ffn_bias,
    "use_bias": lambda value, config: value is (config.qkv_bias and config.ffn_bias),
    "bias": lambda value, config: value is (config.qkv_bias and config.ffn_bias),
    "no_bias": lambda value, config: value is not config.ffn_bias,
    "use_qk_norm": lambda value, config: value is config.qk_norm,
    "qk_norm": lambda value, config: value is config.qk_norm,
    "qk_layernorm": lambda value, config: value is config.qk_norm,
    "use_parallel_residual": lambda value, config: value is config.parallel,
    "parallel_attn": lambda value, config: value is config.parallel,
    "apply_residual_connection_post_layernorm": _one_of(False),
    "attention.layer_norm_epsilon": lambda value, config: _close(value, config.norm_eps),
    "layer_norm_eps": lambda value, config: _close(value, config.norm_eps),
    "rms_norm_eps": lambda value, config: _close(value, config.norm_eps),
    "hidden_act_param": _off,
    "sparsity_gated_mlp": lambda value, config: value is config.gated,  # of Sakana's SparseLM
    "tie_word_embeddings": lambda value, config: value is config.tied_embeddings,
}


def refuse_unread(unread: Iterable[tuple[str, Any]], config: ModelConfig, harmless: Iterable[str], gguf: bool) -> None:
    """Raise ValueError with the names of settings that were not read and are not known to be harmless.

    `harmless`: names that have no effect in this family.
    """
    known = _HARMLESS_GGUF if gguf else _HARMLESS_HF
    names = frozenset(harmless)
    found = [
        (name, value)
        for name, value in unread
        if not {name, bare := name.removeprefix(_TEXT_PART)} & names
        and not known.fullmatch(bare)
        and not _without_effect(bare, value, config)
    ]
    if found:
        listed = ", ".join(f"{quoted(name)} ({shown(value, 40)})" for name, value in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"settings that a {config.family} model here does not use, and that may change what it computes: {listed}"
            f"{more}; if they have no effect, take them out of the {'file' if gguf else 'config.json'}"
        )


def _without_effect(name: str, value: Any, config: ModelConfig) -> bool:
    if value is None or value == "" or value == [] or value == {}:
        return True
    if name in _NEUTRAL:
        return _NEUTRAL[name](value, config)
    if value is False:
        return not _UNUSUAL_WHEN_OFF.fullmatch(name)
    return type(value) is int and value == 0 and name.startswith(("num_", "n_", "expert_", "nextn_", "leading_"))


# Tensors that change nothing, with the reason.
_HARMLESS_TENSORS = re.compile(
    "|".join(
        (
            r"(.*\.)?rotary_emb\.(inv_freq|(cos|sin)_cached)",  # follow from the rope settings
            r"(.*\.)?(attn|attention|self_attn|self_attention)\.(masked_)?bias",  # the causal mask
            r"(.*\.)?(position_ids|decoder\.version|_float_tensor)",  # bookkeeping of older programs
            r"blk\.\d+\.attn_rot_embd\.weight",  # follow from the rope settings
            r"rope_freqs\.weight",  # read with the settings
            r"blk\.\d+\..*\.input_scale|output\.input_scale",  # for activations of 4 bits, which we do not have
            r"blk\.\d+\.fc[12]\.weight",  # PowerInfer's predictor, which calibration reads
            r"(model\.)?(vision_tower|multi_modal_projector)\..*",  # for images, which are not read
        )
    )
)


def refuse_unread_tensors(unread: Iterable[str]) -> None:
    """Raise ValueError with the names of tensors that no part of the model is made of, unless they are harmless."""
    found = sorted(name for name in unread if not _HARMLESS_TENSORS.fullmatch(name))
    if found:
        listed = ", ".join(quoted(name) for name in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"the checkpoint holds tensors that a model of these settings does not use: {listed}{more};"
            " a part of it would be left out, so it is not converted"
        )
