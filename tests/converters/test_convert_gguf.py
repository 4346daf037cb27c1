"""Conversion of GGUF files: as from the Hugging Face folder of the same weights, and what is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import CONFIG, checkpoint_weights, gguf_fields, gguf_tensors, write_gguf, write_hf

from svdengine.converters import convert
from svdengine.converters.conversion import open_checkpoint
from svdengine.converters.gguf_file import read_gguf
from svdengine.errors import ConversionError, SvdEngineError
from svdengine.files.model_file import read_model_file

gguf = pytest.importorskip("gguf")

UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    return gguf_tensors(checkpoint_weights())


def test_same_as_the_folder(tmp_path: Path, tensors: dict[str, Any]) -> None:
    convert(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "gguf.svdp", "q8")
    convert(write_hf(tmp_path / "hf"), tmp_path / "hf.svdp", "q8")
    ours, other = read_model_file(tmp_path / "gguf.svdp"), read_model_file(tmp_path / "hf.svdp")
    assert ours.config.hidden_size == CONFIG.hidden_size
    assert ours.config.activation == other.config.activation
    assert ours.arrays.keys() == other.arrays.keys()
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)
    assert ours.tokenizer_bytes == other.tokenizer_bytes
    assert ours.chat_template == other.chat_template
    info = ours.tokenizer_info
    assert (info.bos_id, info.eos_id, info.eos_token_ids, info.add_bos) == (1, 2, (2,), False)
    assert info.special_tokens == other.tokenizer_info.special_tokens


def test_sampling_defaults(tmp_path: Path, tensors: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "tokenizer.chat_template": ""}
    convert(write_gguf(tmp_path / "m.gguf", tensors, **fields), tmp_path / "m.svdp")
    file = read_model_file(tmp_path / "m.svdp")
    assert file.generation == {"temperature": 0.5, "top_k": 20}
    assert file.chat_template is None


@pytest.mark.parametrize("kind", [k.name for k in gguf.GGMLQuantizationType])
def test_every_type_that_gguf_dequantises(tmp_path: Path, kind: str) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    data = np.random.default_rng(0).integers(0, 256, (3, 2 * size), dtype=np.uint8)
    if kind == "F32":
        data = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = write_gguf(tmp_path / "m.gguf", {"x": (data, quant)})
    file = read_gguf(path)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, quant)
    except NotImplementedError:
        with pytest.raises(ConversionError, match=f"'x' has type {kind}"):
            file.read("x")
        return
    found = file.read("x")
    assert found.dtype == np.float32
    assert found.shape == (3, 2 * block)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": ({"architecture": "bert"}, {}, "'bert' is not supported"),
    "no embedding": ({}, {"token_embd.weight": None}, "'token_embd.weight'"),
    "missing": ({}, {UP: None}, UP),
    "shape": ({}, {UP: np.zeros((7, 90), np.float32)}, rf"{UP}.*\(7, 90\).*expected \(150, 90\)"),
    "nan": ({}, {UP: np.full((150, 90), np.nan, np.float32)}, f"{UP}.*NaN"),
    "type": ({}, {UP: np.zeros((150, 90), np.int32)}, f"{UP}.*I32"),
    "split": ({"split.count": 2}, {}, r"one part of 2; .* must be named NAME-00001-of-00002\.gguf"),
    "split by text": ({"split.count": "2"}, {}, "split.count must be a whole number"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "new"}, {}, "'new' is not supported, only"),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, {}, "'t5' is not supported"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, {}, "no tokenizer"),
    "tokens": ({"tokenizer.ggml.tokens": [str(i) for i in range(301)]}, {}, "301 tokens, the embedding only 300"),
    "token types": ({"tokenizer.ggml.token_type": [1]}, {}, "token_type has 1 entries"),
    "merges": ({"tokenizer.ggml.merges": ["ab"]}, {}, "not a pair"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["xyz \u0120"]}, {}, "do not fit"),
    "scores": ({"tokenizer.ggml.model": "llama"}, {}, "scores has 0 entries"),
    "types of fields": ({"llama.block_count": "many"}, {}, "block_count"),
    "fields": ({"llama.block_count": None}, {}, "block_count"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_converted(tmp_path: Path, tensors: dict[str, Any], failure: str) -> None:
    fields, changes, message = FAILURES[failure]
    changed = {name: w for name, w in {**tensors, **changes}.items() if w is not None}
    path = write_gguf(tmp_path / "m.gguf", changed, **fields)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(path, tmp_path / "m.svdp")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["m.gguf"]  # noqa: PTH208


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_k.bias",
        "blk.2.post_attention_norm.weight",
        "blk.1.attn_sinks.weight",
        "blk.3.attn_norm.weight",
        "rope_factors_long.weight",
        "blk.0.ffn_gate_inp.weight",
        "output_norm.bias",
        "something.new",
    ],
)
def test_tensors_that_nothing_is_made_of_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Any], name: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**tensors, name: np.ones(90, np.float32)})
    with pytest.raises(ConversionError, match=re.escape(repr(name))):
        convert(path, tmp_path / "m.svdp")


def test_tensors_without_effect_are_taken(tmp_path: Path, tensors: dict[str, Any]) -> None:
    names = ("blk.0.attn_rot_embd.weight", "blk.1.ffn_up.input_scale", "blk.2.fc1.weight", "blk.2.fc2.weight")
    more = {name: np.ones(1, np.float32) for name in names}
    convert(write_gguf(tmp_path / "m.gguf", {**tensors, **more}), tmp_path / "m.svdp")


def test_scales_beside_matrices_are_applied(tmp_path: Path, tensors: dict[str, Any]) -> None:
    """As NVFP4 files have them: the matrix of the model is the stored one times one number."""
    scales = {"blk.1.ffn_up.scale": 0.5, "blk.0.attn_q.scale": 4.0, "output.scale": 2.0}
    more = {name: np.full(1, scale, np.float32) for name, scale in scales.items()}
    scaled = {
        **tensors,
        **{n.replace("scale", "weight"): tensors[n.replace("scale", "weight")] / s for n, s in scales.items()},
    }
    convert(write_gguf(tmp_path / "a.gguf", {**scaled, **more}), tmp_path / "a.svdp", "f32")
    convert(write_gguf(tmp_path / "b.gguf", tensors), tmp_path / "b.svdp", "f32")
    ours, other = read_model_file(tmp_path / "a.svdp"), read_model_file(tmp_path / "b.svdp")
    for name, array in other.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], array, err_msg=name)
    more["blk.1.ffn_up.scale"] = np.ones(150, np.float32)
    with pytest.raises(ConversionError, match="must be one number"):
        convert(write_gguf(tmp_path / "c.gguf", {**scaled, **more}), tmp_path / "c.svdp", "f32")


def write_parts(folder: Path, tensors: dict[str, Any], count: int = 3, **first: Any) -> list[Path]:
    """A split file as llama-gguf-split writes it: fields in the first part, tensors in all."""
    names, nothing = list(tensors), dict.fromkeys(gguf_fields())
    paths = []
    for number in range(count):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        held = {name: tensors[name] for name in names[number::count]}
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        paths.append(write_gguf(path, held, **({**split, **first} if number == 0 else {**nothing, **split})))
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_a_file_in_parts(tmp_path: Path, tensors: dict[str, Any], given: int) -> None:
    paths = write_parts(tmp_path, tensors)
    convert(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "whole.svdp", "q8")
    convert(paths[given], tmp_path / "parts.svdp", "q8")
    whole, parts = read_model_file(tmp_path / "whole.svdp"), read_model_file(tmp_path / "parts.svdp")
    assert whole.config == parts.config and whole.tokenizer_bytes == parts.tokenizer_bytes
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, parts.arrays[name], err_msg=name)
    listed = [file["name"] for file in json.loads(parts.metadata["provenance"])["files"]]
    assert listed == [path.name for path in paths]
    with pytest.raises(ConversionError, match="would replace the checkpoint"):
        convert(paths[0], paths[1])


def test_parts_that_do_not_fit(tmp_path: Path, tensors: dict[str, Any]) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(ConversionError, match=message):
            convert(path, tmp_path / "m.svdp")

    paths = write_parts(tmp_path, tensors)
    paths[0].rename(tmp_path / "other.gguf")
    refused("must be named", tmp_path / "other.gguf")
    refused(r"'m-00001-of-00003\.gguf' is missing", paths[1])
    (tmp_path / "other.gguf").rename(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    refused("says that it is part 2 of 3, expected 1", paths[0])
    paths[1].write_bytes(b"GGUF")
    refused(r"m-00002-of-00003\.gguf: truncated", paths[0])
    refused("tensors, expected 500", write_parts(tmp_path, tensors, **{"split.tensors.count": 500})[0])


def test_a_merged_file_is_whole(tmp_path: Path, tensors: dict[str, Any]) -> None:
    convert(write_gguf(tmp_path / "m.gguf", tensors, **{"split.count": 0, "split.no": 0}), tmp_path / "m.svdp")


def test_sampling_defaults_that_no_model_file_can_hold_are_left_out(tmp_path: Path, tensors: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"general.sampling.temp": float("nan"), "general.sampling.top_p": float("inf")}
    fields |= {"general.sampling.min_p": 0.5, "general.sampling.top_k": "many"}
    convert(write_gguf(tmp_path / "m.gguf", tensors, **fields), tmp_path / "m.svdp")
    assert read_model_file(tmp_path / "m.svdp").generation == {"min_p": 0.5}


def test_damaged_files(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors)
    data = path.read_bytes()
    for damaged, message in (
        (data[:-1000], "truncated: tensor"),
        (data[:100], "truncated or damaged"),
        (b"", "truncated"),
        (b"ABCD" + data[4:], "neither a folder nor a GGUF"),
        (b"PWRI" + data[4:], "calibrate --predictor powerinfer --from this"),
        (data[:4] + b"\x00\x00\x00\x03" + data[8:], "version 50331648 is not supported"),
        (data[:8] + b"\xff" * 8 + data[16:], "truncated or damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match=message):
            convert(path, tmp_path / "m.svdp")


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'svdengine\[convert\]'"):
        convert(tmp_path / "m.gguf", tmp_path / "m.svdp")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_random_damage(tmp_path: Path, tensors: dict[str, Any], data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        write_gguf(path, {"token_embd.weight": tensors["token_embd.weight"]})
        (tmp_path / "original").write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / "original").read_bytes())
    end = len(damaged) - tensors["token_embd.weight"].nbytes
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    try:
        open_checkpoint(tmp_path / "damaged.gguf")
    except SvdEngineError as error:
        assert "\n" not in str(error)
