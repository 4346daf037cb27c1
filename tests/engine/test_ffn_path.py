"""Dense and sparse execution of the same model through the library."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_model
from tiny_predictor import tiny_predictor, write_sparse_model

import svdengine
from svdengine import LLM, ModelFileError, RequestError, SamplingParams
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import PREDICTOR_FORMAT, model_fingerprint, write_predictor
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import PAD_PREFIX, TensorWriter
from svdengine.kernels.executor import NeuronCounts
from svdengine.kernels.predictor import predictor_bytes
from svdengine.measuring.benchmark import bytes_per_token, run_benchmark
from svdengine.measuring.memory_traffic import ffn_bytes, sparse_weight_bytes, stored_bytes, weight_bytes

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("sparse") / "sparse.svdp")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", ffn="sparse", context=128) as llm:
        yield llm


def test_a_model_file_keeps_its_predictor(path: Path, tmp_path: Path) -> None:
    with read_model_file(write_tiny_model(tmp_path / "dense.svdp")) as dense, read_model_file(path) as sparse:
        assert all(np.array_equal(dense.arrays[name], sparse.arrays[name]) for name in dense.arrays)
        assert dense.tokenizer_bytes == sparse.tokenizer_bytes and dense.chat_template == sparse.chat_template
        assert set(sparse.metadata) == {*dense.metadata, "predictor"}


def test_a_predictor_of_its_own_file(path: Path, tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense.svdp")
    with read_model_file(dense) as file:
        write_predictor(tmp_path / "p.safetensors", tiny_predictor(file.config, 0.1, model_fingerprint(file)))
    with (
        svdengine.load(path, device="reference", ffn="sparse") as one,
        svdengine.load(dense, device="reference", ffn="sparse", predictor=tmp_path / "p.safetensors") as other,
    ):
        tokens = one.tokenizer.encode("hello world")
        assert np.array_equal(one.logits(tokens), other.logits(tokens))
    with pytest.raises(ModelFileError, match="was made for another model"):
        wide = write_tiny_model(tmp_path / "wide.svdp", tied_embeddings=False)
        svdengine.load(wide, device="reference", predictor=tmp_path / "p.safetensors")
    with pytest.raises(ModelFileError, match="No such file"):
        svdengine.load(dense, device="reference", predictor="missing.safetensors")


def written_earlier(source: Path, to: Path) -> Path:
    """A file as it was before thresholds were stored with their own sign."""
    file = TensorFile(source)
    metadata, arrays = dict(file.header.metadata), {}
    if metadata["format"] == PREDICTOR_FORMAT:
        metadata["format_version"] = "1"
    for name, array in file.arrays.items():
        if name.endswith(".threshold"):
            arrays[name.removesuffix("threshold") + "bias"] = -array
        elif not name.startswith(PAD_PREFIX):
            arrays[name] = array
    tensors = {n.replace(".threshold", ".bias"): (e.shape, e.dtype) for n, e in file.header.entries.items()}
    with TensorWriter(to, {name: tensors[name] for name in arrays}, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return to


def test_predictors_of_earlier_versions_are_read(path: Path, tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense.svdp")
    with read_model_file(dense) as file:
        write_predictor(tmp_path / "p.safetensors", tiny_predictor(file.config, 0.1, model_fingerprint(file)))
    inside = written_earlier(path, tmp_path / "earlier.svdp")
    alone = written_earlier(tmp_path / "p.safetensors", tmp_path / "earlier.safetensors")
    with svdengine.load(path, device="reference", ffn="sparse") as llm:
        expected = llm.logits([1, 2, 3])
        counts = llm.executor.neuron_counts()
    for model, predictor in ((inside, None), (dense, alone)):
        with svdengine.load(model, device="reference", ffn="sparse", predictor=predictor) as llm:
            np.testing.assert_array_equal(llm.logits([1, 2, 3]), expected)
            assert llm.executor.neuron_counts() == counts


def test_sparse_and_dense_agree_where_the_predictor_is_right(llm: LLM) -> None:
    tokens = llm.tokenizer.encode("once upon a time")
    sparse = llm.logits(tokens)
    llm.ffn = "dense"
    dense = llm.logits(tokens)
    assert np.abs(sparse - dense).max() < 0.02 * np.abs(dense).max()
    assert llm.ffn == "dense"


def test_completions_say_what_was_computed(llm: LLM) -> None:
    stats = llm.generate("hello", GREEDY)[0].stats
    assert stats.predicted_density is not None and stats.active_density is not None
    assert 0.4 < stats.active_density < stats.predicted_density < 0.7
    llm.ffn = "dense"
    stats = llm.generate("hello", GREEDY)[0].stats
    assert stats.predicted_density is None and stats.active_density is None


def test_the_sparsity_bias_of_a_request(llm: LLM) -> None:
    shares = [llm.generate("hello", GREEDY, sparsity_bias=b)[0].stats.predicted_density for b in (-9.0, 0.0, 0.5, 9.0)]
    assert shares[0] == 1 and shares[1] > shares[2] > shares[3] == 0  # type: ignore[operator]
    tokens = llm.tokenizer.encode("once upon")
    llm.ffn = "dense"
    dense = llm.logits(tokens)
    llm.ffn = "sparse"
    assert np.abs(llm.logits(tokens, sparsity_bias=-9.0) - dense).max() < 1e-4
    assert np.abs(llm.logits(tokens, sparsity_bias=9.0) - dense).max() > 0.01
    for wrong in (float("nan"), "much", 1e9):
        with pytest.raises(RequestError, match="sparsity_bias"):
            llm.generate("hello", sparsity_bias=wrong)
    with pytest.raises(RequestError, match="sparsity_bias"):
        llm.logits(tokens, sparsity_bias=float("inf"))


def test_requests_of_another_bias_share_no_prefix(llm: LLM) -> None:
    prompt = "once upon a time there was a system, hello world, and a user"
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY, sparsity_bias=1.0)[0].stats.cached_tokens == 0
    assert llm.generate(prompt, GREEDY)[0].stats.cached_tokens > 0
    llm.ffn = "dense"
    assert llm.generate(prompt, GREEDY)[0].stats.cached_tokens == 0


def test_a_model_without_predictor_is_told_to_calibrate(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense.svdp")
    with pytest.raises(RequestError, match=rf"svdengine calibrate {dense}"):
        svdengine.load(dense, device="reference", ffn="sparse")
    with svdengine.load(dense, device="reference") as llm:
        assert llm.ffn == "auto" and llm.predictor is None
        with pytest.raises(RequestError, match="svdengine calibrate"):
            llm.ffn = "sparse"
        with pytest.raises(RequestError, match="ffn must be one of"):
            llm.ffn = "fast"
    silu = write_tiny_model(tmp_path / "silu.svdp", activation="silu")
    for options in ({"ffn": "sparse"}, {"predictor": "x.safetensors"}):
        with pytest.raises(RequestError, match=r"needs a ReLU-family activation .* has silu"):
            svdengine.load(silu, device="reference", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["no description", "no json", "wrong rank", "missing", "not finite"])
def test_a_damaged_predictor_is_refused(path: Path, tmp_path: Path, damage: str) -> None:
    file = TensorFile(path)
    metadata, arrays = dict(file.header.metadata), dict(file.arrays)
    tensors = {n: (e.shape, e.dtype) for n, e in file.header.entries.items() if not n.startswith("__pad.")}
    if damage == "no description":
        del metadata["predictor"]
    elif damage == "no json":
        metadata["predictor"] = "{"
    elif damage == "not finite":
        arrays["predictor.1.threshold"] = np.full_like(arrays["predictor.1.threshold"], np.nan)
    elif damage == "wrong rank":
        metadata["predictor"] = metadata["predictor"].replace('"rank": 90', '"rank": 9')
    else:
        del tensors["predictor.1.A"]
    with TensorWriter(tmp_path / "bad.svdp", tensors, metadata) as writer:
        for name in tensors:
            writer.write(name, arrays[name])
    with pytest.raises(ModelFileError, match="predictor"):
        svdengine.load(tmp_path / "bad.svdp", device="reference")


def test_bytes_of_the_sparse_path(llm: LLM) -> None:
    file, predictor = llm.model_file, llm.predictor
    assert predictor is not None
    whole = weight_bytes(file)
    assert sparse_weight_bytes(file, predictor, 1.0, 1.0) == whole + predictor_bytes(predictor)
    saved = whole - sparse_weight_bytes(file, None, 0.5, 0.25)
    assert saved == 0.5 * stored_bytes(file, "gate") + 0.75 * (stored_bytes(file, "up") + stored_bytes(file, "down_T"))
    neurons = 2 * llm.config.ffn_size
    assert bytes_per_token(llm, NeuronCounts(0, 0, 0), 10) == whole
    half = NeuronCounts(neurons, neurons, 5 * neurons)  # 5 of 10 tokens ran sparse
    expected = (whole + sparse_weight_bytes(file, predictor, 0.2, 0.2)) / 2
    assert bytes_per_token(llm, half, 10) == pytest.approx(expected)


def test_benchmark_of_both_paths(llm: LLM) -> None:
    rows = run_benchmark(llm, 0, 4, 2, paths=("dense", "sparse"), faults=True)
    assert [(row.test, row.ffn) for row in rows] == [("tg4", "dense"), ("tg4", "sparse")]
    assert rows[0].active_density is None and 0.4 < rows[1].active_density < 0.7  # type: ignore[operator]
    assert rows[1].bytes_per_token < rows[0].bytes_per_token + predictor_bytes(llm.predictor)  # type: ignore[arg-type]
    assert all(row.faults_per_token is not None and row.faults_per_token >= 0 for row in rows)
    assert llm.ffn == "sparse"


def test_benchmark_of_the_ffns_alone(tmp_path: Path) -> None:
    path = write_sparse_model(tmp_path / "m.svdp")
    with svdengine.load(path, device="cpu", context=128, threads=1) as llm:
        rows = run_benchmark(llm, 3, 4, 2, paths=("dense", "sparse"))
        assert [(row.test, row.ffn) for row in rows] == [
            (test, ffn) for test in ("pp3", "tg4", "ffn4") for ffn in ("dense", "sparse")
        ]
        dense, sparse = rows[4:]
        assert dense.bytes_per_token == ffn_bytes(llm.model_file) and dense.active_density is None
        assert sparse.active_density == pytest.approx(rows[3].active_density, abs=0.1)
        assert dense.speedup is None and sparse.speedup is not None and sparse.speedup > 0
        assert [row.test for row in run_benchmark(llm, 0, 4, 1)] == ["tg4"] and llm.ffn == "auto"
