"""KV blocks in files: what is saved comes back, and a file that is wrong changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import FakeExecutor, write_tiny_model
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import LLM, ModelFileError, RequestError, SamplingParams
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import PAD_PREFIX, TensorWriter
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.reference import ReferenceExecutor

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SYSTEM = "once upon a time there was a system, hello world, and the assistant says: " * 2
DTYPES = {"float32": "F32", "int32": "I32", "float64": "F64", "uint8": "U8", "float16": "F16"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("kv") / "tiny.svdp")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", context=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def saved(path: Path) -> Path:
    """A file with the prefixes of three prompts, two of which begin alike."""
    with svdengine.load(path, device="reference", context=128, kv_tokens=512) as llm:
        for prompt in (SYSTEM + "a", SYSTEM + "b", "hello " * 20):
            llm.generate(prompt, GREEDY)
        llm.save_kv(path.with_name("saved.kv"))
    return path.with_name("saved.kv")


def rewrite(saved: Path, to: Path, change: Any) -> Path:
    """A copy with other tensors: `change` gets a dict of arrays and the metadata."""
    file = TensorFile(saved)
    arrays = {n: a.copy() for n, a in file.arrays.items() if not n.startswith(PAD_PREFIX)}
    metadata = dict(file.header.metadata)
    change(arrays, metadata)
    with TensorWriter(to, {n: (a.shape, DTYPES[a.dtype.name]) for n, a in arrays.items()}, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    file.close()
    return to


def test_prompts_are_not_read_again(llm: LLM, path: Path, tmp_path: Path) -> None:
    first = llm.generate(SYSTEM + "a", GREEDY)[0]
    count = llm.save_kv(tmp_path / "kv")
    assert count == first.stats.prompt_tokens + 11
    with svdengine.load(path, device="reference", context=128) as other:
        assert other.load_kv(tmp_path / "kv") == count
        assert other.load_kv(tmp_path / "kv") == 0  # all of it is known
        again = other.generate(SYSTEM + "a", GREEDY)[0]
        assert again.token_ids == first.token_ids
        assert again.stats.cached_tokens == (first.stats.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE > 0
        more = [*other.tokenizer.encode(SYSTEM + "a"), *first.token_ids, 5, 6]
        assert other.generate(more, GREEDY)[0].stats.cached_tokens >= count // BLOCK_SIZE * BLOCK_SIZE
        other._engine.prefix_cache.clear()
        assert other._engine.pool.blank_count == other.executor.block_count


def test_only_what_has_room_is_taken_and_what_was_used_last_first(saved: Path, path: Path) -> None:
    with svdengine.load(path, device="reference", context=32, kv_tokens=32) as small:
        assert small.load_kv(saved) == 2 * BLOCK_SIZE
        assert small.generate("hello " * 13, GREEDY, max_tokens=1)[0].stats.cached_tokens > 0
        assert small.generate(SYSTEM[:40], GREEDY, max_tokens=1)[0].stats.cached_tokens == 0


def test_running_requests_go_on(llm: LLM, saved: Path, tmp_path: Path) -> None:
    expected = llm.generate(SYSTEM, GREEDY)[0].token_ids
    llm._engine.prefix_cache.clear()
    stream = llm.stream(SYSTEM, GREEDY)
    next(stream)
    llm.save_kv(tmp_path / "kv")
    llm.load_kv(saved)
    for _ in stream:
        pass
    assert stream.completion.token_ids == expected


def test_the_cpu_saves_and_loads(path: Path, tmp_path: Path) -> None:
    with svdengine.load(path, device="cpu", context=128, threads=1) as llm:
        first = llm.generate(SYSTEM, GREEDY)[0]
        llm.save_kv(tmp_path / "kv")
    with svdengine.load(path, device="cpu", context=128, threads=1) as llm:
        llm.load_kv(tmp_path / "kv")
        second = llm.generate(SYSTEM, GREEDY)[0]
        assert second.stats.cached_tokens > 0 and second.token_ids == first.token_ids
    with (
        svdengine.load(path, device="reference", context=128) as other,
        pytest.raises(ModelFileError, match=r"kv: found F16 .*, expected F32 .*; set the same --kv-dtype"),
    ):
        other.load_kv(tmp_path / "kv")
    with svdengine.load(path, device="cpu", context=128, threads=1, kv_dtype="f32") as llm:
        llm.generate(SYSTEM, GREEDY)
        llm.save_kv(tmp_path / "kv")
    with svdengine.load(path, device="reference", context=128) as other:  # the same layout
        other.load_kv(tmp_path / "kv")
        reused = other.generate(SYSTEM, GREEDY)[0]
        assert reused.stats.cached_tokens > 0
        assert reused.token_ids == first.token_ids


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_eight_bits_are_saved_and_loaded(path: Path, tmp_path: Path, device: Any) -> None:
    with svdengine.load(path, device=device, context=128, threads=1, kv_dtype="q8") as llm:
        first = llm.generate(SYSTEM, GREEDY)[0]
        count = llm.save_kv(tmp_path / "kv")
    entry = TensorFile(tmp_path / "kv").header.entries["kv"]
    assert entry.dtype == "U8" and entry.shape[-1] == 34
    for other_device in ("cpu", "reference"):
        with svdengine.load(path, device=other_device, context=128, threads=1, kv_dtype="q8") as llm:
            assert llm.load_kv(tmp_path / "kv") == count
            again = llm.generate(SYSTEM, GREEDY)[0]
            assert again.stats.cached_tokens > 0 and again.token_ids == first.token_ids
    with svdengine.load(path, device=device, context=128, threads=1, kv_dtype="f16") as llm:
        with pytest.raises(ModelFileError, match=r"kv: found U8 .*, expected F.*; set the same --kv-dtype"):
            llm.load_kv(tmp_path / "kv")
        assert llm.stats().blocks_cached == 0
        llm.generate(SYSTEM, GREEDY)
        llm.save_kv(tmp_path / "kv")
    with (
        svdengine.load(path, device=device, context=128, threads=1, kv_dtype="q8") as llm,
        pytest.raises(ModelFileError, match=r"kv: found F.*, expected U8 .*; set the same --kv-dtype"),
    ):
        llm.load_kv(tmp_path / "kv")


def test_scales_that_are_not_finite_are_refused(path: Path, tmp_path: Path) -> None:
    with svdengine.load(path, device="reference", context=128, kv_dtype="q8") as llm:
        llm.generate(SYSTEM, GREEDY)
        llm.save_kv(tmp_path / "kv")
        broken = rewrite(tmp_path / "kv", tmp_path / "broken", put("kv", (..., slice(2)), 0xFF))
        with pytest.raises(ModelFileError, match="are not finite"):
            llm.load_kv(broken)


def test_files_of_other_models_are_refused(llm: LLM, saved: Path, tmp_path: Path) -> None:
    wide = write_tiny_model(tmp_path / "wide.svdp", tied_embeddings=False)
    with svdengine.load(wide, device="reference") as other, pytest.raises(ModelFileError, match="another model"):
        other.load_kv(saved)
    sparse = write_sparse_model(tmp_path / "sparse.svdp")
    with svdengine.load(sparse, device="reference", ffn="sparse") as other:
        with pytest.raises(ModelFileError, match="another model or predictor"):
            other.load_kv(saved)
        other.save_kv(tmp_path / "kv")
        other.ffn = "dense"
        with pytest.raises(ModelFileError, match="FFN's path 'sparse', and 'dense' is set now"):
            other.load_kv(tmp_path / "kv")


def test_a_device_with_blocks_of_another_size_refuses_by_name(
    saved: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an Ascend's are. What it saves itself comes back."""
    monkeypatch.setattr(ReferenceExecutor, "block_size", 32)
    with svdengine.load(path, device="reference", context=128) as llm:
        assert llm.executor.block_size == 32
        first = llm.generate(SYSTEM + "a", GREEDY)[0]
        with pytest.raises(ModelFileError, match=r"tokens: found I32 \(\d+, 16\), expected I32 \(\d+, 32\); devices"):
            llm.load_kv(saved)
        llm.save_kv(tmp_path / "own.kv")
    with svdengine.load(path, device="reference", context=128) as again:
        assert again.load_kv(tmp_path / "own.kv") > 0
        second = again.generate(SYSTEM + "a", GREEDY)[0]
    assert second.token_ids == first.token_ids and second.stats.cached_tokens == 32


