"""`LLM.embed`: the definition, and that neither neighbours nor cuts of a prompt change it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from model_zoo import block_table, make_batch
from tiny_model import FakeExecutor, write_tiny_model

import svdengine
from svdengine import LLM, ContextOverflowError, RequestError, SamplingParams
from svdengine.scheduling.embedding import unit_vector

TEXTS = ["hello", "once upon a time there was a user", "a", "hello world " * 9]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("embed") / "tiny.svdp", add_bos=True)


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", context=128) as llm:
        yield llm
        llm._engine.prefix_cache.clear()
        assert llm._engine.pool.block_count == llm._engine.pool.free_count


def test_it_is_the_pooled_hidden_states(llm: LLM) -> None:
    tokens = llm.tokenizer.encode(TEXTS[1])
    executor = llm.executor
    executor.forward(make_batch([(tokens, 0)], [block_table(len(tokens))]))
    hidden = executor.hidden_states()  # type: ignore[attr-defined]
    for pooling, pooled in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        found = llm.embed(TEXTS[1], pooling=pooling)  # type: ignore[arg-type]
        assert found.shape == (1, llm.config.hidden_size) and found.dtype == np.float32
        assert np.abs(found[0] - pooled / np.linalg.norm(pooled)).max() < 1e-6
        assert np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_neighbours_and_what_was_read_before_change_nothing(llm: LLM, pooling: svdengine.Pooling) -> None:
    alone = np.concatenate([llm.embed(text, pooling=pooling) for text in TEXTS])
    with llm.stream("hello world, once", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)) as stream:
        first = next(stream)
        beside = llm.embed(TEXTS, pooling=pooling)
        text = first + "".join(stream)
    assert text == llm.generate("hello world, once", temperature=0, max_tokens=40, ignore_eos=True)[0].text
    assert np.abs(beside - alone).max() < 1e-6
    assert np.abs(llm.embed(TEXTS[::-1], pooling=pooling)[::-1] - alone).max() < 1e-6
    assert np.abs(llm.embed([llm.tokenizer.encode(text) for text in TEXTS], pooling=pooling) - alone).max() < 1e-6


def test_a_text_that_had_to_make_room_is_read_anew(path: Path, llm: LLM) -> None:
    expected = llm.embed(TEXTS[3])
    with svdengine.load(path, device="reference", context=128, prefill_rows=4) as small:
        request = small.prepare_embedding(TEXTS[3])
        with small.stream("once", temperature=0, max_tokens=90, ignore_eos=True) as stream:
            next(stream)
            small.add(request)
            small.step()
            assert 0 < request.sequence.cached < len(request.sequence)
            small._engine.scheduler.restart()
            while not request.done:
                small.step()
        assert request.vector is not None and np.abs(request.vector - expected[0]).max() < 1e-6
        assert small.stats().preemptions > 0


def test_what_cannot_be_embedded(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.embed(["hello", ""])
    with pytest.raises(RequestError, match="pooling must be one of mean, last"):
        llm.embed("hello", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ContextOverflowError, match="129 tokens and this model's maximum context length is 128 tokens"):
        llm.embed([[5] * 129])
    assert llm.embed([[5] * 128]).shape == (1, llm.config.hidden_size)
    assert len(llm.prepare_embedding([5] * 200, cut=True).sequence) == 128
    llm._engine.executor = FakeExecutor(8, 64)  # type: ignore[assignment]
    with pytest.raises(RequestError, match="no hidden states"):
        llm.embed("hello")


def test_vectors_without_a_direction_are_an_error() -> None:
    assert unit_vector(np.array([3e300, 4e300])).tolist() == pytest.approx([0.6, 0.8])
    for damaged in ([0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]):
        with pytest.raises(svdengine.SvdEngineError, match="damaged"):
            unit_vector(np.array(damaged))
