"""Tiny tokenizers and model files for tests of the engine, and an executor whose logits depend on its cache alone."""

import hashlib
import io
import json
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from model_zoo import random_weights, zoo

from svdengine.files.model_writer import ModelWriter, StoredTokenizer
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.executor import FfnPath, LayerCounts, Logits, NeuronCounts
from svdengine.kernels.formats import WeightFormat
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs
from svdengine.text.tokenizer import Tokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CORPUS = [
    "hello world, once upon a time there was a user and a system",
    "what is 2 + 2? the assistant says: 4. äöü €",
] * 20

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_level_json() -> bytes:
    """A byte-level BPE, like GPT-2's, with ChatML control tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str().encode()


@cache
def llama_json(prepend: str = "always") -> bytes:
    """A BPE with byte fallback and the ▁ for a space, like Llama 2's tokenizer.json."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehlnorstuw.,?"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("▁he", "ll"), ("o", "r")]
    texts += [a + b for a, b in merges]
    model = tokenizers.models.BPE({t: i for i, t in enumerate(texts)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str().encode()


@cache
def sentencepiece_model() -> bytes:
    """A small tokenizer.model with byte fallback."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=target,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return target.getvalue()


def make_tokenizer(kind: str, add_bos: bool = False) -> Tokenizer:
    """Tokenizers by name: byte_level, llama, llama_first, sentencepiece."""
    if kind == "byte_level":
        return Tokenizer(TokenizerInfo("tokenizer.json", 0, 3, None, (3,), add_bos), byte_level_json())
    if kind == "sentencepiece":
        info = TokenizerInfo("tokenizer.model", 1, 2, None, (2,), add_bos, False, {"<s>": 1, "</s>": 2})
        return Tokenizer(info, sentencepiece_model())
    data = llama_json("first" if kind == "llama_first" else "always")
    return Tokenizer(TokenizerInfo("tokenizer.json", 1, 2, None, (2,), add_bos), data)


def tiny_config(**changes: Any) -> ModelConfig:
    """A config whose vocabulary is that of the byte-level tokenizer, padded."""
    size = len(json.loads(byte_level_json())["model"]["vocab"])
    return replace(zoo()["llama_relu_tied"], **{"vocab_size": size + 6, "max_position": 512, **changes})


def write_tiny_model(
    path: Path,
    template: str | None = CHATML,
    add_bos: bool = False,
    weight_format: WeightFormat = "f32",
    **changes: Any,
) -> Path:
    """A model file with random weights and the byte-level tokenizer."""
    config = tiny_config(**changes)
    weights = random_weights(config)
    info = TokenizerInfo("tokenizer.json", 0, 3, None, (3,), add_bos, False, {t: i for i, t in enumerate(SPECIALS)})
    stored = StoredTokenizer(info, byte_level_json(), template)
    with ModelWriter(path, config, weight_format, stored, {"temperature": 0.7, "top_k": 50}, {}) as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
    return path


class FakeExecutor:
    """Keeps the tokens themselves where keys and values would be; logits are a pure function of what a row sees.

    A sparsity bias is added to the tokens, times 1000, so that what was computed with another one shows too.
    """

    name = "fake"

    def __init__(
        self, block_count: int, max_batch_rows: int, vocab_size: int = 50, block_size: int = BLOCK_SIZE
    ) -> None:
        self.block_count, self.block_size = block_count, block_size
        self.max_batch_rows = max_batch_rows
        self.vocab_size = vocab_size
        self.cache = np.full(block_count * block_size, -1, np.int64)
        self.paths = np.full(block_count * block_size, "", object)  # by which each slot was computed
        self.steps = 0
        self.rows = 0
        self.fail = False
        self.ffn = "dense"
        self.predictor = None
        self.counts = NeuronCounts(0, 0, 0)
        self.biases: list[float] = []  # of the rows, in order

    def forward(self, batch: Batch) -> Logits:
        if self.fail:
            raise RuntimeError("the device is on fire")
        assert 0 < len(batch.tokens) <= self.max_batch_rows
        self.steps += 1
        self.rows += len(batch.tokens)
        bias = np.zeros(len(batch.context_lengths)) if batch.sparsity_bias is None else batch.sparsity_bias
        self.biases += bias[batch.sequences].tolist()
        if self.ffn == "sparse":  # 3 in 10 neurons are predicted active, 2 are
            was, n = self.counts, len(batch.tokens)
            self.counts = NeuronCounts(was.predicted + 3 * n, was.active + 2 * n, was.total + 10 * n)
        slots = [self._slot(batch, s, p) for s, p in zip(batch.sequences, batch.positions, strict=True)]
        assert len(set(slots)) == len(slots), "two rows write the same slot"
        self.paths[slots] = self.ffn
        self.cache[slots] = batch.tokens + (1000 * bias[batch.sequences]).astype(np.int64)
        for sequence, length in enumerate(batch.context_lengths):
            assert batch.positions[batch.sequences == sequence][-1] == length - 1
        return np.stack([self._logits(batch, int(row)) for row in batch.logit_rows] or [np.empty(0, np.float32)])

    def ffn_path(self, n: int) -> FfnPath:
        return "predict" if self.ffn == "sparse" else "dense"

    def neuron_counts(self) -> NeuronCounts:
        return self.counts

    def expert_counts(self) -> tuple[Any, ...]:
        return ()

    def layer_counts(self) -> LayerCounts:
        return np.array([[self.counts.predicted, self.counts.active, self.counts.total]], np.int64)

    def reset_neuron_counts(self) -> None:
        self.counts = NeuronCounts(0, 0, 0)

    def close(self) -> None:
        self.closed = True

    def _slot(self, batch: Batch, sequence: int, position: int) -> int:
        size = self.block_size
        return int(batch.block_tables[sequence, position // size]) * size + int(position) % size

    def _logits(self, batch: Batch, row: int) -> np.ndarray:
        sequence = int(batch.sequences[row])
        slots = [self._slot(batch, sequence, p) for p in range(int(batch.positions[row]) + 1)]
        seen = self.cache[slots].tolist()
        assert -1 not in seen
        assert set(self.paths[slots]) == {self.ffn}
        return logits_after(seen, self.vocab_size)


def logits_after(tokens: list[int], vocab_size: int) -> np.ndarray:
    """What FakeExecutor gives after these tokens."""
    return _logits_after(tuple(tokens), vocab_size)


@lru_cache(20_000)
def _logits_after(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(vocab_size).astype(np.float32)
