"""docs/format.md is enough to read a model file: this reader knows what stands there, and nothing of svdengine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import random_weights
from tiny_model import tiny_config, write_tiny_model

from svdengine.files.model_writer import ModelWriter
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.models.tensors import tensor_specs

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}
FORMAT_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I8": "q8", "U8": "q4"}  # in version 1

Tensors = Mapping[str, np.ndarray]


def read(path: Path) -> tuple[dict[str, str], dict[str, Any], Tensors]:
    """Metadata, entries and tensors."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, end = (begin + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, header, tensors


def weights(tensors: Tensors, name: str, weight_format: str, columns: int) -> np.ndarray:
    """A matrix as float32, by the section "Weight formats"."""
    data = tensors[name]
    if weight_format == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)[..., :columns]
    if weight_format in ("f32", "f16"):
        return data.astype(np.float32)[..., :columns]
    scale = np.repeat(tensors[f"{name}.scale"].astype(np.float32), 32, -1)
    if weight_format == "q8":
        return (scale * data)[..., :columns]
    assert weight_format in ("q4", "q6", "ternary"), f"docs/format.md does not describe {weight_format}"
    row = tensors[f"{name}.row"]
    if weight_format == "ternary":
        q = np.stack([data.reshape(*data.shape[:-1], -1, 16) >> shift & 3 for shift in (0, 2, 4, 6)], -2)
        return (row[..., :1] * (q.reshape(*data.shape[:-1], -1) - 1.0))[..., :columns].astype(np.float32)
    low = np.repeat(tensors[f"{name}.min"].astype(np.float32), 32, -1)
    of_64 = data.reshape(*data.shape[:-1], -1, 32 if weight_format == "q4" else 48)
    q = halves(of_64[..., :32])
    if weight_format == "q6":
        upper = np.concatenate([of_64[..., 32:] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
        q = q + 16.0 * upper.reshape(*data.shape[:-1], -1)
    return (row[..., :1] * scale * q - row[..., 1:] * low)[..., :columns].astype(np.float32)


def halves(packed: np.ndarray) -> np.ndarray:
    """Of every 32 bytes the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-2], -1)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_the_page_is_enough_to_read_weights(weight_format: WeightFormat, tmp_path: Path) -> None:
    config, error = (
        tiny_config(hidden_size=96),
        {"q8": 0.01, "q6": 0.04, "q4": 0.12, "ternary": 0.5}.get(weight_format, 0.005),
    )
    written = random_weights(config)
    with ModelWriter(tmp_path / "m.svdp", config, weight_format) as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, written[spec.name][layer] if spec.stacked else written[spec.name], layer)
    metadata, entries, tensors = read(tmp_path / "m.svdp")
    formats = json.loads(metadata.get("formats", "{}"))
    matrices = [spec.name for spec in tensor_specs(config) if spec.matrix]
    assert metadata["format_version"] == "1" or set(formats) == set(matrices)
    for spec in tensor_specs(config):
        if spec.matrix:
            found = formats.get(spec.name) or FORMAT_OF_DTYPE[entries[spec.name]["dtype"]]
            w = weights(tensors, spec.name, found, spec.shape[-1])
            assert np.abs(w - written[spec.name]).max() <= error * np.abs(written[spec.name]).max()
        else:
            np.testing.assert_array_equal(tensors[spec.name], written[spec.name])


def test_a_file_keeps_to_the_page(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.svdp")
    metadata, entries, tensors = read(path)
    table = PAGE.partition("## Metadata")[2].partition("**Version 1**")[0]
    described = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert set(metadata) <= described and described - set(metadata) <= {"formats", "predictor"}
    begin, end = 8 + int.from_bytes(path.read_bytes()[:8], "little"), 0
    assert begin % 4096 == 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry["data_offsets"][0] == end
        assert end % 64 == 0 or name.startswith("__pad.")
        end = entry["data_offsets"][1]
        assert not name.startswith("__pad.") or (entry["dtype"] == "U8" and tensors[name].size < 64)
    assert begin + end == path.stat().st_size
    assert tensors["chat_template"].tobytes().decode("utf-8").startswith("{% for")


def test_every_tensor_of_a_model_is_in_the_table(tmp_path: Path) -> None:
    table = PAGE.partition("## Tensors")[2].partition("## Weight formats")[0]
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| (`.*)$", table, flags=re.MULTILINE)]
    named = {name.partition(".")[0] for cell in cells for name in re.findall(r"`(\w[\w.]*)`", cell)}
    everything = tiny_config(
        qkv_bias=True, output_bias=True, ffn_bias=True, qk_norm=True, post_norms=True, tied_embeddings=False
    )
    experts = tiny_config(expert_count=4, active_experts=2)
    for config in (everything, tiny_config(sub_norms=True), experts):
        assert {spec.name.partition(".")[0] for spec in tensor_specs(config)} <= named