def test_files_that_are_none_are_refused(llm: LLM, path: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name, message in (
        (path, "is no file of saved KV blocks"),
        (tmp_path / "text", "truncated"),
        (tmp_path, "regular"),
    ):
        with pytest.raises(ModelFileError, match=message):
            llm.load_kv(name)
    with pytest.raises(ModelFileError, match="No such file"):
        llm.load_kv(tmp_path / "missing")
    with pytest.raises(ModelFileError, match="cannot write"):
        llm.save_kv(tmp_path / "missing" / "kv")


def put(name: str, at: Any, value: Any) -> Any:
    def change(arrays: dict[str, Any], _: Any) -> None:
        arrays[name][at] = value

    return change


def twice(arrays: dict[str, Any], _: Any) -> None:
    for name in ("tokens", "lengths", "parents", "sparsity_bias"):
        arrays[name][1] = arrays[name][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("tokens", (0, 0), 10**6), "a token lies outside"),
        (put("tokens", (0, 0), -1), "a token lies outside"),
        (put("lengths", 0, 17), "fewer tokens than 1 or more than 16"),
        (put("lengths", 0, 0), "fewer tokens than 1 or more than 16"),
        (put("parents", 0, 0), "block 0 cannot come after block 0"),
        (put("parents", 1, -2), "block 1 cannot come after block -2"),
        (put("lengths", 0, 3), "cannot come after block 0"),
        (put("sparsity_bias", 0, np.nan), "a sparsity bias is out of range"),
        (put("sparsity_bias", 0, 0.5), "cannot come after block 0"),
        (put("kv", (0, 0, 0, 0, 0, 0), np.inf), "are not finite"),
        (put("kv", (0, 0, 0, 0, 0, 0), 3.0), "the checksum does not match"),
        (put("tokens", (0, 0), 9), "the checksum does not match"),
        (twice, "the same block occurs twice"),
        (lambda arrays, _: arrays.pop("lengths"), "found the tensors"),
        (lambda arrays, _: arrays.update(lengths=arrays["lengths"][1:].copy()), "tokens: found I32"),
        (lambda arrays, _: arrays.update(kv=arrays["kv"][..., :-1].copy()), "kv: found F32"),
        (lambda arrays, _: arrays.update(kv=arrays["kv"].astype(np.float16)), "kv: found F16"),
        (lambda _, metadata: metadata.update(format_version="2"), "has format version '2'"),
        (lambda _, metadata: metadata.pop("model"), "another model"),
    ],
)
def test_damage_is_found_and_nothing_is_changed(
    llm: LLM, saved: Path, tmp_path: Path, change: Any, message: str
) -> None:
    llm.generate("hello world", GREEDY)
    before = llm.stats()
    with pytest.raises(ModelFileError, match=message):
        llm.load_kv(rewrite(saved, tmp_path / "kv", change))
    assert llm.stats() == before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_flipped_and_missing_bytes_are_found(saved: Path, path: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    broken = saved.with_name("broken.kv")
    broken.write_bytes(content)
    with svdengine.load(path, device="reference", context=128) as llm:
        try:
            llm.load_kv(broken)
        except ModelFileError:
            assert llm.stats().blocks_cached == 0
        else:  # only in padding, of the header or between tensors, may a bit change unseen
            good, changed = TensorFile(saved), TensorFile(broken)
            names = [name for name in good.arrays if not name.startswith(PAD_PREFIX)]
            assert all(np.array_equal(good.arrays[name], changed.arrays[name]) for name in names)


def test_a_device_that_cannot_says_so(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._engine, "executor", FakeExecutor(8, 64))
    for call in (llm.save_kv, llm.load_kv):
        with pytest.raises(RequestError, match="cannot be saved or loaded on the device fake"):
            call(tmp_path / "kv")


def test_other_texts_do_not_leak_into_the_file(llm: LLM, tmp_path: Path) -> None:
    llm.generate(SYSTEM, GREEDY)
    llm._engine.prefix_cache.clear()
    llm.generate("hello", GREEDY, max_tokens=2)
    llm.save_kv(tmp_path / "kv")
    file = TensorFile(tmp_path / "kv")
    (length,) = file.arrays["lengths"]
    assert 0 < length < BLOCK_SIZE
    assert not file.arrays["kv"][0, :, :, length:].any() and file.arrays["kv"][0, :, :, :length].all()
    assert json.dumps(dict(file.header.metadata)).count("hello") == 0
