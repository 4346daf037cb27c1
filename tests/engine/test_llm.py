"""The library, end to end: a tiny model file on the reference executor."""

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_tiny_model

import svdengine
from svdengine import LLM, ContextOverflowError, ModelFileError, RequestError, SamplingParams, SvdEngineError
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.reference import float32_weights
from svdengine.measuring.benchmark import run_benchmark
from svdengine.measuring.memory_traffic import weight_bytes
from svdengine.measuring.perplexity import measure_perplexity
from svdengine.scheduling.block_pool import kv_bytes_per_token, kv_pool_bytes_per_token, kv_read_bytes
from svdengine.scheduling.sampler import negative_log_likelihood
from svdengine.scheduling.sequence import blocks_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
HELLO = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llm") / "tiny.svdp")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", context=128) as llm:
        yield llm


def blocks_in_use(llm: LLM) -> int:
    llm._engine.prefix_cache.clear()
    return llm._engine.pool.block_count - llm._engine.pool.free_count


def test_stream_and_generate_agree(llm: LLM) -> None:
    text = "".join(llm.stream("once upon", GREEDY))
    done = llm.generate(["once upon", "hello", "once upon"], GREEDY)
    assert [d.text for d in done] == [text, llm.generate("hello", GREEDY)[0].text, text]
    assert all(len(d.token_ids) == 12 and d.finish_reason == "length" for d in done)
    assert llm.tokenizer.decode(done[0].token_ids) == text
    stats = done[0].stats
    assert stats.prompt_tokens == len(llm.tokenizer.encode("once upon")) and stats.generated_tokens == 12
    assert stats.seconds >= stats.time_to_first_token > 0 and stats.tokens_per_second > 0
    assert blocks_in_use(llm) == 0


