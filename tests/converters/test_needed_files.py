"""What of a repository is downloaded."""

import json
from pathlib import Path

import pytest

from svdengine.converters.needed_files import gguf_files, is_folder, settings_files, weight_files
from svdengine.errors import ConversionError
from svdengine.files.hub_name import HubName

TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
OTHERS = ["README.md", ".gitattributes", "flax_model.msgpack", "tf_model.h5", "logo.png", "onnx/model.onnx",
          "consolidated.safetensors", "original/params.json", "training_args.bin"]  # fmt: skip


def index(folder: Path, name: str, *shards: str) -> None:
    (folder / name).write_text(json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}))


def needed(files: list[str], folder: Path) -> set[str]:
    assert is_folder(files)
    return {*settings_files(files), *weight_files(files, folder)}


def test_one_file(tmp_path: Path) -> None:
    files = [*TEXTS, *OTHERS, "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert needed(files, tmp_path) == {*TEXTS, "model.safetensors"}


def test_shards_of_the_index_and_no_others(tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index(tmp_path, "model.safetensors.index.json", *shards, shards[0])
    files = [*TEXTS, *OTHERS, *shards, "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert needed(files, tmp_path) == {*TEXTS, *shards, "model.safetensors.index.json"}
    with pytest.raises(ConversionError, match=r"names the file 'model-00002-of-00002\.safetensors', which the rep"):
        weight_files([file for file in files if file != shards[1]], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="expected a weight_map"):
        weight_files(files, tmp_path)


def test_pickles_when_there_is_nothing_else(tmp_path: Path) -> None:
    index(tmp_path, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin")
    files = [*TEXTS, *OTHERS, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]
    assert needed(files, tmp_path) == {*TEXTS, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"}
    assert needed([*TEXTS, *OTHERS, "pytorch_model.bin"], tmp_path) == {*TEXTS, "pytorch_model.bin"}


@pytest.mark.parametrize("files", [OTHERS, ["model.safetensors"], TEXTS, ["config.json", "a.gguf"]])
def test_what_is_no_folder(files: list[str]) -> None:
    assert not is_folder(files)


GGUF = {"m-Q4_K_M.gguf": 40, "m-Q4_K_S.gguf": 35, "m-IQ4_K.gguf": 30, "sub/m-f16-00001-of-00002.gguf": 90,
        "sub/m-f16-00002-of-00002.gguf": 70, "mmproj-m-f16.gguf": 10, "README.md": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("Q4_K_S", ["m-Q4_K_S.gguf"]),
        ("f16", ["sub/m-f16-00001-of-00002.gguf", "sub/m-f16-00002-of-00002.gguf"]),
        ("m-f16-00001-of-00002.gguf", ["sub/m-f16-00001-of-00002.gguf", "sub/m-f16-00002-of-00002.gguf"]),
    ],
)
def test_a_gguf_file(wanted: str, expected: list[str]) -> None:
    assert gguf_files(GGUF, HubName("org/m", wanted)) == expected


def test_the_only_gguf_file() -> None:
    assert gguf_files({"a.gguf": 5, "mmproj.gguf": 3, "config.json": 1}, HubName("org/m")) == ["a.gguf"]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            HubName("org/m", None, "v2"),
            GGUF,
            r"org/m@v2 has 4 GGUF files; name one, such as org/m:m-IQ4_K.gguf@v2: m-IQ4_K.gguf \(0.0 MB\), ",
        ),
        (HubName("org/m", "Q8"), GGUF, "org/m: no GGUF file is like 'Q8'; name one, such as org/m:m-IQ4_K.gguf"),
        (HubName("org/m", "q4_k_"), GGUF, "org/m: 2 GGUF files are like 'q4_k_'"),
        (HubName("org/m", "x"), {"model.safetensors": 1}, "org/m has no GGUF file; where it is a checkpoint folder"),
        (HubName("org/m"), {"a.onnx": 1, "b.md": 2}, r"expected model.safetensors or a .gguf file, found .md, .onnx"),
    ],
)
def test_choices_are_listed(name: HubName, files: dict[str, int], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        gguf_files(files, name)


def test_long_lists_are_cut() -> None:
    with pytest.raises(ConversionError, match=r"and 8 more$"):
        gguf_files({f"{i}.gguf": i for i in range(20)}, HubName("org/m"))
