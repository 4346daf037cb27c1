"""The reference executor: one pass, chunks, single steps and interleaved sequences all give the same logits."""

import math

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, random_weights, relative_error, zoo

from svdengine.kernels.batch import Batch
from svdengine.kernels.reference import ReferenceExecutor, activate
from svdengine.models.config import ModelConfig

LENGTH = 37  # more than two KV blocks


def executor_of(config: ModelConfig, seed: int = 0) -> ReferenceExecutor:
    return ReferenceExecutor(config, random_weights(config, seed), block_count=24)


def at_once(config: ModelConfig, tokens: list[int]) -> np.ndarray:
    return executor_of(config).forward(make_batch([(tokens, 0)], [block_table(len(tokens))]))


@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("chunk", [1, 10])
def test_chunks_equal_one_pass(name: str, chunk: int) -> None:
    config = zoo()[name]
    tokens = random_tokens(config, LENGTH)
    executor, table = executor_of(config), block_table(LENGTH, first=7, step=-3)
    parts = [
        executor.forward(make_batch([(tokens[start : start + chunk], start)], [table]))
        for start in range(0, LENGTH, chunk)
    ]
    assert relative_error(np.concatenate(parts), at_once(config, tokens)) < 1e-5


@pytest.mark.parametrize("name", zoo())
def test_interleaved_sequences_equal_each_alone(name: str) -> None:
    config = zoo()[name]
    first, second = random_tokens(config, LENGTH, seed=1), random_tokens(config, 21, seed=2)
    tables = [block_table(LENGTH, first=1, step=2), block_table(21, first=6, step=-2)]
    executor = executor_of(config)
    steps = [
        [(first[:20], 0), (second[:1], 0)],
        [(first[20:21], 20), (second[1:18], 1)],
        [(first[21:], 21), (second[18:], 18)],
    ]
    found: tuple[list, list] = ([], [])
    for step in steps:
        logits = executor.forward(make_batch(step, tables)).copy()
        split = len(step[0][0])
        found[0].append(logits[:split])
        found[1].append(logits[split:])
    assert relative_error(np.concatenate(found[0]), at_once(config, first)) < 1e-5
    assert relative_error(np.concatenate(found[1]), at_once(config, second)) < 1e-5


def test_sliding_window_forgets_what_lies_before_it() -> None:
    config = zoo()["mistral"]  # two layers of window 7: a token's reach is 12 positions back
    tokens = random_tokens(config, LENGTH)
    changed = [(tokens[0] + 1) % config.vocab_size, *tokens[1:]]
    difference = np.abs(at_once(config, tokens) - at_once(config, changed)).max(1)
    assert (difference[:13] > 0).all() and (difference[13:] == 0).all()


def test_only_the_wanted_rows_have_logits() -> None:
    config = zoo()["llama"]
    tokens = random_tokens(config, 9)
    batch = make_batch([(tokens, 0)], [[0]])
    wanted = Batch(**{**vars(batch), "logit_rows": np.array([8, 2], np.int32)})
    logits = executor_of(config).forward(wanted)
    assert logits.dtype == np.float32
    assert relative_error(logits, at_once(config, tokens)[[8, 2]]) < 1e-6
    assert executor_of(config).forward(Batch(**{**vars(batch), "logit_rows": np.zeros(0, np.int32)})).shape == (0, 119)


def test_gelu_is_the_exact_form() -> None:
    x = np.linspace(-9, 9, 20001, dtype=np.float32)
    exact = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)])
    assert np.abs(activate("gelu", x) - exact).max() < 1e-6


def test_activations_at_their_edges() -> None:
    x = np.array([-1e30, -1.0, 0.0, 0.01, 0.5, 2.0, 1e4], np.float32)
    assert activate("relu", x).tolist() == np.maximum(x, 0).tolist()
    assert activate("fatrelu", x, 0.01).tolist() == np.where(x > np.float32(0.01), x, 0).tolist()
    assert activate("relu2", x)[5] == 4.0
    with np.errstate(all="raise", under="ignore"):
        assert activate("silu", x)[[2, 6]].tolist() == [0.0, 1e4]


def test_refuses_wrong_weights_and_too_many_rows() -> None:
    config = zoo()["llama"]
    weights = random_weights(config)
    with pytest.raises(ValueError, match="lack lm_head"):
        ReferenceExecutor(config, {k: v for k, v in weights.items() if k != "lm_head"})
    with pytest.raises(ValueError, match=r"q must have shape \(2, 90, 90\)"):
        ReferenceExecutor(config, {**weights, "q": weights["q"][:1]})
    executor = ReferenceExecutor(config, weights, max_batch_rows=8)
    with pytest.raises(ValueError, match="a batch of 9 rows"):
        executor.forward(make_batch([(random_tokens(config, 9), 0)], [[0]]))
