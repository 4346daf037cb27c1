"""The transformer in PyTorch, from the ModelConfig and the canonical tensors that the executors use: to train with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from svdengine.converters.checkpoint import Checkpoint
from svdengine.converters.conversion import build_tensor, find_sources
from svdengine.errors import SvdEngineError
from svdengine.kernels.rope import rope_tables
from svdengine.models.config import ModelConfig
from svdengine.models.family import split_suffix

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


# What sees an FFN at work: its number, and its gates before and after the activation (..., f).
Observer = Callable[[int, Tensor, Tensor], None]


class Product(nn.Linear):
    """A linear layer. Where mixed precision is on, a frozen weight is cast once and not for each product: with few rows
    casting the output projection takes longer than multiplying by it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) to (..., rows)."""
        device = x.device.type
        if self.weight.requires_grad or not torch.is_autocast_enabled(device):
            return super().forward(x)
        return functional.linear(x, _cast(self.weight, torch.get_autocast_dtype(device)), self.bias)


def _cast(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype, kept on it until it changes."""
    kept: tuple[tuple[Any, ...], Tensor] | None = getattr(weight, "kept_cast", None)
    key = (weight._version, weight.data_ptr(), dtype)
    if kept is None or kept[0] != key:
        kept = key, weight.detach().to(dtype)
        weight.kept_cast = kept
    return kept[1]


class FatRelu(torch.autograd.Function):
    """x if x > threshold else 0. On a CPU `torch.where` takes six times as long in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        """x (..., f), threshold (f,), of one dtype."""
        kept = torch.gt(x, threshold, out=torch.empty_like(x))  # 1 or 0
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """To the gates that are kept; thresholds are not trained."""
        (kept,) = ctx.saved_tensors
        return gradient * kept, None


class Ffn(nn.Module):
    """A gated FFN. `threshold` None is SiLU; t (f,) is FATReLU with a threshold for each neuron: x if x > t else 0."""

    threshold: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.ffn_size, config.ffn_bias
        self.gate, self.up = Product(d, f, bias), Product(d, f, bias)
        self.down = Product(f, d, bias)
        self.register_buffer("threshold", None)
        self.observer: Callable[[Tensor, Tensor], None] | None = None  # see `observed`

    def forward(self, x: Tensor) -> Tensor:
        """What the FFN adds to the residual stream, for what comes out of the norm before it (..., d)."""
        gate, up = self.gate(x), self.up(x)
        t = self.threshold
        active = functional.silu(gate) if t is None else FatRelu.apply(gate, t.to(gate.dtype))
        if self.observer is not None:
            self.observer(gate, active)
        return self.down(active * up)


@contextmanager
def observed(ffns: Iterable[Ffn], observer: Observer) -> Iterator[None]:
    """While it lasts, `observer` sees every forward pass of the FFNs."""
    for index, ffn in enumerate(watched := list(ffns)):
        ffn.observer = partial(observer, index)
    try:
        yield
    finally:
        for ffn in watched:
            ffn.observer = None


@contextmanager
def counted_zeros(ffns: Iterable[Ffn]) -> Iterator[list[Tensor]]:
    """While it lasts, every forward pass of an FFN adds the share of its gates that are zero, a scalar, to the list."""
    found: list[Tensor] = []
    with observed(ffns, lambda _index, _gate, active: found.append(zero_share(active))):
        yield found


def zero_share(active: Tensor) -> Tensor:
    """Share of gates that are zero after ReLU or FATReLU, a scalar."""
    # By sign: on a CPU a comparison of bfloat16 takes six times as long.
    return 1 - active.detach().sign().mean(dtype=torch.float32)


class KvCache:
    """Keys and values of the tokens so far of one layer, in a buffer for all tokens to come."""

    def __init__(self, rows: int, length: int, config: ModelConfig, like: Tensor) -> None:
        shape = (2, rows, config.kv_head_count, length, config.head_dim)
        self._both = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (rows, kv_heads, n, head_dim); all of them so far."""
        end = self.length + k.shape[2]
        self._both[0, :, :, self.length : end], self._both[1, :, :, self.length : end] = k, v
        self.length = end
        return self._both[0, :, :, :end], self._both[1, :, :, :end]


class Attention(nn.Module):
    """Grouped-query attention with rope; `window` 0 sees all that is before."""

    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        d, heads, kv = config.hidden_size, config.head_count, config.kv_head_count
        self.head_dim, self.window = config.head_dim, window
        self.q = Product(d, heads * config.head_dim, config.qkv_bias)
        self.k, self.v = (Product(d, kv * config.head_dim, config.qkv_bias) for _ in range(2))
        self.o = Product(heads * config.head_dim, d, config.output_bias)
        norms = config.qk_norm
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if norms else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache | None = None) -> Tensor:
        """What attention adds to the residual stream, for what comes out of the norm before it (rows, n, d)."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = _rotate(self.q_norm(q), cos, sin).to(v.dtype), _rotate(self.k_norm(k), cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        n, total = q.shape[2], k.shape[2]
        if self.window and total > self.window:
            mask = _window_mask(n, total, self.window, q.device)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        elif n == 1:
            # Query heads that share keys as if they were tokens: `enable_gqa` copies the keys for each of them.
            shared = q.reshape(len(q), k.shape[1], -1, self.head_dim)
            out = functional.scaled_dot_product_attention(shared, k, v).reshape(q.shape)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _window_mask(n: int, total: int, window: int, device: torch.device) -> Tensor:
    """Which of `total` positions the last n of them see, (n, total) bool."""
    distance = torch.arange(total - n, total, device=device)[:, None] - torch.arange(total, device=device)
    return (distance >= 0) & (distance < window)


class Layer(nn.Module):
    """Attention, then the FFN, each after its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, config.sliding_window if index in config.sliding_window_layers else 0)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = Ffn(config)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache | None = None) -> Tensor:
        """The residual stream between attention and FFN."""
        return x + self.attention(self.attention_norm(x), cos, sin, cache)

    def feed(self, x: Tensor) -> Tensor:
        """The residual stream after the FFN."""
        return x + self.ffn(self.ffn_norm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache | None = None) -> Tensor:
        """The residual stream after the layer."""
        return self.feed(self.attend(x, cos, sin, cache))


