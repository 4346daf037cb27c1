"""Files of torch.save, read without PyTorch: the same numbers as PyTorch reads, and damaged files are refused."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import checkpoint_weights, hf_tensors, write_hf
from test_torch_pickle import P, name, text

from svdengine.converters import convert
from svdengine.converters.checkpoint import read_stored
from svdengine.converters.torch_file import read_torch_file
from svdengine.errors import ConversionError

torch = pytest.importorskip("torch")

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def raw(tensor: Any) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor.detach())
    return bytes(flat.view(torch.uint8).numpy())


def assert_same(path: Path, tensors: Any) -> None:
    found = read_torch_file(path)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        stored = found[key]
        array = read_stored(stored, key)
        assert array.shape == stored.shape == tuple(tensor.shape)
        assert array.tobytes() == raw(tensor)


@st.composite
def tensor_of(draw: st.DrawFn) -> Any:
    """A tensor of any type and shape, perhaps a view of another: cut, with steps, or with its axes exchanged."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(b & 1 for b in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    for axis, length in enumerate(shape):
        if draw(st.booleans()):
            begin, step = draw(st.integers(0, length)), draw(st.integers(1, 3))
            tensor = tensor[(slice(None),) * axis + (slice(begin, None, step),)]
    return tensor.permute(draw(st.permutations(range(len(shape)))))


@FUZZ
@given(st.dictionaries(st.text(max_size=20), tensor_of(), max_size=5), st.sampled_from([2, 3, 4, 5]))
def test_what_torch_saves(tmp_path: Path, tensors: dict[str, Any], protocol: int) -> None:
    tensors = {key.encode("utf-8", "replace").decode(): tensor for key, tensor in tensors.items()}
    torch.save(OrderedDict(tensors), tmp_path / "t.bin", pickle_protocol=protocol)
    assert_same(tmp_path / "t.bin", tensors)


@FUZZ
@given(st.dictionaries(st.text("abc", max_size=5), tensor_of(), max_size=4))
def test_what_torch_saved_before_version_1_6(tmp_path: Path, tensors: dict[str, Any]) -> None:
    kinds = DTYPES[:10]  # those of today have no place in it
    tensors = {key: tensor for key, tensor in tensors.items() if tensor.dtype in kinds}
    torch.save(tensors, tmp_path / "t.bin", _use_new_zipfile_serialization=False)
    assert_same(tmp_path / "t.bin", tensors)


@pytest.mark.parametrize("new", [True, False])
def test_modules_parameters_and_shared_storages(tmp_path: Path, new: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 5))
    module[2].weight = module[2].weight  # a parameter
    shared = torch.arange(60.0).reshape(6, 10)
    tensors = {
        **module.state_dict(),
        **{f"parameter.{key}": value for key, value in module.named_parameters()},
        "whole": shared,
        "again": shared,
        "rows": shared[2:4],
        "columns": shared[:, 3:5],
        "transposed": shared.T,
    }
    torch.save(OrderedDict(tensors), tmp_path / "t.bin", _use_new_zipfile_serialization=new)
    assert_same(tmp_path / "t.bin", tensors)
    found = read_torch_file(tmp_path / "t.bin")
    assert found["whole"] == found["again"]
    assert found["rows"].start == found["whole"].start + 80 and found["rows"].strides is None


def test_a_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "kept by somebody"
    torch.save({"a": parameter}, tmp_path / "t.bin")
    assert_same(tmp_path / "t.bin", {"a": parameter})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), "holds a PickledTensor, expected a dict of tensors"),
        ([torch.ones(3)], "holds a list, expected a dict of tensors"),
        ({"model": {"a": torch.ones(3)}}, "holds a dict under the name 'model'"),
        ({"a": torch.ones(3), "epoch": 3}, "holds a int under the name 'epoch'"),
        ({1: torch.ones(3)}, "under the name '1'"),
        ({"a": torch.ones(1).expand(10)}, "repeats its storage of 1 elements 10 times"),
        ({"a": torch.ones(3).to_sparse()}, "'torch._utils._rebuild_sparse_tensor'"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
        ({"a": torch.ones(3, device="meta")}, "'torch._utils._rebuild_meta_tensor_no_storage'"),
        ({"a": np.ones(3)}, "numpy"),
        (torch.nn.Linear(2, 2), "Linear"),
    ],
    ids=range(11),
)
def test_what_is_no_list_of_tensors(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "t.bin")
    with pytest.raises(ConversionError, match=message) as caught:
        read_torch_file(tmp_path / "t.bin")
    assert str(tmp_path / "t.bin") in str(caught.value) and "\n" not in str(caught.value)


