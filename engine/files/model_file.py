"""Read a `.svdp` model file: one memory map, with every tensor checked against the model's config.

A `.svdp` file is a safetensors file whose tensors are those of `models/tensors.py`, stored as `kernels/formats.py`
says, each at a multiple of 64 bytes. Its tokenizer is a byte tensor, `tokenizer.json` or `tokenizer.model`, as it is or
compressed by gzip, and so is `chat_template`, as it is. Its `__metadata__` holds format, format_version, and as JSON:
config, formats (the weight format of each matrix by name), tokenizer, generation, provenance. Files of version 1 lack
formats: there each dtype stood for one. Tensors under `predictor.` are not described by the config; whoever uses them
checks their shapes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from numpy.typing import NDArray

from svdengine.errors import ModelFileError, quoted
from svdengine.files.memory_advice import Advice
from svdengine.files.tensor_file import TensorEntry, TensorFile, TensorHeader, open_regular, strict_json
from svdengine.files.tensor_writer import ALIGNMENT, PAD_PREFIX, Declared
from svdengine.kernels.formats import FORMATS, WeightFormat, stored_parts
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import ROUTER, TensorSpec, tensor_specs
from svdengine.text.tokenizer_info import TokenizerInfo, TokenizerKind

FORMAT = "svdp"
FORMAT_VERSION = "2"
_WITHOUT_FORMATS = "1"  # the version whose formats are told by the dtypes
PREDICTOR_PREFIX = "predictor."
CHAT_TEMPLATE = "chat_template"

_GZIP = b"\x1f\x8b"
_MOST_TOKENIZER_BYTES = 1 << 28

_FIRST_FORMATS: dict[str, WeightFormat] = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I8": "q8", "U8": "q4"}


@dataclass(frozen=True)
class ModelFile:
    """An open model file. Arrays are read-only views of one memory map; bfloat16 is held as uint16."""

    path: Path
    config: ModelConfig
    arrays: Mapping[str, NDArray[Any]]  # stored name ("gate", "gate.scale", "predictor....") -> array
    formats: Mapping[str, WeightFormat]  # name of each matrix -> how it is stored
    tokenizer_info: TokenizerInfo
    tokenizer_bytes: bytes
    chat_template: str | None
    generation: Mapping[str, Any]  # defaults of the checkpoint: temperature, top_p, top_k, repetition_penalty ...
    metadata: Mapping[str, str]  # all of __metadata__, as it stands in the file
    size_bytes: int
    _file: TensorFile = field(repr=False)
    _arrays: dict[str, NDArray[Any]] = field(repr=False)

    @property
    def parameter_count(self) -> int:
        """Numbers that were learned, however they are stored."""
        return sum(math.prod(spec.shape) for spec in tensor_specs(self.config))

    def advise(self, names: Iterable[str], advice: Advice) -> None:
        """Say how arrays will be read; see TensorFile. Those that are not the file's own are left out."""
        self._file.advise([name for name in names if name in self._file.header.entries], advice)

    def forget_block(self, names: Iterable[str], block: int) -> None:
        """Have the system take the memory back that one FFN block's parts of arrays have; see TensorFile."""
        self._file.forget_item(names, block)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read arrays into memory, and wait for them."""
        self._file.prefetch(names)

    def lock(self, names: Iterable[str]) -> None:
        """Keep arrays in memory until the file is closed. Raises DeviceError when that is not permitted."""
        self._file.lock(names)

    def close(self) -> None:
        """Forget the arrays and unmap the file; arrays that are held elsewhere stay valid."""
        self._arrays.clear()
        self._file.close()

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_model_file(path: Path | str) -> ModelFile:
    """Open and check a `.svdp` file. Raises ModelFileError with what was found, what was expected and what to do."""
    path = Path(path)
    _refuse_other_formats(path)
    file = TensorFile(path)
    try:
        return _read(path, file)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def stored_tensors(spec: TensorSpec, weight_format: WeightFormat) -> dict[str, Declared]:
    """Stored name -> (shape, safetensors dtype) of all that a canonical tensor is stored as."""
    if not spec.matrix:
        return {spec.name: (spec.shape, "F32")}
    *layers, rows, columns = spec.shape
    parts = stored_parts(weight_format, rows, columns)
    return {spec.name + suffix: ((*layers, *shape), dtype) for suffix, (shape, dtype) in parts.items()}


def _read(path: Path, file: TensorFile) -> ModelFile:
    header = file.header
    metadata = header.metadata
    _check_version(metadata)
    config = ModelConfig.from_dict(_json_object(metadata, "config"))
    formats = _formats(header, config)
    _check_tensors(header, config, formats)
    info = TokenizerInfo.from_dict(_json_object(metadata, "tokenizer"), config.vocab_size)
    texts = _check_byte_tensors(header, info)
    arrays = {n: a for n, a in file.arrays.items() if n not in texts and not n.startswith(PAD_PREFIX)}
    template = file.arrays.get(CHAT_TEMPLATE)
    return ModelFile(
        path=path,
        config=config,
        arrays=MappingProxyType(arrays),
        formats=MappingProxyType(formats),
        tokenizer_info=info,
        tokenizer_bytes=_plain(file.arrays[info.kind].tobytes()) if info.kind != "none" else b"",
        chat_template=template.tobytes().decode("utf-8") if template is not None else None,
        generation=MappingProxyType(_json_object(metadata, "generation")),
        metadata=metadata,
        size_bytes=header.size_bytes,
        _file=file,
        _arrays=arrays,
    )


def _refuse_other_formats(path: Path) -> None:
    """Say what to do with a checkpoint that was not converted."""
    hint = f"run: svdengine convert {path} -o model.svdp"
    if path.is_dir():
        if (path / "config.json").exists():
            raise ModelFileError(f"{path}: is a checkpoint folder, not a model file; {hint}")
        raise ModelFileError(f"{path}: is a folder, not a model file")
    with open_regular(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        raise ModelFileError(f"{path}: is a GGUF file, not a model file; {hint}")
    if magic == b"PK\x03\x04":
        raise ModelFileError(f"{path}: is a zip archive (a PyTorch checkpoint?), not a model file")


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            "is a safetensors file, but not a .svdp model file;"
            " run: svdengine convert FOLDER -o model.svdp on the checkpoint folder"
        )
    version = metadata.get("format_version", "")
    if version not in (_WITHOUT_FORMATS, FORMAT_VERSION):
        raise ValueError(
            f"has format version {quoted(version)}, this svdengine reads {_WITHOUT_FORMATS!r} and {FORMAT_VERSION!r};"
            " convert the checkpoint again, or update svdengine"
        )


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = strict_json(metadata[key])
    except KeyError:
        raise ValueError(f"__metadata__ lacks {key!r}") from None
    except ValueError as error:
        raise ValueError(f"__metadata__ {key!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"__metadata__ {key!r} must be a JSON object")
    return value


def _formats(header: TensorHeader, config: ModelConfig) -> dict[str, WeightFormat]:
    """The format of each matrix of the config."""
    matrices = [spec.name for spec in tensor_specs(config) if spec.matrix]
    if header.metadata.get("format_version") == _WITHOUT_FORMATS:
        return {name: _format_of_dtype(name, _entry(header, name).dtype) for name in matrices}
    told = _json_object(header.metadata, "formats")
    if told.keys() != set(matrices):
        odd = min(told.keys() ^ set(matrices))
        raise ValueError(f"__metadata__ 'formats' {'lacks' if odd in matrices else 'has no use for'} {quoted(odd)}")
    if told.get(ROUTER, "f32") != "f32":
        raise ValueError(f"tensor {ROUTER!r}: found the format {told[ROUTER]!r}, expected 'f32'")
    for name, weight_format in told.items():
        if not isinstance(weight_format, str) or weight_format not in FORMATS:
            raise ValueError(
                f"tensor {quoted(name)}: found the format {quoted(str(weight_format))}, this svdengine reads"
                f" {', '.join(FORMATS)}; convert the checkpoint again, or update svdengine"
            )
    return told


def _format_of_dtype(name: str, dtype: str) -> WeightFormat:
    if dtype not in _FIRST_FORMATS:
        raise ValueError(f"tensor {quoted(name)}: found {dtype}, expected one of {', '.join(_FIRST_FORMATS)}")
    return _FIRST_FORMATS[dtype]


def _check_tensors(header: TensorHeader, config: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
    """Compare every tensor with what the config and the formats call for."""
    expected: dict[str, Declared] = {}
    for spec in tensor_specs(config):
        expected.update(stored_tensors(spec, formats.get(spec.name, "f32")))
    for name, (shape, dtype) in expected.items():
        entry = _entry(header, name)
        if (entry.shape, entry.dtype) != (shape, dtype):
            raise ValueError(
                f"tensor {quoted(name)}: found {entry.dtype} {entry.shape}, expected {dtype} {shape} from the config"
            )
    _check_names_and_alignment(header, expected)


def _entry(header: TensorHeader, name: str) -> TensorEntry:
    if name not in header.entries:
        raise ValueError(f"tensor {quoted(name)} is missing")
    return header.entries[name]


def _check_names_and_alignment(header: TensorHeader, expected: Iterable[str]) -> None:
    known = {*expected, CHAT_TEMPLATE, *get_args(TokenizerKind)} - {"none"}
    for name, entry in header.entries.items():
        if name.startswith(PAD_PREFIX):
            if entry.dtype != "U8" or entry.end - entry.start >= ALIGNMENT:
                raise ValueError(f"tensor {quoted(name)}: padding must be fewer than {ALIGNMENT} bytes of U8")
            continue
        if name not in known and not name.startswith(PREDICTOR_PREFIX):
            raise ValueError(f"tensor {quoted(name)} is unexpected: no tensor of this config has that name")
        if entry.start % ALIGNMENT:
            raise ValueError(f"tensor {quoted(name)}: starts at byte {entry.start}, not a multiple of {ALIGNMENT}")


def _check_byte_tensors(header: TensorHeader, info: TokenizerInfo) -> set[str]:
    """The names of the byte tensors, after a check of which there are."""
    names = {CHAT_TEMPLATE, *get_args(TokenizerKind)} & set(header.entries)
    kinds = names - {CHAT_TEMPLATE}
    if kinds != {info.kind} - {"none"}:
        found = ", ".join(sorted(kinds)) or "no tokenizer"
        raise ValueError(f"found {found}, expected {info.kind!r} from __metadata__")
    for name in names:
        entry = header.entries[name]
        if entry.dtype != "U8" or len(entry.shape) != 1:
            raise ValueError(f"tensor {quoted(name)}: found {entry.dtype} {entry.shape}, expected U8 of one dimension")
    return names


def _plain(data: bytes) -> bytes:
    """The tokenizer, which may be compressed. Raises ValueError when it is damaged or swells beyond measure."""
    if not data.startswith(_GZIP):  # no tokenizer.json and no tokenizer.model begins so
        return data
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(data, _MOST_TOKENIZER_BYTES)
    except zlib.error as error:
        raise ValueError(f"the compressed tokenizer is damaged: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(
            "the compressed tokenizer is cut off, goes on after its end,"
            f" or is larger than {_MOST_TOKENIZER_BYTES:,} bytes"
        )
    return plain