class Decoder(nn.Module):
    """The model. Token ids (rows, n) to the hidden states (rows, n, d) that `head` makes logits of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layer_count))
        self.output_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Product(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    def rope(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions first..end, (end - first, head_dim / 2) each."""
        device = self.embedding.weight.device
        if self._rope is None or len(self._rope[0]) < end or self._rope[0].device != device:
            cos, sin = rope_tables(self.config, np.arange(max(end, 1024)))
            self._rope = torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)
        return self._rope[0][first:end], self._rope[1][first:end]

    def forward(self, tokens: Tensor, caches: list[KvCache] | None = None) -> Tensor:
        """Hidden states of tokens that stand at the beginning, or after those that the caches hold."""
        start = caches[0].length if caches else 0
        cos, sin = self.rope(start, start + tokens.shape[1])
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[index] if caches else None)
        return self.output_norm(x)

    def ffns(self) -> Iterator[Ffn]:
        """The FFN of each layer."""
        for layer in self.layers:
            yield layer.ffn


def read_decoder(checkpoint: Checkpoint) -> Decoder:
    """The model of a checkpoint in float32. Raises SvdEngineError for one that is no gated SiLU model we can train."""
    return _read(checkpoint, ("silu",))


def read_student(checkpoint: Checkpoint, teacher: Decoder, train: str, rounded_embedding: bool = False) -> Decoder:
    """A student that was written by an earlier run. Raises SvdEngineError when it is not one of this teacher.

    train: as `make_student` takes it; an earlier run that trained more would lose that, and is refused.
    rounded_embedding: the earlier run may have rounded the embedding; the student gets the teacher's.
    """
    config = checkpoint.config
    found = _read(checkpoint, ("relu", "fatrelu"))
    student = make_student(teacher, train)
    theirs = dict(found.named_parameters())
    ours = dict(student.named_parameters())
    for name, p in ours.items():
        if name not in theirs or theirs[name].shape != p.shape:
            raise SvdEngineError(f"{checkpoint.path}: is not the source made sparse: {name} differs in shape")
        if p.requires_grad:
            p.data.copy_(theirs[name])
        elif rounded_embedding and name in ("embedding.weight", "head.weight"):
            continue
        elif not torch.equal(p.half(), theirs[name].to(p.device).half()):
            raise SvdEngineError(
                f"{checkpoint.path}: {name} is not that of the source; give the same source and --train as then"
            )
    for ffn in student.ffns():
        assert ffn.threshold is not None
        ffn.threshold.fill_(config.activation_threshold)
    return student


def _read(checkpoint: Checkpoint, activations: tuple[str, ...]) -> Decoder:
    config = checkpoint.config
    if config.family not in FAMILIES or config.activation not in activations or not config.gated:
        raise SvdEngineError(
            f"{checkpoint.path}: found a {config.family} model with {config.activation},"
            f" expected one of {', '.join(FAMILIES)} with {' or '.join(activations)}"
        )
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    if config.tied_embeddings:
        model.head.weight = model.embedding.weight
    with torch.no_grad():
        for spec, layer, origin in find_sources(checkpoint):
            target = parameter(model, spec.name.removesuffix("_T"), layer if spec.stacked else None)
            found = torch.from_numpy(np.ascontiguousarray(build_tensor(checkpoint, origin)))
            target.copy_(found.T if spec.name.endswith("_T") else found)
    return model.requires_grad_(False).eval()


def parameter(model: Decoder, tensor: str, layer: int | None) -> nn.Parameter:
    """The parameter that holds a canonical tensor, or a layer of it."""
    stem, suffix = split_suffix(tensor)
    if layer is None:
        holder = {"embedding": model.embedding, "output_norm": model.output_norm, "lm_head": model.head}[stem]
    else:
        parts = model.layers[layer]
        owner = parts.ffn if stem in ("gate", "up", "down") else parts
        owner = parts.attention if stem in ("q", "k", "v", "o", "q_norm", "k_norm") else owner
        holder = getattr(owner, stem)
    found: nn.Parameter = getattr(holder, suffix.removeprefix("."))
    return found


def make_student(teacher: Decoder, train: str) -> Decoder:
    """A copy of the teacher with ReLU in its FFNs. What is not trained is shared with the teacher.

    train: ffn (the FFNs and the norms before them), layers (attention and its norms too), all (everything).
    """
    own = {id(p) for name, p in teacher.named_parameters() if train == "all" or _is_trained(name, train)}
    shared = {id(p): p for p in teacher.parameters() if id(p) not in own}
    student: Decoder = copy.deepcopy(teacher, shared)
    for p in student.parameters():
        if id(p) not in shared:
            p.requires_grad_(True)
    for ffn in student.ffns():
        ffn.threshold = torch.zeros(teacher.config.ffn_size, device=teacher.embedding.weight.device)
    return student


def _is_trained(name: str, train: str) -> bool:
    parts = name.split(".")
    return parts[0] == "layers" and (train == "layers" or parts[2] in ("ffn", "ffn_norm"))