def test_a_hostile_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Hostile:
        def __reduce__(self) -> Any:
            import os

            return os.system, ("touch pwned",)

    for new in (True, False):
        torch.save({"a": Hostile()}, "t.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(ConversionError, match=r"asks for 'posix\.system'.* could run code"):
            read_torch_file(Path("t.bin"))
    assert not Path("pwned").exists()


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    return (
        b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
    )


def tensor(key: str, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The pickle of {"a": tensor}."""
    numbers = [b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in some) + b"t" for some in (shape, strides)]
    call = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(key, count)
    call += b"\x8a\x08" + struct.pack("<q", offset) + numbers[0] + numbers[1] + b"\x89}tR"
    return P + b"}" + text("a") + call + b"s."


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


FITS = tensor("0", 6, 0, (2, 3), (3, 1))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (FITS, None),
        (tensor("0", 6, 0, (3, 2), (1, 3)), None),
        (tensor("0", 6, 5, (1,), (1 << 40,)), None),
        (tensor("0", 6, 6, (0, 5), (1, 1)), None),
        (tensor("0", 6, 5, (), ()), None),
        (tensor("0", 6, 6, (), ()), "does not fit its storage of 6"),
        (tensor("0", 6, 7, (0,), (1,)), None),
        (tensor("0", 6, 1, (2, 3), (3, 1)), "does not fit"),
        (tensor("0", 6, 0, (2, 3), (4, 1)), "does not fit"),
        (tensor("0", 6, 0, (7,), (1,)), "does not fit"),
        (tensor("0", 6, 0, (1 << 47,), (0,)), "too large"),
        (tensor("0", 6, 0, (0, 1 << 47), (1, 1)), "too large"),
        (tensor("0", 6, 0, (7,), (0,)), "repeats its storage"),
        (tensor("0", 6, 0, (2, 3), (3,)), "with strides"),
        (tensor("0", 6, 0, (-1,), (1,)), "of shape"),
        (tensor("0", 6, 0, (2,), (-1,)), "with strides"),
        (tensor("0", 6, -1, (1,), (1,)), "from -1 on"),
        (tensor("0", 7, 0, (7,), (1,)), "has 24 bytes, expected 28"),
        (tensor("0", 5, 0, (5,), (1,)), "has 24 bytes, expected 20"),
        (tensor("1", 6, 0, (6,), (1,)), "lacks the storage '1'"),
        (tensor("../../../etc/passwd", 6, 0, (6,), (1,)), "lacks the storage '../../../etc/passwd'"),
        (tensor("/etc/passwd", 6, 0, (6,), (1,)), "lacks the storage '/etc/passwd'"),
    ],
    ids=range(22),
)
def test_shapes_are_checked_against_the_bytes(tmp_path: Path, pickled: bytes, message: str | None) -> None:
    numbers = np.arange(6, dtype=np.float32)
    path = write_zip(tmp_path / "t.bin", {"t/data.pkl": pickled, "t/data/0": numbers.tobytes()})
    if message is None:
        stored = read_torch_file(path)["a"]
        assert set(read_stored(stored, "a").ravel()) <= set(numbers)
        return
    with pytest.raises(ConversionError, match=message):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"t/data/0": bytes(24)}, "with 0 members data.pkl"),
        ({"a/data.pkl": FITS, "b/data.pkl": FITS}, "with 2 members data.pkl"),
        ({"t/data.pkl": FITS, "t/data/0": bytes(24), "t/byteorder": b"big"}, "another byte order"),
        ({"t/data.pkl": b"\x80\x02" + bytes(9 << 20)}, "data.pkl has 9437186 bytes"),
        ({"t/data.pkl": b""}, "truncated"),
    ],
)
def test_archives_that_torch_does_not_write(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read_torch_file(write_zip(tmp_path / "t.bin", members))


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    members = {"t/data.pkl": FITS, "t/data/0": bytes(1 << 20)}
    with pytest.raises(ConversionError, match=r"'t/data\.pkl' is compressed"):
        read_torch_file(write_zip(tmp_path / "t.bin", members, zipfile.ZIP_DEFLATED))


def directory_entry(data: bytes, member: bytes) -> int:
    """Where the directory's entry of a member begins."""
    return data.rindex(member) - 46


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ((8, "<H"), 1, "compressed or encrypted"),
        ((10, "<H"), 8, "compressed or encrypted"),
        ((20, "<L"), 7, "compressed or encrypted"),
        ((42, "<L"), 1 << 30, "behind the directory"),
        ((42, "<L"), 0, "not where the directory says"),
        ((42, "<L"), 0xFFFFFFFF, "lacks its size or place"),
        ((28, "<H"), 60_000, "too short"),
        ((0, "<L"), 0, "too short"),
    ],
)
def test_a_directory_that_lies(tmp_path: Path, field: tuple[int, str], value: int, message: str) -> None:
    path = write_zip(tmp_path / "t.bin", {"t/data.pkl": FITS, "t/data/0": bytes(24)})
    data = bytearray(path.read_bytes())
    struct.pack_into(field[1], data, directory_entry(data, b"t/data/0") + field[0], value)
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        read_torch_file(path)


