"""Small mixtures of experts of every kind, for the tests of executors that run them."""

from __future__ import annotations

from dataclasses import replace

from model_zoo import zoo

from svdengine.models.config import ModelConfig, Rope


def expert_zoo() -> dict[str, ModelConfig]:
    """Small configs by name. Sizes are odd on purpose, as those of `zoo`."""
    base = replace(zoo()["llama"], ffn_size=70)
    mixtral = replace(base, family="mixtral", expert_count=5, active_experts=2)
    early = {"early_router": True, "activation": "relu"}
    windows = {"sliding_window": 7, "sliding_window_layers": (1, 2), "unrotated_layers": (0,)}
    qwen = replace(base, family="qwen3_moe", qk_norm=True, head_dim=16)
    return {
        "mixtral": mixtral,
        "mixtral_drelu": replace(mixtral, activation="drelu", rope=Rope(1e6)),
        "smallthinker": replace(
            base, family="smallthinker", layer_count=3, expert_count=7, active_experts=3, router="sigmoid",
            tied_embeddings=True, **early, **windows,
        ),
        "smallthinker_softmax": replace(base, family="smallthinker", expert_count=33, active_experts=4, **early),
        "qwen3_moe": replace(qwen, expert_count=18, active_experts=4, router="softmax"),
        "qwen3_moe_dense": replace(
            qwen, layer_count=4, expert_count=6, active_experts=2, dense_layers=(0, 2), dense_blocks=3
        ),
        "relu_dense": replace(
            mixtral, activation="fatrelu", activation_threshold=0.1, layer_count=3, dense_layers=(1,), dense_blocks=2,
            expert_scale=1.7, residual_scale=0.6, router="softmax",
        ),
        "olmoe": replace(
            base, family="olmoe", expert_count=7, active_experts=3, router="softmax", qk_norm=True, qk_norm_joint=True
        ),
        "one_expert": replace(mixtral, expert_count=1, active_experts=1, activation="relu"),
        "all_experts": replace(mixtral, expert_count=3, active_experts=3),
    }  # fmt: skip
