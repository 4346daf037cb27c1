"""Mixtures of experts through conversion and calibration: folders, GGUF files, rounded weights, predictors, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo, gguf_checkpoint, gguf_config, gguf_fields, hf_checkpoint
from model_zoo import make_batch, random_tokens, random_weights, relative_error
from small_checkpoints import TOKENS, write_gguf, write_hf

import svdengine
from svdengine.converters import convert
from svdengine.converters.calibration import EXACT, CalibrationOptions, calibrate
from svdengine.converters.sized_conversion import Wish, convert_to_size
from svdengine.converters.weight_calibration import Quantizer, WeightCalibration
from svdengine.errors import ConversionError, DeviceError, ModelFileError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.model_writer import ModelWriter
from svdengine.files.predictor_file import write_model_with_predictor
from svdengine.files.residency import Room, read_by_every_token
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.formats import WeightFormat, dequantize
from svdengine.kernels.reference import ReferenceExecutor, float32_weights
from svdengine.measuring.benchmark import run_benchmark
from svdengine.measuring.memory_traffic import ffn_bytes, sparse_weight_bytes, weight_bytes
from svdengine.measuring.predictor_table import predictor_lines, predictor_report
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs
from svdengine.scheduling.block_pool import kv_read_bytes

CONFIG = replace(expert_zoo()["smallthinker"], vocab_size=len(TOKENS))
SETTINGS: dict[str, Any] = {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "vocab_size": CONFIG.vocab_size,
    "num_hidden_layers": CONFIG.layer_count,
    "moe_num_primary_experts": CONFIG.expert_count,
    "moe_num_active_primary_experts": CONFIG.active_experts,
    "moe_ffn_hidden_size": CONFIG.ffn_size,
    "rope_layout": [0, 1, 1],
    "sliding_window_layout": [0, 1, 1],
    "sliding_window_size": CONFIG.sliding_window,
    "tie_word_embeddings": True,
}


def hf_folder(folder: Path) -> Path:
    """A SmallThinker with a tokenizer."""
    return write_hf(folder, hf_checkpoint(CONFIG, random_weights(CONFIG)), **{**SETTINGS, "intermediate_size": None})


def write_model(path: Path, config: ModelConfig, weight_format: WeightFormat = "q8", seed: int = 0) -> ModelFile:
    weights = random_weights(config, seed)
    with ModelWriter(path, config, weight_format) as writer:
        for spec in tensor_specs(config):
            for index in range(spec.shape[0] if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][index] if spec.stacked else weights[spec.name], index)
    return read_model_file(path)


def test_a_folder_arrives(tmp_path: Path) -> None:
    convert(hf_folder(tmp_path / "hf"), tmp_path / "m.svdp", "f32")
    file = read_model_file(tmp_path / "m.svdp")
    assert file.config == CONFIG
    for name, w in random_weights(CONFIG).items():
        np.testing.assert_array_equal(file.arrays[name][..., : w.shape[-1]], w, err_msg=name)


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_the_router_keeps_float32_in_any_format(tmp_path: Path, dtype: WeightFormat) -> None:
    convert(hf_folder(tmp_path / "hf"), tmp_path / "m.svdp", dtype)
    with read_model_file(tmp_path / "m.svdp") as file:
        assert file.formats["router"] == "f32" and file.formats["gate"] == file.formats["down_T"] == dtype


def test_a_file_whose_router_has_another_format_is_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    with ModelWriter(tmp_path / "m.svdp", CONFIG, "f32", formats={"router": "f16"}) as writer:
        for spec in tensor_specs(CONFIG):
            for index in range(spec.shape[0] if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][index] if spec.stacked else weights[spec.name], index)
    with pytest.raises(ModelFileError, match="'router': found the format 'f16', expected 'f32'"):
        read_model_file(tmp_path / "m.svdp")


@pytest.mark.parametrize(("name", "architecture"), [("mixtral", "llama"), ("smallthinker", "smallthinker")])
def test_a_gguf_file_arrives_and_no_stack_is_read_whole(
    tmp_path: Path, name: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdengine.converters import gguf_file

    config = replace(gguf_config(name), vocab_size=len(TOKENS))
    weights = random_weights(config)
    fields = gguf_fields(config, architecture, {"expert_gating_func": 2} if name == "smallthinker" else {})
    del fields["general.architecture"]
    fields = {key: value for key, value in fields.items() if value is not None}
    if architecture != "llama":
        fields |= {key: None for key in llama_keys()}
    fields["llama.hidden_act"] = None
    write_gguf(tmp_path / "m.gguf", gguf_checkpoint(config, weights), architecture, **fields)
    most, read = 0, gguf_file.read_bytes

    def watched(path: Path, what: str, dtype: Any, count: int, offset: int) -> Any:
        nonlocal most
        if "_exps" in what:
            most = max(most, count)
        return read(path, what, dtype, count, offset)

    monkeypatch.setattr(gguf_file, "read_bytes", watched)
    convert(tmp_path / "m.gguf", tmp_path / "m.svdp", "f32")
    assert most == 4 * config.ffn_size * config.hidden_size
    with read_model_file(tmp_path / "m.svdp") as file:
        assert file.config == config
        for tensor, w in weights.items():
            np.testing.assert_array_equal(file.arrays[tensor][..., : w.shape[-1]], w, err_msg=tensor)


def llama_keys() -> list[str]:
    from small_checkpoints import gguf_fields as plain_fields

    return [key for key in plain_fields() if key.startswith("llama.")]


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    config = replace(gguf_config("mixtral"), vocab_size=len(TOKENS))
    fields = gguf_fields(config, "llama", {})
    fields |= {"llama.expert_count": 4, "llama.hidden_act": None}
    del fields["general.architecture"]
    tensors = gguf_checkpoint(config, random_weights(config))
    for layer in range(config.layer_count):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = tensors[f"blk.{layer}.ffn_gate_inp.weight"][:4]
    write_gguf(tmp_path / "m.gguf", tensors, **fields)
    with pytest.raises(ConversionError, match=r"ffn_gate_exps.*found the shape \(5, 70, 90\), expected a stack of 4"):
        convert(tmp_path / "m.gguf", tmp_path / "m.svdp", "f32")


def test_a_folder_without_one_of_the_experts_is_refused(tmp_path: Path) -> None:
    tensors = hf_checkpoint(CONFIG, random_weights(CONFIG))
    del tensors["model.layers.1.block_sparse_moe.experts.3.up.weight"]
    folder = write_hf(tmp_path / "hf", tensors, **SETTINGS, intermediate_size=None)
    with pytest.raises(ConversionError, match=r"lacks the tensor model\.layers\.1\.block_sparse_moe\.experts\.3\.up"):
        convert(folder, tmp_path / "m.svdp", "f32")


def quantised(config: ModelConfig, weight_format: WeightFormat, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """The weights of a random model after calibrated rounding."""
    weights = random_weights(config)
    result = {name: np.full_like(w, np.nan) for name, w in weights.items()}
    stacked = {spec.name: spec.stacked for spec in tensor_specs(config)}
    formats: dict[str, WeightFormat] = {spec.name: weight_format for spec in tensor_specs(config) if spec.matrix}
    formats["router"] = "f32"

    def place(name: str, index: int, array: np.ndarray) -> None:
        (result[name][index : index + 1] if stacked[name] else result[name][None])[...] = array

    Quantizer(
        config=config,
        formats=formats,
        read=lambda name, index: (weights[name][index] if stacked[name] else weights[name]).copy(),
        write=place,
        write_parts=lambda name, index, parts: place(
            name, index, dequantize(parts, formats[name], weights[name].shape[-1])
        ),
    ).run(windows)
    return result


@pytest.mark.parametrize("name", expert_zoo())
def test_what_is_rounded_for_is_what_the_reference_computes(name: str) -> None:
    """In f32 nothing is rounded, and all that there is arrives; the last layer's output is the model's."""
    config = expert_zoo()[name]
    windows = [random_tokens(config, 21, 1), random_tokens(config, 33, 3)]
    for tensor, array in quantised(config, "f32", windows).items():
        np.testing.assert_array_equal(array, random_weights(config)[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "qwen3_moe_dense"])
def test_calibrated_rounding_of_experts_loses_less(name: str) -> None:
    config = replace(expert_zoo()[name], ffn_size=96, hidden_size=96, head_dim=16, head_count=6, kv_head_count=3)
    windows = [random_tokens(config, 100, seed) for seed in range(16)]
    unseen = random_tokens(config, 60, 99)
    weights = random_weights(config)

    def logits(weights: dict[str, np.ndarray]) -> np.ndarray:
        return ReferenceExecutor(config, weights).forward(make_batch([(unseen, 0)], [[1, 2, 3, 4]]))

    exact = logits(weights)
    calibrated = np.square(logits(quantised(config, "q4", windows)) - exact).mean()
    arrays: dict[str, np.ndarray] = {}
    from svdengine.kernels.formats import quantize

    for spec in tensor_specs(config):
        w = weights[spec.name]
        if not spec.matrix or spec.name == "router":
            arrays[spec.name] = w
            continue
        rows = quantize(w.reshape(-1, w.shape[-1]), "q4")
        arrays[spec.name] = dequantize(rows, "q4", w.shape[-1]).reshape(w.shape)
    assert calibrated < 0.9 * np.square(logits(arrays) - exact).mean()


def test_q4_is_calibrated_by_convert(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello there, who is it? " * 200)
    found: list[tuple[str, int]] = []
    convert(
        hf_folder(tmp_path / "hf"),
        tmp_path / "m.svdp",
        "q4",
        calibration=WeightCalibration(1000, [text]),
        observe=lambda name, index, share: found.append((name, index)),
    )
    assert ("gate", CONFIG.ffn_blocks - 1) in found and ("down_T", 0) in found and not dict(found).get("router")
    with svdengine.load(tmp_path / "m.svdp", device="cpu", threads=1) as llm:
        assert np.isfinite(llm.logits([1, 5, 9, 30])).all()


def test_formats_are_chosen_for_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDENGINE_DEVICE", "reference")
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello there, who is it? " * 20)
    made = convert_to_size(
        hf_folder(tmp_path / "hf"), tmp_path / "m.svdp", Wish(bits=9.0), calibration=WeightCalibration(text=(text,))
    )
    assert "router" not in made.choice.formats and {"gate", "up", "down_T"} <= made.choice.formats.keys()
    with read_model_file(tmp_path / "m.svdp") as file:
        assert file.formats == {**made.choice.formats, "router": "f32"}


WINDOWS = [random_tokens(CONFIG, 64, seed) for seed in range(30)]


def executor_of(file: ModelFile) -> ReferenceExecutor:
    return ReferenceExecutor(CONFIG, float32_weights(CONFIG, file.arrays, file.formats), block_count=8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return write_model(tmp_path_factory.mktemp("model") / "m.svdp", CONFIG)


@pytest.fixture(scope="module")
def executor(file: ModelFile) -> ReferenceExecutor:
    return executor_of(file)


def test_experts_that_are_reached_get_one_and_others_run_exactly(file: ModelFile) -> None:
    executor = executor_of(file)
    router = executor.layers[1]["router"]
    router[[1, 2, 5]] = router[0]  # of four that are equal the first three are chosen at most
    found = calibrate(file, executor, WINDOWS, CalibrationOptions(kind="lowbit", bits=2, max_error=0.02))
    kinds = [row["kind"] for row in found.about["table"]]
    assert (
        len(found.layers) == CONFIG.ffn_blocks
        and kinds[7 + 5] == EXACT
        and kinds.count(EXACT) < 6
        and kinds.count("lowbit") > 12
    )
    for row, layer in zip(found.about["table"], found.layers, strict=True):
        if row["kind"] == EXACT:
            assert (layer.rank, layer.residual_bits) == (0, 0) and (layer.threshold < 0).all()
        else:
            assert 0.7 < row["auroc"] < 1 and row["relative_error"] < 0.1 and row["predicted_density"] < 0.9


def test_the_loss_of_the_whole_is_what_was_asked_for(file: ModelFile, executor: ReferenceExecutor) -> None:
    found = calibrate(file, executor, WINDOWS, CalibrationOptions(kind="lowbit", bits=2, max_loss=0.02))
    assert 0 < found.about["outcome"]["perplexity_rise"] <= 0.02 + 1e-6
    assert found.densities[0] < 0.95


def test_the_table_of_a_predictor_has_one_line_a_layer(file: ModelFile) -> None:
    options = CalibrationOptions(kind="lowbit", bits=2, max_error=0.02)
    report = predictor_report(calibrate(file, executor_of(file), WINDOWS, options), CONFIG)
    places = [(row["layer"], row["expert"]) for row in report["layers"]]
    assert places == [(layer, expert) for layer in range(3) for expert in range(7)]
    lines = predictor_lines(report)[-4:]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "total"]
    kilobytes = [float(line.split()[-1]) for line in lines]
    assert sum(kilobytes[:3]) == pytest.approx(kilobytes[3], abs=0.2)


def test_the_cpu_says_which_experts_its_rows_had(file: ModelFile, executor: ReferenceExecutor) -> None:
    batch = make_batch([(WINDOWS[0][:20], 0)], [[0, 1]])
    setup = ExecutorSetup(CONFIG, file.arrays, file.formats, block_count=8, max_batch_rows=64, kv_dtype="f32")
    cpu = CpuExecutor(setup, threads=2)
    fresh = ReferenceExecutor(CONFIG, float32_weights(CONFIG, file.arrays, file.formats), block_count=8)
    assert relative_error(cpu.ffn_inputs(batch), fresh.ffn_inputs(batch)) < 1e-2
    assert cpu.kept_experts is not None and fresh.kept_experts is not None
    assert (cpu.kept_experts == fresh.kept_experts).mean() > 0.98
    cpu.close()


def test_what_is_not_made_for_experts_is_refused(file: ModelFile, executor: ReferenceExecutor) -> None:
    with pytest.raises(ConversionError, match="predictor for each expert"):
        calibrate(file, executor, WINDOWS, CalibrationOptions(thresholds="greedy"))


def test_a_file_with_its_predictor_runs_sparse(file: ModelFile, executor: ReferenceExecutor) -> None:
    found = calibrate(file, executor, WINDOWS, CalibrationOptions(kind="lowbit", bits=2, max_error=0.02))
    path = file.path.with_name("sparse.svdp")
    write_model_with_predictor(path, file, found)
    with svdengine.load(path, device="cpu", threads=2, ffn="sparse") as llm:
        sparse = llm.logits(WINDOWS[0])
        done = llm.generate([WINDOWS[1][:9]], svdengine.SamplingParams(max_tokens=5, temperature=0.0))
        assert len(done[0].token_ids) == 5
        counts = llm.executor.neuron_counts()
        assert 0 < counts.active < counts.predicted < counts.total
        rows = run_benchmark(llm, 8, 4, 1, paths=("dense", "sparse", "exact"))
        assert {row.test for row in rows} == {"pp8", "tg4", "ffn4"}
        exact = next(row for row in rows if row.test == "tg4" and row.ffn == "exact")
        active = exact.active_density
        assert active is not None and 0 < active < 1 and exact.predicted_density == 1
        weights = sparse_weight_bytes(file, None, 1.0, active)  # no predictor is read
        scored = next(row for row in rows if row.test == "tg4" and row.ffn == "sparse")
        assert scored.predicted_density is not None and scored.active_density is not None
        shares = scored.predicted_density, scored.active_density
        expected = sparse_weight_bytes(file, llm.predictor, *shares)  # whichever path was measured last
        assert scored.bytes_per_token - kv_read_bytes(CONFIG, 2.5) == pytest.approx(expected, rel=1e-6)
        assert exact.bytes_per_token - kv_read_bytes(CONFIG, 2.5) == pytest.approx(weights, rel=1e-6)
        dense, sparse_row = (next(r for r in rows if r.test == "tg4" and r.ffn == ffn) for ffn in ("dense", "sparse"))
        assert sparse_row.predicted_density is not None and 0.2 < sparse_row.predicted_density < 1
        assert dense.predicted_density is None and dense.bytes_per_token > 0
    with svdengine.load(path, device="cpu", threads=2, ffn="dense") as llm:
        assert 0 < relative_error(sparse, llm.logits(WINDOWS[0])) < 0.5


def test_a_token_reads_the_experts_that_it_has(tmp_path: Path) -> None:
    with write_model(tmp_path / "m.svdp", CONFIG) as file:
        share = CONFIG.active_experts / CONFIG.expert_count
        rest = sum(array.nbytes for array in file.arrays.values()) - ffn_bytes(file)
        assert weight_bytes(file) == pytest.approx(rest + share * ffn_bytes(file), rel=1e-3)
        assert sparse_weight_bytes(file, None, 1.0, 0.0) < weight_bytes(file)
        rows = {"gate", "up", "down_T"}
        assert rows.isdisjoint(read_by_every_token(file, Room(whole=False, copies=False)))
        assert rows < set(read_by_every_token(file, Room(whole=True, copies=True)))


def test_experts_of_a_model_that_is_larger_than_memory_are_asked_for(tmp_path: Path) -> None:
    """What is asked for changes nothing; the early router asks before attention, the late one after it."""
    for name in ("smallthinker", "mixtral"):
        config = expert_zoo()[name]
        with write_model(tmp_path / f"{name}.svdp", config) as file:
            tokens, found = random_tokens(config, 12), []
            for gap in (None, 0, 1):
                setup = ExecutorSetup(config, file.arrays, file.formats, block_count=4, max_batch_rows=32)
                cpu = CpuExecutor(setup, threads=2)
                if gap is not None:
                    cpu.read_ahead(gap)
                cpu.forward(make_batch([(tokens[:-1], 0)], [[0]]))
                found.append(cpu.forward(make_batch([(tokens[-1:], 11)], [[0]])).copy())
                cpu.close()
            np.testing.assert_array_equal(found[0], found[1])
            np.testing.assert_array_equal(found[0], found[2])


def test_ascend_says_that_it_does_not_run_experts(tmp_path: Path) -> None:
    with (
        write_model(tmp_path / "m.svdp", CONFIG),
        pytest.raises(DeviceError, match=r"experts do not run on .* ascend"),
    ):
        svdengine.load(tmp_path / "m.svdp", device="ascend")