def test_members_that_lie_in_each_other_are_refused(tmp_path: Path) -> None:
    """How a zip bomb swells without compression of its own."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("t/data/0", bytes(24))
    path = write_zip(tmp_path / "t.bin", {"t/data.pkl": FITS, "t/data/1": inner.getvalue(), "t/data/0": bytes(24)})
    data = bytearray(path.read_bytes())
    entry = directory_entry(data, b"t/data/0")
    struct.pack_into("<L", data, entry + 42, data.index(b"t/data/0") - 30)  # the one inside t/data/1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="does not lie apart"):
        read_torch_file(path)


def test_two_members_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "t.bin", "w") as archive:
        for _ in range(2):
            archive.writestr("t/data.pkl", FITS)
    with pytest.raises(ConversionError, match="two members"):
        read_torch_file(tmp_path / "t.bin")


def test_an_archive_with_fields_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of files beyond 4 GB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = write_zip(tmp_path / "t.bin", {"t/data.pkl": FITS, "t/data/0": np.arange(6.0, dtype="f4").tobytes()})
    assert b"PK\6\6" in path.read_bytes()
    np.testing.assert_array_equal(read_stored(read_torch_file(path)["a"], "a"), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("new", [True, False])
def test_truncated_files(tmp_path: Path, new: bool) -> None:
    torch.save({"a": torch.ones(50), "b": torch.ones(3)}, tmp_path / "t.bin", _use_new_zipfile_serialization=new)
    data = (tmp_path / "t.bin").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "t.bin").write_bytes(data[:length])
        with pytest.raises(ConversionError):
            read_torch_file(tmp_path / "t.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.__setitem__(1, pickle.dumps(7, 2)), "unknown version"),
        (lambda parts: parts.__setitem__(2, pickle.dumps({"little_endian": False}, 2)), "unknown version"),
        (lambda parts: parts.__setitem__(4, pickle.dumps(["0", "0"], 2)), "each once"),
        (lambda parts: parts.__setitem__(4, pickle.dumps(["x"], 2)), "no tensor names the storage 'x'"),
        (lambda parts: parts.__setitem__(4, pickle.dumps([], 2)), "is missing"),
        (lambda parts: parts.__setitem__(5, struct.pack("<q", 7) + bytes(28)), "has 7 elements, expected 6"),
        (lambda parts: parts.__setitem__(5, struct.pack("<q", 6) + bytes(20)), "truncated"),
    ],
)
def test_files_of_old_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    parts = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": True}, 2),
        FITS,
        pickle.dumps(["0"], 2),
        struct.pack("<q", 6) + np.arange(6.0, dtype="f4").tobytes(),
    ]
    path = tmp_path / "t.bin"
    path.write_bytes(b"".join(parts))
    np.testing.assert_array_equal(read_stored(read_torch_file(path)["a"], "a"), np.arange(6).reshape(2, 3))
    change(parts)
    path.write_bytes(b"".join(parts))
    with pytest.raises(ConversionError, match=message):
        read_torch_file(path)


def as_bin(folder: Path, tensors: dict[str, Any], new: bool = True) -> Path:
    """Put PyTorch's own file in place of the safetensors one."""
    (folder / "model.safetensors").unlink()
    values = OrderedDict((key, torch.from_numpy(value.copy())) for key, value in tensors.items())
    torch.save(values, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    return folder


def assert_equal_models(one: Path, other: Path, tmp_path: Path) -> None:
    from svdengine.files.model_file import read_model_file

    files = []
    for index, folder in enumerate((one, other)):
        convert(folder, tmp_path / f"{index}.svdp", "f32")
        files.append(read_model_file(tmp_path / f"{index}.svdp"))
    with files[0], files[1]:
        assert files[0].config == files[1].config and files[0].arrays.keys() == files[1].arrays.keys()
        for key, array in files[0].arrays.items():
            np.testing.assert_array_equal(array, files[1].arrays[key], err_msg=key)


@pytest.mark.parametrize("new", [True, False])
def test_a_folder_of_a_bin_file(tmp_path: Path, new: bool) -> None:
    weights = hf_tensors(checkpoint_weights())
    one, other = write_hf(tmp_path / "one"), as_bin(write_hf(tmp_path / "other"), weights, new)
    assert_equal_models(one, other, tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"no such file")
    convert(folder, tmp_path / "m.svdp", "f32")


def test_shards_with_an_index(tmp_path: Path) -> None:
    weights = hf_tensors(checkpoint_weights())
    one, other = write_hf(tmp_path / "one"), write_hf(tmp_path / "other")
    (other / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
    for shard, members in shards.items():
        torch.save({key: torch.from_numpy(weights[key]) for key in members}, other / shard)
    weight_map = {key: shard for shard, members in shards.items() for key in members}
    (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal_models(one, other, tmp_path)
    (other / names[0]).touch()
    weight_map[names[0]] = "../one/model.safetensors"
    (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match="is not the name of a file"):
        convert(other, tmp_path / "m.svdp")


def test_consolidated_files(tmp_path: Path) -> None:
    weights = hf_tensors(checkpoint_weights())
    one, other = write_hf(tmp_path / "one"), as_bin(write_hf(tmp_path / "other"), weights)
    (other / "pytorch_model.bin").rename(other / "consolidated.00.pth")
    assert_equal_models(one, other, tmp_path)
    (other / "consolidated.01.pth").touch()
    with pytest.raises(ConversionError, match=r"consolidated\.00\.pth and 1 files beside it hold parts"):
        convert(other, tmp_path / "m.svdp")


def saved_twice(tmp_path: Path, model: Any, **changes: Any) -> tuple[Path, Path]:
    """A model of transformers as safetensors, and as PyTorch's own files."""
    folders = []
    for kind in ("safetensors", "bin"):
        folder = write_hf(tmp_path / kind)
        (folder / "model.safetensors").unlink()
        (folder / "generation_config.json").unlink()
        model.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))
        if kind == "bin":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")  # with the tied copy, as such files have
        folders.append(folder)
    return folders[0], folders[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opt(tmp_path: Path, dtype: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, int] = {"vocab_size": 300, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    model = transformers.OPTForCausalLM(config).to(dtype)
    assert "lm_head.weight" in model.state_dict()
    assert_equal_models(*saved_twice(tmp_path, model), tmp_path)


def test_prosparse_minicpm(tmp_path: Path) -> None:
    """As SparseLLM/ProSparse-MiniCPM-1B-sft: no model_type, tied without a word, FATReLU at 0.03, in bfloat16."""
    weights = {k: v for k, v in hf_tensors(checkpoint_weights()).items() if k != "lm_head.weight"}
    changes: dict[str, Any] = {
        "architectures": ["MiniCPMForCausalLM"],
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.03,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
    }
    one = write_hf(tmp_path / "one", weights, **changes)
    other = write_hf(tmp_path / "other", weights, **changes)
    for folder in (one, other):
        settings = json.loads((folder / "config.json").read_text())
        del settings["model_type"], settings["tie_word_embeddings"], settings["head_dim"]
        (folder / "config.json").write_text(json.dumps(settings))
    (other / "model.safetensors").unlink()
    values = OrderedDict((k, torch.from_numpy(v).to(torch.bfloat16)) for k, v in weights.items())
    torch.save(values, other / "pytorch_model.bin")
    assert_equal_models(one, other, tmp_path)


MEMORY = """
import resource, sys
from pathlib import Path
from svdengine.converters.checkpoint import read_stored
from svdengine.converters.torch_file import read_torch_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, tensor in read_torch_file(Path(sys.argv[1])).items():
    read_stored(tensor, name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save({f"t{i}": torch.zeros(1000, 1000).T for i in range(30)}, path)
    command = [sys.executable, "-c", MEMORY, str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    path.unlink()
    assert grown < 30_000, f"{grown} KiB"  # two of 4 MB, of 120
