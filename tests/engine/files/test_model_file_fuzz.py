"""Random damage to a model file: it is refused with ModelFileError, or it is still a valid file."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import random_weights, zoo

from svdengine.errors import ModelFileError
from svdengine.files.model_file import read_model_file, stored_tensors
from svdengine.files.model_writer import ModelWriter, StoredTokenizer
from svdengine.models.tensors import tensor_specs
from svdengine.text.tokenizer_info import TokenizerInfo

FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = zoo()["llama_relu_tied"]
    path = tmp_path_factory.mktemp("fuzz") / "m.svdp"
    weights = random_weights(config)
    tokenizer = StoredTokenizer(TokenizerInfo("tokenizer.json", bos_id=1), b"{}" * 100, "template")
    with ModelWriter(path, config, "q4", tokenizer) as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
    return path.read_bytes()


def check(path: Path, data: bytes) -> None:
    """Refused, or every array is what the config says and can be read to its end."""
    path.write_bytes(data)
    try:
        file = read_model_file(path)
    except ModelFileError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return
    with file:
        for spec in tensor_specs(file.config):
            for name, (shape, _) in stored_tensors(spec, file.formats.get(spec.name, "f32")).items():
                assert file.arrays[name].shape == shape
        for array in file.arrays.values():
            array.tobytes()


@FUZZ
@given(data=st.data())
def test_truncated(tmp_path: Path, original: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(original) - 1))
    (tmp_path / "t.svdp").write_bytes(original[:length])
    with pytest.raises(ModelFileError):
        read_model_file(tmp_path / "t.svdp")


@FUZZ
@given(data=st.data())
def test_bits_flipped_in_the_header(tmp_path: Path, original: bytes, data: st.DataObject) -> None:
    end = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check(tmp_path / "b.svdp", bytes(damaged))


@FUZZ
@given(length=st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1)))
def test_any_header_length(tmp_path: Path, original: bytes, length: int) -> None:
    check(tmp_path / "l.svdp", length.to_bytes(8, "little") + original[8:])


NUMBER = st.one_of(st.integers(-2, 200_000), st.integers(), st.booleans(), st.none(), st.floats(), st.text(max_size=3))
VALUE = st.recursive(NUMBER, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))


@FUZZ
@given(data=st.data())
def test_any_value_in_the_header(tmp_path: Path, original: bytes, data: st.DataObject) -> None:
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if name == "__metadata__":
        key = data.draw(st.sampled_from(["config", "tokenizer", "generation"]))
        content = json.loads(header[name][key])
        content[data.draw(st.sampled_from(sorted(content) or ["temperature"]))] = data.draw(VALUE)
        header[name][key] = json.dumps(content)
    else:
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if field != "dtype" and data.draw(st.booleans()):
            header[name][field][0] = data.draw(NUMBER)
        else:
            header[name][field] = data.draw(VALUE)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    check(tmp_path / "v.svdp", len(text).to_bytes(8, "little") + text + original[8 + length :])


@FUZZ
@given(data=st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    check(tmp_path / "a.svdp", data)
