"""ModelConfig: one frozen description of every supported architecture, by data and not by code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Norm = Literal["rms", "layer"]
Activation = Literal["relu", "fatrelu", "drelu", "relu2", "silu", "gelu", "gelu_tanh"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]
Router = Literal["softmax", "topk_softmax", "sigmoid"]

RELU_FAMILY: frozenset[str] = frozenset({"relu", "fatrelu", "drelu", "relu2"})


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, in the half-split layout of Hugging Face (dimension i pairs with i + head_dim / 2).

    theta: base of the frequencies.
    scaling: how it was stretched beyond the context of pre-training: none, linear, llama3 or yarn.
    factor: how many times longer than the original context.
    original_max_position: context of pre-training, in tokens (llama3, yarn).
    low_freq_factor, high_freq_factor: turns within that context between which frequencies are blended (llama3).
    beta_fast, beta_slow: the same, the greater first (yarn).
    attention_factor: what cos and sin are multiplied by (yarn).
    truncate: whether the correction range is rounded outwards to whole dimensions (yarn).
    rotated: dimensions of a head that turn; 0: all. They are the first half of the pairs: models/naming.py has moved
        them there, since checkpoints have them in one piece.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    rotated: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """What every executor needs to know of a model. Sizes are in elements, as the checkpoint has them (unpadded).

    family: llama, mistral, bamboo, qwen2, qwen3, minicpm, opt, falcon, arcee, nemotron, jais2, gemma3, bitnet, mixtral,
        qwen2_moe, qwen3_moe, olmoe or smallthinker.
    vocab_size: tokens that have logits.
    hidden_size: d, the width of the residual stream.
    layer_count: decoder layers.
    head_count: query heads of a layer.
    kv_head_count: key and value heads of a layer, of which head_count is a multiple.
    head_dim: size of a head.
    ffn_size: f, the neurons of a layer's FFN, or of an expert.
    max_position: tokens of context that the model was made for.
    norm: RMSNorm (rms) or LayerNorm (layer).
    norm_eps: what is added to the mean square (rms) or the variance (layer).
    activation: act, of the FFN.
    gated: the FFN computes act(gate x) * (up x), else act(up x).
    rope: rotary position embedding; None: there is none.
    activation_threshold: of fatrelu: x if x > threshold else 0.
    learned_positions: a table of max_position rows is added to the embedding.
    qkv_bias: q, k and v have biases.
    output_bias: the attention's output projection has a bias.
    ffn_bias: up (and gate) and down have biases.
    qk_norm: RMSNorm over head_dim on q and k, before rope.
    qk_norm_joint: that norm is over all heads together.
    sliding_window: a token sees itself and the window - 1 before it; 0: everything before it.
    sliding_window_layers: numbers of the layers that have the window.
    local_rope: the rotary embedding of those layers, where it is another than `rope`.
    unrotated_layers: numbers of the layers without rotary embedding.
    score_scale: multiplies the scores of attention, beside head_dim ** -0.5.
    parallel: attention and FFN read the same residual stream and are added together.
    shared_norm: parallel, and both read the output of attention_norm.
    post_norms: what attention and FFN give has a norm of its own before it is added to the residual stream.
    sub_norms: RMSNorm over what the attention's output projection reads, and over what down reads.
    embedding_scale: multiplies the embedding.
    residual_scale: multiplies what attention and FFN add to the residual stream.
    logit_scale: multiplies the logits.
    tied_embeddings: the embedding is the output projection too.
    expert_count: experts of a layer, FFNs of which a router chooses some for each token; 0: a layer has one FFN.
    active_experts: how many are chosen: those with the largest products of the router, of equal ones the first.
    router: what an expert's output is multiplied by, made of the router's products: its softmax over all experts, its
        softmax over those that are chosen, or its sigmoid as a share of the sum over those that are chosen.
    early_router: the router reads what enters the layer, before attention and norm, and not what the FFN reads.
    expert_scale: multiplies what the experts add.
    dense_layers: numbers of the layers without experts, in a model that has some.
    dense_blocks: how many times ffn_size the FFN of such a layer has.
    shared_blocks: how many times ffn_size the FFN has that each token gets besides its experts; 0: there is none.
    shared_gate: what it adds is multiplied by the sigmoid of one more row of the router, not by 1.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    ffn_size: int
    max_position: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated: bool
    rope: Rope | None
    activation_threshold: float = 0.0
    learned_positions: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    sliding_window_layers: tuple[int, ...] = ()
    local_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    score_scale: float = 1.0
    parallel: bool = False
    shared_norm: bool = False
    post_norms: bool = False
    sub_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tied_embeddings: bool = False
    expert_count: int = 0
    active_experts: int = 0
    router: Router = "topk_softmax"
    early_router: bool = False
    expert_scale: float = 1.0
    dense_layers: tuple[int, ...] = ()
    dense_blocks: int = 0
    qk_norm_joint: bool = False
    shared_blocks: int = 0
    shared_gate: bool = False

    @property
    def sparse_ffn(self) -> bool:
        """Whether FFN neurons can be exactly zero, so that down is stored neuron-major and rows can be skipped."""
        return self.activation in RELU_FAMILY

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return float(self.score_scale * self.head_dim**-0.5)

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer; None: there is none."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope is not None and layer in self.sliding_window_layers else self.rope

    @property
    def ffn_blocks(self) -> int:
        """FFNs of ffn_size neurons in the whole model: one a layer, each expert, or each part of a wider FFN."""
        return self.blocks_of(self.layer_count - 1).stop

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a router and experts."""
        return tuple(i for i in range(self.layer_count) if i not in self.dense_layers) if self.expert_count else ()

    @property
    def token_neurons(self) -> int:
        """FFN neurons that a token has in all layers: those of the experts that are chosen, not of the others."""
        blocks = len(self.expert_layers) * self.chosen_blocks + len(self.dense_layers) * self.dense_blocks
        return self.ffn_size * (blocks if self.expert_count else self.layer_count)

    @property
    def chosen_blocks(self) -> int:
        """FFN blocks that a token has of a layer with experts: those that are chosen, and those that all have."""
        return self.active_experts + self.shared_blocks

    @property
    def router_rows(self) -> int:
        """Products of a router: one for each expert, and where the shared FFN has a gate one for that."""
        return self.expert_count + self.shared_gate

    def blocks_of(self, layer: int) -> range:
        """The numbers of a layer's FFN blocks, which are counted through all layers; see `ffn_blocks`."""
        if not self.expert_count:
            return range(layer, layer + 1)
        wide = sum(i < layer for i in self.dense_layers)
        routed = self.expert_count + self.shared_blocks
        first = (layer - wide) * routed + wide * self.dense_blocks
        return range(first, first + (self.dense_blocks if layer in self.dense_layers else routed))

    def validate(self) -> None:
        """Raise ValueError with what was found and expected when a field is out of range."""
        for field in ("vocab_size", "hidden_size", "layer_count", "head_count", "kv_head_count", "ffn_size"):
            _check_range(field, getattr(self, field), 1, 1 << 24)
        _check_range("head_dim", self.head_dim, 2, 1024)
        _check_range("layer_count", self.layer_count, 1, 4096)
        _check_range("head_count", self.head_count, 1, 4096)
        _check_range("max_position", self.max_position, 1, 1 << 26)
        if self.head_count % self.kv_head_count:
            raise ValueError(f"head_count {self.head_count} is not a multiple of kv_head_count {self.kv_head_count}")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, found {self.head_dim}")
        if self.shared_norm and not self.parallel:
            raise ValueError("shared_norm needs parallel attention and FFN")
        _check_range("sliding_window", self.sliding_window, 0, (1 << 31) - 1)
        if any(not 0 <= i < self.layer_count for i in self.sliding_window_layers):
            raise ValueError("the layers of the sliding window must exist")
        if any(not 0 <= i < self.layer_count for i in self.unrotated_layers):
            raise ValueError("the layers without rotary embedding must exist")
        if self.qk_norm_joint and not self.qk_norm:
            raise ValueError("qk_norm_joint needs qk_norm")
        _check_experts(self)
        for field, allowed in (("norm", Norm), ("activation", Activation)):
            _check_choice(field, getattr(self, field), allowed)
        if not 0.0 < self.norm_eps < 1.0:
            raise ValueError(f"norm_eps must lie between 0 and 1, found {self.norm_eps}")
        if self.post_norms and (self.parallel or self.norm != "rms"):
            raise ValueError("post_norms needs RMSNorm, and FFNs after the attention")
        if self.sub_norms and (self.parallel or self.post_norms or self.ffn_bias or self.norm != "rms"):
            raise ValueError("sub_norms needs RMSNorm, FFNs without biases after the attention, and no post_norms")
        if not 0.0 < self.score_scale < 1e6:
            raise ValueError(f"score_scale must be above 0, found {self.score_scale}")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                _check_rope(rope, self.head_dim)
        if self.local_rope is not None and (self.rope is None or self.rope.rotated != self.local_rope.rotated):
            raise ValueError("local_rope needs a rope that turns as many dimensions")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back.

        Fields that version 0.1.0 did not have are left out where they say nothing, so that a model stays what it was:
        predictors and KV files know theirs by a hash of this.
        """
        fields = _said(asdict(self))
        for rope in ("rope", "local_rope"):
            if fields.get(rope) is not None:
                fields[rope] = _said(fields[rope])
        return fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`. Raises ValueError on an unknown, missing or ill-typed field, or one out of range."""
        try:
            fields = dict(data)
            for name in ("rope", "local_rope"):
                rope = fields.pop(name, None)
                fields[name] = Rope(**rope) if rope is not None else None
            for name in _LAYERS:
                fields[name] = tuple(fields.get(name, ()))
            config = cls(**fields)
            _check_types(config)
        except TypeError as error:
            raise ValueError(f"model config: {error}") from error
        config.validate()
        return config


