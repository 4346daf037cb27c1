"""The model file: what is written is read back, and a file that breaks any rule is refused."""

import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import random_weights, zoo

from svdengine.errors import ModelFileError
from svdengine.files import model_file
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.model_writer import ModelWriter, StoredTokenizer, format_for
from svdengine.files.tensor_writer import TensorWriter
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat, dequantize, gather_parts, quantize
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs
from svdengine.text.tokenizer_info import TokenizerInfo

CONFIG = replace(zoo()["llama_relu_biases"], layer_count=3)
TOKENIZER = StoredTokenizer(
    TokenizerInfo("tokenizer.json", bos_id=1, eos_id=2, eos_token_ids=(2, 0), add_bos=True, special_tokens={"</s>": 2}),
    b'{"any": "bytes"}',
    "{{ messages }} \u00fc",
)


def write(path: Path, config: ModelConfig = CONFIG, dtype: WeightFormat = "q8", **options: Any) -> dict[str, Any]:
    weights, tokenizer = random_weights(config), options.pop("tokenizer", TOKENIZER)
    with ModelWriter(path, config, dtype, tokenizer, {"temperature": 0.5}, {"source": "x"}, **options) as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
        for name, (shape, _) in options.get("extra", {}).items():
            writer.write_raw(name, np.ones(shape, np.float32))
    return weights


def parts_of(file: ModelFile, name: str, layer: int | None) -> dict[str, Any]:
    found = gather_parts(file.arrays, name)
    return found if layer is None else {suffix: part[layer] for suffix, part in found.items()}


