"""deterministic=True: a request gets the same tokens and the same log-probabilities, bit for bit, in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_tiny_model
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import DeviceError, ModelFileError, SamplingParams
from svdengine.llm import LLM

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, seed=7, max_tokens=12, logprobs=3, ignore_eos=True)
PROMPTS = ["hello world", "once upon a time there was a user and a system. " * 4, "what is 2 + 2? " * 3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deterministic")
    return {
        "dense": write_tiny_model(folder / "silu.svdp", activation="silu", weight_format="q4"),
        "auto": write_sparse_model(folder / "relu.svdp", weight_format="q4"),
        "sparse": write_sparse_model(folder / "sparse.svdp", -0.2, weight_format="q8"),
    }


def open_model(path: Path, ffn: Any, **options: Any) -> LLM:
    return svdengine.load(
        path, device="cpu", ffn=ffn, deterministic=True, **{"kv_tokens": 2048, "threads": 1, **options}
    )


def results(llm: LLM, prompts: list[Any], params: list[SamplingParams]) -> list[tuple[tuple[int, ...], Any]]:
    return [(done.token_ids, done.logprobs) for done in llm.generate(prompts, params)]


def alone(path: Path, ffn: Any, prompt: Any, params: SamplingParams) -> tuple[tuple[int, ...], Any]:
    with open_model(path, ffn) as llm:
        return results(llm, [prompt], [params])[0]


@pytest.mark.parametrize("ffn", ["dense", "auto", "sparse"])
def test_requests_beside_others(files: dict[str, Path], ffn: Any) -> None:
    params = [GREEDY, DRAWN, GREEDY]
    expected = [alone(files[ffn], ffn, prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
    for options in ({}, {"prefill_rows": 3, "threads": 2}, {"speculative": True}, {"context": 144, "kv_tokens": 160}):
        with open_model(files[ffn], ffn, **options) as llm:
            assert results(llm, PROMPTS, params) == expected, options
            # Again, others in front, with all prompts in the prefix cache.
            assert results(llm, ["user " * 9, *PROMPTS], [DRAWN, *params])[1:] == expected, options


@pytest.mark.parametrize("ffn", ["dense", "auto", "sparse"])
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6), rows=st.integers(1, 20), data=st.data())
def test_random_company(files: dict[str, Path], ffn: Any, lengths: list[int], rows: int, data: st.DataObject) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 300, n).tolist() for n in lengths]
    chosen = data.draw(st.integers(0, len(prompts) - 1))
    with open_model(files[ffn], ffn, prefill_rows=rows) as llm:
        together = results(llm, prompts, [GREEDY] * len(prompts))
    assert together[chosen] == alone(files[ffn], ffn, prompts[chosen], GREEDY)


@pytest.mark.parametrize("ffn", ["dense", "auto", "sparse"])
def test_tokens_that_were_generated_are_as_if_they_were_read(files: dict[str, Path], ffn: Any) -> None:
    """A prompt that goes on after an answer gets the same whether the answer's keys and values are cached or not."""
    with open_model(files[ffn], ffn) as llm:
        prompt = llm.tokenizer.encode(PROMPTS[1])
        answer = llm.generate([prompt], GREEDY, max_tokens=40)[0]
        longer = [*prompt, *answer.token_ids, 5, 6]
        before = llm.stats().prefix_hit_tokens
        cached = results(llm, [longer], [GREEDY])
        assert llm.stats().prefix_hit_tokens - before > len(prompt) + 16
    assert cached == [alone(files[ffn], ffn, longer, GREEDY)]


def test_scoring_agrees_with_generation_bit_for_bit(files: dict[str, Path]) -> None:
    with open_model(files["dense"], "dense") as llm:
        prompt = llm.tokenizer.encode(PROMPTS[1])
        done = llm.generate([prompt], GREEDY)[0]
        assert done.logprobs is not None
        logits = llm.logits([*prompt, *done.token_ids])[len(prompt) - 1 : -1]
    assert logits.argmax(1).tolist() == list(done.token_ids)
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True).astype(np.float64)
    expected = [row[t] - float(np.log(np.exp(row).sum())) for row, t in zip(shifted, done.token_ids, strict=True)]
    assert [entry.logprob for entry in done.logprobs] == expected


def test_what_was_cached_otherwise_is_not_taken(files: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "kv"
    with svdengine.load(files["dense"], device="cpu", ffn="dense", threads=1) as llm:
        llm.generate(PROMPTS[1], GREEDY)
        llm.save_kv(saved)
    with open_model(files["dense"], "dense") as llm:
        with pytest.raises(ModelFileError, match=r"was saved with .*'dense', and 'dense, deterministic' is set now"):
            llm.load_kv(saved)
        llm.generate(PROMPTS[1], GREEDY)
        saved.unlink()
        llm.save_kv(saved)
    with open_model(files["dense"], "dense") as llm:
        assert llm.deterministic and llm.load_kv(saved) > 0
        assert results(llm, [PROMPTS[1]], [GREEDY]) == [alone(files["dense"], "dense", PROMPTS[1], GREEDY)]


@pytest.mark.parametrize("device", ["cuda", "ascend", "reference"])
def test_devices_that_cannot_are_refused_by_name(files: dict[str, Path], device: Any) -> None:
    with pytest.raises(DeviceError, match=f"deterministic results are not offered on the device {device}.*cpu"):
        svdengine.load(files["dense"], device=device, deterministic=True)


def test_auto_takes_the_cpu_and_says_why(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SVDENGINE_DEVICE", raising=False)
    monkeypatch.setattr("svdengine.executors._best_device", lambda: "cuda")
    with svdengine.load(files["dense"], deterministic=True, threads=1) as llm:
        assert llm.executor.name == "cpu"
    assert "running on the CPU: deterministic results are not offered on the device cuda" in capsys.readouterr().err
    monkeypatch.setenv("SVDENGINE_DEVICE", "cuda")
    with pytest.raises(DeviceError, match="the device cuda"):
        svdengine.load(files["dense"], deterministic=True)