# Fields that were added after version 0.1.0, of ModelConfig and of Rope, and what says nothing.
_LATER = {
    **{"local_rope": None, "score_scale": 1.0, "post_norms": False, "sub_norms": False, "rotated": 0},
    **{"unrotated_layers": (), "expert_count": 0, "active_experts": 0, "router": "topk_softmax", "early_router": False},
    **{"expert_scale": 1.0, "dense_layers": (), "dense_blocks": 0, "qk_norm_joint": False},
    **{"shared_blocks": 0, "shared_gate": False},
}
_LAYERS = ("sliding_window_layers", "unrotated_layers", "dense_layers")  # fields that are numbers of layers
_MOST_EXPERTS = 1024


def _said(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those of _LATER that say nothing."""
    return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} must lie in {low}..{high}, found {value}")


def _check_choice(field: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{field} must be one of {', '.join(get_args(allowed))}, found {value!r}")


def _check_experts(config: ModelConfig) -> None:
    """Experts must be fewer than memory for their addresses, and FFNs of the kind that executors add up."""
    _check_choice("router", config.router, Router)
    if not config.expert_count:
        if config.active_experts or config.early_router or config.dense_layers or config.dense_blocks:
            raise ValueError("active_experts, early_router and dense_layers need experts (expert_count)")
        if config.shared_blocks or config.shared_gate:
            raise ValueError("shared_blocks and shared_gate need experts (expert_count)")
        return
    _check_range("expert_count", config.expert_count, 1, _MOST_EXPERTS)
    _check_range("active_experts", config.active_experts, 1, config.expert_count)
    if not 0 < config.expert_scale < 1e6:
        raise ValueError(f"expert_scale must be above 0, found {config.expert_scale}")
    layers = config.dense_layers
    if len(set(layers)) != len(layers) or any(not 0 <= i < config.layer_count for i in layers):
        raise ValueError("the layers without experts must exist, each once")
    if len(layers) == config.layer_count:
        raise ValueError("a model with experts needs a layer that has some")
    _check_range("dense_blocks", config.dense_blocks, min(1, len(layers)), _MOST_EXPERTS if layers else 0)
    _check_range("shared_blocks", config.shared_blocks, int(config.shared_gate), _MOST_EXPERTS)
    if config.parallel or config.post_norms or config.sub_norms or config.ffn_bias:
        raise ValueError("experts need FFNs without biases after the attention, and no post_norms or sub_norms")


def _check_rope(rope: Rope, head_dim: int) -> None:
    """What the frequencies (kernels/rope.py) are divided by must not be zero."""
    _check_choice("rope.scaling", rope.scaling, RopeScaling)
    if not (1 < rope.theta < 1e30 and 0 < rope.factor < 1e30):
        raise ValueError(f"rope theta must be above 1 and factor above 0, found {rope.theta} and {rope.factor}")
    if rope.scaling in ("llama3", "yarn"):
        _check_range("rope.original_max_position", rope.original_max_position, 1, 1 << 26)
    if rope.scaling == "llama3" and not 0 <= rope.low_freq_factor < rope.high_freq_factor < 1e30:
        raise ValueError("rope high_freq_factor must be above low_freq_factor")
    if rope.scaling == "yarn" and not 0 < rope.beta_slow <= rope.beta_fast < 1e30:
        raise ValueError("rope beta_fast must not be below beta_slow, nor beta_slow 0")
    if rope.rotated % 2 or not 0 <= rope.rotated <= head_dim:
        raise ValueError(f"rope.rotated must be even and at most {head_dim}, found {rope.rotated}")


_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}


def _check_types(part: ModelConfig | Rope) -> None:
    """The annotations are strings; the simple ones are enforced, since JSON may hold anything."""
    for name, annotation in type(part).__annotations__.items():
        value = getattr(part, name)
        wanted = _TYPES.get(annotation, str if annotation in ("Norm", "Activation", "RopeScaling", "Router") else None)
        if wanted is not None and (not isinstance(value, wanted) or (annotation == "int" and isinstance(value, bool))):
            raise TypeError(f"{name} must be {annotation}, found {value!r}")
        if isinstance(value, Rope):
            _check_types(value)
    for name in _LAYERS if isinstance(part, ModelConfig) else ():
        if any(type(i) is not int for i in getattr(part, name)):
            raise TypeError(f"{name} must be whole numbers")