def test_greedy_tokens_are_those_of_the_teacher_forced_logits(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("hello world")
    (done,) = llm.generate(prompt, GREEDY, logprobs=3)
    logits = llm.logits([*prompt, *done.token_ids])
    assert logits.dtype == np.float32 and logits.shape == (len(prompt) + 12, llm.config.vocab_size)
    rows = logits[len(prompt) - 1 : -1]
    assert rows.argmax(1).tolist() == done.token_ids
    assert done.logprobs is not None and len(done.logprobs) == 12
    total = negative_log_likelihood(rows, done.token_ids)
    assert -sum(p.logprob for p in done.logprobs) == pytest.approx(total, abs=1e-3)
    assert all(p.top[0][0] == p.token and len(p.top) == 3 for p in done.logprobs)


def test_stats_say_what_was_done(llm: LLM) -> None:
    (done,) = llm.generate("hello world", GREEDY)
    stats = llm.stats()
    assert stats.generated_tokens == 12 and stats.prompt_tokens == done.stats.prompt_tokens
    assert stats.steps == {"dense": 12}
    assert stats.blocks_cached == blocks_for(done.stats.prompt_tokens + 11) == 8 - stats.blocks_free


def test_speculation_changes_no_token(llm: LLM, path: Path) -> None:
    prompt, params = "hello world, hello world, hello", SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    with svdengine.load(path, device="reference", context=128, speculative=True) as other:
        assert other.generate(prompt, params)[0].token_ids == llm.generate(prompt, params)[0].token_ids
        assert other.stats().accepted_tokens > 0
        assert sum(other.stats().steps.values()) < 80


def test_control_tokens_in_prompts_are_text_unless_special(llm: LLM) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    plain, special = llm.prepare(text), llm.prepare(text, special=True)
    marks = [llm.tokenizer.encode(mark, special=True)[-1] for mark in ("<|im_start|>", "<|im_end|>")]
    assert not set(marks) & set(plain.sequence.tokens)
    assert [t for t in special.sequence.tokens if t in marks] == [marks[0], marks[1], marks[0]]
    asked = llm.chat_template.encode([{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hello"}])
    own = "<|im_start|>system\nBe kind<|im_end|>\n" + text
    assert llm.prepare(own, special=True).sequence.tokens == asked
    (done,) = llm.generate([own], GREEDY, special=True)
    assert done.token_ids == llm.generate([asked], GREEDY)[0].token_ids
    assert "".join(llm.stream(own, GREEDY, special=True)) == done.text
    assert llm.prepare(asked, special=True).sequence.tokens == asked
    with pytest.raises(RequestError, match="special must be true or false"):
        llm.stream("a", special="yes")  # type: ignore[arg-type]


def test_a_beginning_that_is_written_is_not_added_again(tmp_path: Path) -> None:
    with svdengine.load(write_tiny_model(tmp_path / "bos.svdp", add_bos=True), device="reference", context=64) as llm:
        expected = llm.prepare("hello").sequence.tokens
        assert llm.prepare("<s>hello", special=True).sequence.tokens == expected
        assert llm.prepare("hello", special=True).sequence.tokens == expected
        assert llm.prepare("<s>hello").sequence.tokens != expected


def test_a_call_without_a_text_is_a_message(llm: LLM) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    rest = [{"role": "tool", "content": "4"}]
    answers = [
        llm.chat([*HELLO, {"role": "assistant", "tool_calls": [call], **content}, *rest], GREEDY).token_ids
        for content in ({"content": None}, {"content": ""}, {})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_seeds(llm: LLM) -> None:
    each = [SamplingParams(seed=seed, max_tokens=10) for seed in (1, 2, 1)]
    together = [done.token_ids for done in llm.generate(["hello"] * 3, each)]
    alone = [llm.generate("hello", params)[0].token_ids for params in each]
    assert together == alone
    assert alone[0] == alone[2] != alone[1]


def test_model_defaults_and_fields(llm: LLM) -> None:
    assert llm.default_params.temperature == 0.7 and llm.default_params.top_k == 50
    assert llm.generate("hello", max_tokens=3)[0].stats.generated_tokens <= 3
    with pytest.raises(RequestError, match="'tempature' is not a sampling parameter"):
        llm.stream("hello", tempature=0.5)


def test_chat_reuses_what_was_computed(llm: LLM) -> None:
    first = llm.chat(HELLO, GREEDY)
    assert first.stats.cached_tokens == 0
    more = [*HELLO, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    second = llm.chat(more, GREEDY)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens // BLOCK_SIZE * BLOCK_SIZE > 0
    llm._engine.prefix_cache.clear()
    assert llm.chat(more, GREEDY).token_ids == second.token_ids


def test_stop_strings_end_the_text(llm: LLM) -> None:
    whole = llm.generate("hello", GREEDY)[0].text
    stop = whole[4:7]
    assert len(stop) == 3
    for stream in (llm.stream("hello", GREEDY, stop=stop), llm.stream("hello", GREEDY, stop=[stop, "never"])):
        assert "".join(stream) == whole[: whole.index(stop)]
        assert stream.completion.finish_reason == "stop"


def test_abandoned_streams_free_their_blocks(llm: LLM) -> None:
    for end in ("close", "drop", "with", "never started"):
        stream = llm.stream("hello world", GREEDY, max_tokens=50)
        if end != "never started":
            next(stream)
        if end == "close":
            stream.close()
            assert stream.completion.finish_reason == "abort"
        elif end == "with":
            with stream:
                pass
        del stream
        gc.collect()
        llm.generate("hello", GREEDY, max_tokens=1)
        assert blocks_in_use(llm) == 0


def test_a_cancelled_stream_ends(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY, max_tokens=50)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert blocks_in_use(llm) == 0


def test_threads_may_share_a_model(llm: LLM) -> None:
    prompts = ["hello", "once upon a time", "what is 2 + 2?", "the"]
    expected = [d.text for d in llm.generate(prompts, GREEDY)]
    found = [""] * len(prompts)

    def work(i: int) -> None:
        found[i] = "".join(llm.stream(prompts[i], GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert blocks_in_use(llm) == 0


def test_context_overflow_and_shift(llm: LLM) -> None:
    long = llm.tokenizer.encode("hello world " * 200)
    with pytest.raises(
        ContextOverflowError, match=rf"has {len(long)} tokens and this model's maximum context length is 128"
    ):
        llm.stream(long)
    assert llm.generate(long[:127], GREEDY)[0].stats.generated_tokens == 1
    shifted = llm.generate(long, GREEDY, context_shift=True, max_tokens=150)[0]
    assert shifted.stats.generated_tokens == 150
    turn = [*HELLO, {"role": "assistant", "content": "x" * 50}]
    talk = [{"role": "system", "content": "be brief"}, *turn * 5, *HELLO]
    with pytest.raises(ContextOverflowError):
        llm.chat(talk, GREEDY)
    stream = llm.stream_chat(talk, GREEDY, context_shift=True)
    kept = stream._request.sequence.tokens
    system = llm.chat_template.encode(talk[:1], add_generation_prompt=False)
    assert kept[: len(system)] == system
    assert stream._request.keep >= len(system)
    with pytest.raises(ContextOverflowError, match="do not fit the context of 128"):
        llm.logits(long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.stream(""), "empty"),
        (lambda llm: llm.stream([]), "empty"),
        (lambda llm: llm.generate([]), "no prompt"),
        (lambda llm: llm.generate(3), "prompts must be"),
        (lambda llm: llm.generate(["a", 3]), "token ids must be a list"),
        (lambda llm: llm.generate(["a", "b"], [GREEDY]), "1 sampling parameters for 2 prompts"),
        (lambda llm: llm.stream([1, 2.5]), "whole numbers"),
        (lambda llm: llm.stream([99999]), "token id 99999"),
        (lambda llm: llm.stream("a", {"temperature": 1}), "must be SamplingParams"),
        (lambda llm: llm.logits("text"), "token ids must be a list"),
        (lambda llm: llm.logits([]), "empty"),
        (lambda llm: llm.chat([]), "empty"),
        (lambda llm: llm.stream("a", logit_bias={99999: 1.0}), "logit_bias names token 99999"),
    ],
)
def test_unusable_requests(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(llm)
    assert blocks_in_use(llm) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "found the device 'tpu', expected one of"),
        ({"threads": -1}, "threads must lie between 1"),
        ({"threads": "two"}, "threads must be a whole number"),
        ({"context": 1}, "at least 2"),
        ({"context": 10**6}, "made for a context of 512"),
        ({"kv_dtype": "q3"}, "kv_dtype must be one of f16, f32, q8"),
        ({"kv_tokens": 5}, "kv_tokens must be at least"),
        ({"kv_tokens": 512, "kv_memory": 1 << 30}, "not as both"),
        ({"kv_memory": "1G"}, "kv_memory must be a whole number of bytes"),
        ({"context": 20, "kv_memory": 32 * 768 - 1}, r"a context of 20 tokens, which takes 0\.0 MiB, found 0\.0 MiB"),
        ({"prefill_rows": 0}, "prefill_rows must lie between 1 and"),
        ({"gpu_memory": "8G"}, "gpu_memory must be a whole number of bytes"),
        ({"ffn": "fast"}, "ffn must be one of"),
        ({"ffn": "sparse"}, "has no predictor"),
        ({"predictor": "x.safetensors"}, "x.safetensors: No such file"),
    ],
)
def test_unusable_options(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdEngineError, match=message):
        svdengine.load(path, **{"device": "reference", **options})


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.svdp").write_text("hello")
    for name in ("missing.svdp", "text.svdp", "."):
        with pytest.raises(ModelFileError):
            svdengine.load(tmp_path / name)


def test_a_closed_model_refuses_work(path: Path) -> None:
    llm = svdengine.load(path, device="reference", context=64)
    stream = llm.stream("hello", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(SvdEngineError, match="was closed"):
        list(stream)
    with pytest.raises(SvdEngineError, match="was closed"):
        llm.generate("hello")


def test_a_model_without_template(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "base.svdp", template=None)
    with svdengine.load(path, device="reference") as llm, pytest.raises(RequestError, match="no chat template"):
        llm.chat(HELLO)


def test_perplexity(tmp_path: Path, llm: LLM) -> None:
    text = "once upon a time there was a system, hello world. " * 6
    ids = llm.tokenizer.encode(text)
    result = measure_perplexity(llm, text, window=20)
    total = scored = 0
    for at in range(0, len(ids), 20):
        part = ids[at : at + 20]
        if len(part) > 1:
            total += negative_log_likelihood(llm.logits(part)[:-1], part[1:])
            scored += len(part) - 1
    assert result.tokens == scored
    assert result.perplexity == pytest.approx(np.exp(total / scored))
    assert result.bits_per_byte == pytest.approx(total / np.log(2) / (len(text) * scored / len(ids)))
    with pytest.raises(RequestError, match="1 tokens, which is too few"):
        measure_perplexity(llm, "a", window=20)
    with pytest.raises(RequestError, match="window must lie between 2 and the context of 128"):
        measure_perplexity(llm, text, window=129)
    path = write_tiny_model(tmp_path / "bos.svdp", add_bos=True)
    with svdengine.load(path, device="reference", context=64) as other:
        assert measure_perplexity(other, text, window=20).tokens == len(ids)


def test_weights_come_back_as_they_were_stored(llm: LLM) -> None:
    from model_zoo import random_weights

    expected = random_weights(llm.config)
    found = float32_weights(llm.config, llm.model_file.arrays, llm.model_file.formats)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_memory_traffic(llm: LLM) -> None:
    config = llm.config
    arrays = llm.model_file.arrays
    assert weight_bytes(llm.model_file) == sum(a.nbytes for a in arrays.values())  # the embedding is tied
    assert kv_bytes_per_token(config, "f32") == 2 * 2 * 3 * 10 * 4
    assert kv_read_bytes(config, 10) == 10 * kv_bytes_per_token(config)
    assert kv_bytes_per_token(config, "q8") == 2 * 2 * 3 * (10 + 2)
    common = replace(config, head_dim=64)  # the same memory holds nearly twice the tokens
    assert kv_pool_bytes_per_token(common, "q8") / kv_pool_bytes_per_token(common) == 34 / 64


@pytest.mark.parametrize("kv_dtype", ["f16", "f32", "q8"])
def test_a_kv_pool_fills_the_memory_it_is_given(path: Path, kv_dtype: Any) -> None:
    with svdengine.load(path, device="cpu", threads=1, context=40, kv_memory=100_000, kv_dtype=kv_dtype) as llm:
        pool = llm.executor.block_count * BLOCK_SIZE
        padded = kv_pool_bytes_per_token(llm.config, kv_dtype)
        assert pool * llm.executor.kv_bytes_per_token <= 100_000 < (pool + BLOCK_SIZE) * padded
        assert padded >= kv_bytes_per_token(llm.config, kv_dtype)


def test_benchmarks_at_depth_fill_the_context_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Batch] = []
    forward = llm.executor.forward
    monkeypatch.setattr(llm.executor, "forward", lambda batch: (batches.append(batch), forward(batch))[1])
    rows = run_benchmark(llm, 6, 3, 2, depth=20, parallel=(1, 2))
    assert [row.test for row in rows] == ["pp6 @ d20", "tg3 @ d20", "tg3x2 @ d20"]
    steps = [(len(batch.tokens), int(batch.positions[0])) for batch in batches]
    read = [(20, 0), *[(6, 20)] * 3]  # once, and then what is timed, which begins with a run that does not count
    decoded = [(20, 0), *[(1, 20), (1, 21), (1, 22)] * 3, (20, 0), (20, 0), *[(2, 20), (2, 21), (2, 22)] * 3]
    assert steps == read + decoded
    filled = {int(block) for batch in batches[-11:-9] for block in batch.block_tables[0]}
    assert filled == {int(block) for block in batches[-1].block_tables[:, :2].flat}
    deeper = run_benchmark(llm, 0, 3, 1, depth=60)[0]
    assert deeper.bytes_per_token - rows[1].bytes_per_token == pytest.approx(40 * kv_bytes_per_token(llm.config))


def test_benchmark_rows(llm: LLM) -> None:
    rows = run_benchmark(llm, 24, 5, 2)
    assert [row.test for row in rows] == ["pp24", "tg5"]
    for row in rows:
        assert row.tokens_per_second > 0 and row.stddev >= 0
        assert row.gb_per_second == pytest.approx(row.bytes_per_token * row.tokens_per_second / 1e9)
    assert rows[1].bytes_per_token > rows[0].bytes_per_token