def edit_header(path: Path, change: Any) -> None:
    """Rewrite the header of a file; the data stays."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (0 if isinstance(header, bytes) else -(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_metadata(path: Path, key: str, change: Any) -> None:
    def edit(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][key])
        value = change(value) or value
        header["__metadata__"][key] = json.dumps(value)

    edit_header(path, edit)


@pytest.mark.parametrize("dtype", WEIGHT_FORMATS)
@pytest.mark.parametrize("name", ["llama_relu_biases", "llama", "qwen3", "opt", "falcon_40b"])
def test_round_trip(tmp_path: Path, dtype: WeightFormat, name: str) -> None:
    config, path = zoo()[name], tmp_path / "m.svdp"
    weights = write(path, config, dtype)
    with read_model_file(path) as file:
        assert file.config == config
        assert file.formats == {s.name: format_for(s.name, dtype) for s in tensor_specs(config) if s.matrix}
        for spec in tensor_specs(config):
            if not spec.matrix:
                np.testing.assert_array_equal(file.arrays[spec.name], weights[spec.name])
                continue
            for layer in range(config.layer_count) if spec.stacked else [None]:
                w = weights[spec.name] if layer is None else weights[spec.name][layer]
                weight_format = file.formats[spec.name]
                expected = dequantize(quantize(w, weight_format), weight_format, w.shape[1])
                found = dequantize(parts_of(file, spec.name, layer), weight_format, w.shape[1])
                np.testing.assert_array_equal(found, expected)


def test_everything_else_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "m.svdp")
    file = read_model_file(str(tmp_path / "m.svdp"))
    assert file.tokenizer_info == TOKENIZER.info
    assert file.tokenizer_bytes == TOKENIZER.data
    assert file.chat_template == TOKENIZER.chat_template
    assert file.generation == {"temperature": 0.5}
    assert json.loads(file.metadata["provenance"]) == {"source": "x"}
    assert file.size_bytes == (tmp_path / "m.svdp").stat().st_size
    for array in file.arrays.values():
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0
    kept = file.arrays["q"]
    before = kept.copy()
    file.close()
    assert not file.arrays
    np.testing.assert_array_equal(kept, before)  # a view that is still held stays valid


def test_safetensors_opens_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    for dtype in ("f32", "f16", "q8", "q4"):
        write(tmp_path / "m.svdp", dtype=dtype)
        file = read_model_file(tmp_path / "m.svdp")
        with safetensors.safe_open(tmp_path / "m.svdp", "np") as other:
            names = {name for name in other.keys() if not name.startswith("__pad.")}  # noqa: SIM118
            assert names == {*file.arrays, "tokenizer.json", "chat_template"}
            assert other.metadata() == dict(file.metadata)
            for name, array in file.arrays.items():
                np.testing.assert_array_equal(other.get_tensor(name), array)


def test_predictor_tensors_are_exposed(tmp_path: Path) -> None:
    write(tmp_path / "m.svdp", extra={"predictor.u": ((2, 5), "F32")}, metadata={"predictor": "{}"})
    file = read_model_file(tmp_path / "m.svdp")
    np.testing.assert_array_equal(file.arrays["predictor.u"], np.ones((2, 5)))
    assert file.metadata["predictor"] == "{}"


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 of"), ModelWriter(tmp_path / "m.svdp", CONFIG, "f32"):
        pass
    weights = random_weights(CONFIG)
    with ModelWriter(tmp_path / "m.svdp", CONFIG, "f32") as writer:
        for spec in tensor_specs(CONFIG):
            for layer in range(CONFIG.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
    file = read_model_file(tmp_path / "m.svdp")
    assert (file.tokenizer_info.kind, file.tokenizer_bytes, file.chat_template) == ("none", b"", None)


def test_a_tokenizer_is_compressed(tmp_path: Path) -> None:
    plain = b'{"any": "bytes"}' * 1000
    write(tmp_path / "m.svdp", tokenizer=replace(TOKENIZER, data=plain))
    file = read_model_file(tmp_path / "m.svdp")
    assert file.tokenizer_bytes == plain
    write(tmp_path / "short.svdp")
    assert file.size_bytes < (tmp_path / "short.svdp").stat().st_size + 500


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-9],
        lambda data: data[:20] + b"xyz" + data[23:],
        lambda data: data + b"more",
        lambda _: gzip.compress(b"x" * 5001),
    ],
)
def test_a_compressed_tokenizer_that_is_damaged_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(model_file, "_MOST_TOKENIZER_BYTES", 5000)
    data = gzip.compress(np.random.default_rng(0).bytes(4000))
    path = tmp_path / "m.svdp"
    write(path, tokenizer=replace(TOKENIZER, data=data))
    assert len(read_model_file(path).tokenizer_bytes) == 4000
    write(path, tokenizer=replace(TOKENIZER, data=change(data)))
    with pytest.raises(ModelFileError, match="the compressed tokenizer is"):
        read_model_file(path)


def test_q4_keeps_embeddings_at_8_bits() -> None:
    assert [format_for(n, "q4") for n in ("embedding", "lm_head", "gate", "position_embedding")] == [
        *("q8", "q8", "q4", "f32")
    ]
    assert format_for("position_embedding", "f16") == "f32"
    assert [format_for(n, "q8", "q4") for n in ("embedding", "lm_head", "up")] == ["q4", "q4", "q8"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ModelFileError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "m.svdp").write_bytes(b"the old file")
    with pytest.raises(error), ModelWriter(tmp_path / "m.svdp", CONFIG, "q8") as writer:
        writer.write("output_norm.weight", np.ones(CONFIG.hidden_size, np.float32))
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["m.svdp"]
    assert (tmp_path / "m.svdp").read_bytes() == b"the old file"


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svdengine.files.tensor_writer.os.posix_fallocate", full, raising=False)
    with pytest.raises(ModelFileError, match=r"no room for .* MB"):
        ModelWriter(tmp_path / "m.svdp", CONFIG, "q8")
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        ModelWriter(tmp_path / "none" / "m.svdp", CONFIG, "q8")
    with pytest.raises(ModelFileError, match="directory"):
        ModelWriter(tmp_path, CONFIG, "q8")


def test_wrong_data_is_not_written(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "t", {"x": ((2, 3), "F32")}, {}) as writer:
        with pytest.raises(ValueError, match="F32"):
            writer.write("x", np.zeros((2, 3)))
        with pytest.raises(ValueError, match="no room"):
            writer.write("x", np.zeros(6, np.float32), 1)
        writer.write("x", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="NaN"), ModelWriter(tmp_path / "m", CONFIG, "q8") as model:
        model.write("output_norm.weight", np.full(CONFIG.hidden_size, np.nan, np.float32))
    with pytest.raises(ValueError, match="expected"), ModelWriter(tmp_path / "m", CONFIG, "q8") as model:
        model.write("q", np.zeros((1, 1), np.float32))


def edit_formats(header: dict[str, Any], **changes: Any) -> None:
    formats = {**json.loads(header["__metadata__"]["formats"]), **changes}
    header["__metadata__"]["formats"] = json.dumps({k: v for k, v in formats.items() if v is not None})


def as_version_1(header: dict[str, Any]) -> None:
    header["__metadata__"].pop("formats")
    header["__metadata__"]["format_version"] = "1"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8", "q4"])
def test_files_of_the_first_version_are_read(tmp_path: Path, dtype: WeightFormat) -> None:
    path = tmp_path / "m.svdp"
    write(path, dtype=dtype)
    with read_model_file(path) as file:
        formats, gate = dict(file.formats), file.arrays["gate"].copy()
    edit_header(path, as_version_1)
    with read_model_file(path) as file:
        assert dict(file.formats) == formats
        np.testing.assert_array_equal(file.arrays["gate"], gate)


def test_the_first_version_had_one_format_a_dtype(tmp_path: Path) -> None:
    path = tmp_path / "m.svdp"
    write(path, dtype="q6")
    edit_header(path, as_version_1)
    with pytest.raises(ModelFileError, match=r"'q': found U8 .* expected U8"):  # as if it were q4
        read_model_file(path)
    edit_header(path, lambda h: h["gate"].update(dtype="BOOL"))
    with pytest.raises(ModelFileError, match="found BOOL, expected one of"):
        read_model_file(path)


HEADER_EDITS: dict[str, tuple[Any, str]] = {
    "missing": (lambda h: {k: v for k, v in h.items() if k != "up.scale"}, "hole|missing"),
    "renamed": (lambda h: {("upp" if k == "up" else k): v for k, v in h.items()}, "'up' is missing"),
    "unexpected": (lambda h: {("extra" if k == "chat_template" else k): v for k, v in h.items()}, "'extra' is unexp"),
    "dtype": (lambda h: h["gate"].update(dtype="U8"), "'gate"),
    "unknown dtype": (lambda h: h["gate"].update(dtype="Q1"), "unknown dtype"),
    "integer weights": (lambda h: h["gate"].update(dtype="BOOL"), "'gate': found BOOL .* expected I8"),
    "shape": (lambda h: h["gate"].update(shape=h["gate"]["shape"][::-1]), "'gate': found I8 .* expected I8"),
    "negative": (lambda h: h["gate"].update(shape=[-1, -1, *h["gate"]["shape"]]), "whole numbers"),
    "boolean": (lambda h: h["gate"].update(shape=[True, *h["gate"]["shape"]]), "whole numbers"),
    "float": (lambda h: h["gate"].update(data_offsets=[0.0, 1.0]), "whole numbers"),
    "huge": (lambda h: h["gate"].update(shape=[1 << 40, 1 << 40]), "too large"),
    "zero and huge": (lambda h: h["gate"].update(shape=[0, 1 << 47, 1 << 47]), "too large"),
    "beyond": (lambda h: h["chat_template"].update(data_offsets=[1 << 40, (1 << 40) + 17]), "hole"),
    "an end of many digits": (lambda h: h["up"].update(data_offsets=[0, 10**400]), "too large"),
    "overlap": (lambda h: h["up"].update(data_offsets=h["gate"]["data_offsets"]), "overlaps|hole"),
    "extra key": (lambda h: h["up"].update(more=1), "exactly dtype"),
    "not an object": (lambda h: h.update(up=3), "exactly dtype"),
    "metadata": (lambda h: h.update(__metadata__={"format": 1}), "strings to strings"),
    "no metadata": (lambda h: h.pop("__metadata__") and h, "svdengine convert"),
    "version": (lambda h: h["__metadata__"].update(format_version="3"), "has format version '3'.*reads '1' and '2'"),
    "formats gone": (lambda h: h["__metadata__"].pop("formats") and h, "lacks 'formats'"),
    "formats list": (lambda h: h["__metadata__"].update(formats="[]"), "JSON object"),
    "a format left out": (lambda h: edit_formats(h, gate=None), "'formats' lacks 'gate'"),
    "a format of nothing": (lambda h: edit_formats(h, output="q8"), "'formats' has no use for 'output'"),
    "a format of later": (lambda h: edit_formats(h, gate="q5"), "'gate': found the format 'q5', this svdengine reads"),
    "a format that is none": (lambda h: edit_formats(h, gate=["q8"]), "found the format"),
    "another format": (lambda h: edit_formats(h, gate="q6"), "'gate': found I8 .* expected U8"),
    "config gone": (lambda h: h["__metadata__"].pop("config") and h, "lacks 'config'"),
    "config text": (lambda h: h["__metadata__"].update(config="{"), "'config'"),
    "config list": (lambda h: h["__metadata__"].update(config="[]"), "JSON object"),
    "nested": (lambda h: h["__metadata__"].update(config="[" * 100_000), "nested too deeply|'config'"),
    "infinite": (lambda h: h["__metadata__"].update(generation='{"temperature": Infinity}'), "not a JSON number"),
    "too large": (lambda h: h["__metadata__"].update(generation='{"temperature": 1e999}'), "too large"),
    "many digits": (lambda h: h["__metadata__"].update(generation=f'{{"top_k": {10**400}}}'), "too large"),
    "beyond 64 bits": (lambda h: h["__metadata__"].update(generation=f'{{"top_k": {1 << 63}}}'), "too large"),
    "more digits than Python reads": (lambda h: h["__metadata__"].update(config="[" + "9" * 5000 + "]"), "too large"),
    "tokenizer gone": (lambda h: {("predictor.t" if k == "tokenizer.json" else k): v for k, v in h.items()}, "no tok"),
    "alignment": (lambda h: json.dumps(h).encode().ljust(1 << 16) + b" ", "not a multiple of 64"),
    "not json": (lambda h: b"{nonsense}", "not valid JSON"),
    "not an object at all": (lambda h: b"[1, 2]", "not a JSON object"),
    "not utf-8": (lambda h: b'{"\xff": 1}', "not valid JSON"),
    "duplicate": (lambda h: json.dumps(h).replace('"up.scale"', '"up"').encode(), "'up' occurs twice"),
}


@pytest.mark.parametrize("edit", HEADER_EDITS)
def test_a_header_that_breaks_a_rule(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "m.svdp"
    write(path)
    change, message = HEADER_EDITS[edit]
    edit_header(path, change)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_model_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("config", lambda c: c.update(hidden_size=91), "found .* expected"),
        ("config", lambda c: c.update(layer_count=10**9), "layer_count"),
        ("config", lambda c: c.update(vocab_size="119"), "vocab_size"),
        ("config", lambda c: c.update(embedding_scale=10**400), "too large"),
        ("config", lambda c: c.update(norm_eps=-(10**400)), "too large"),
        ("config", lambda c: c.update(sliding_window=1 << 40), "sliding_window"),
        ("tokenizer", lambda t: t.update(bos_id=10**400), "too large"),
        ("config", lambda c: c.update(vocab_size=1 << 24, hidden_size=1 << 24), "expected"),
        ("config", lambda c: c.update(unknown=1), "unknown"),
        ("tokenizer", lambda t: t.update(bos_id=CONFIG.vocab_size), "token id"),
        ("tokenizer", lambda t: t.update(eos_token_ids=[True]), "token id"),
        ("tokenizer", lambda t: t.update(eos_token_ids=3), "list"),
        ("tokenizer", lambda t: t.update(special_tokens={"x": -1}), "token id"),
        ("tokenizer", lambda t: t.update(special_tokens=[]), "special_tokens"),
        ("tokenizer", lambda t: t.update(kind="tokenizer.model"), "found tokenizer.json"),
        ("tokenizer", lambda t: t.update(kind=[]), "unknown kind"),
        ("tokenizer", lambda t: t.update(add_bos=1), "true or false"),
        ("tokenizer", lambda t: t.update(more=1), "fields"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, key: str, change: Any, message: str) -> None:
    path = tmp_path / "m.svdp"
    write(path)
    edit_metadata(path, key, lambda value: value)
    read_model_file(path).close()
    edit_metadata(path, key, change)
    with pytest.raises(ModelFileError, match=message):
        read_model_file(path)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    cases = {"x.gguf": (b"GGUF\x03", "svdengine convert"), "x.pt": (b"PK\x03\x04", "zip"), "e": (b"", "truncated")}
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=message):
            read_model_file(tmp_path / name)
    with pytest.raises(ModelFileError, match="is a folder"):
        read_model_file(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="svdengine convert"):
        read_model_file(tmp_path)
    with pytest.raises(ModelFileError, match="No such file"):
        read_model_file(tmp_path / "none")
    with pytest.raises(ModelFileError):
        read_model_file("nul\0byte")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_model_file(tmp_path / "pipe")


def test_space_that_cannot_be_reserved_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("svdengine.files.tensor_writer.os.posix_fallocate", unsupported, raising=False)
    write(tmp_path / "m.svdp")
    read_model_file(tmp_path / "m.svdp").close()
