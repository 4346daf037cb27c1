"""KV blocks in a file: what the prefix cache knows, so that a program that starts anew need not read prompts again.

A KV file is a safetensors file of n blocks, each after the one it builds on, those used last first. Its tensors:
`tokens` (n, block) I32, `lengths` (n,) I32, of the tokens that count; `parents` (n,) I32, the block before each in
its sequence, or -1; `sparsity_bias` (n,) F64; `kv` (n, 2, layers, block, kv heads, head_dim) F16 or F32, keys and
values as `read_blocks` gives them, or in 8 bits (n, 2, layers, block, kv heads, groups, 34) U8; `checksum` (32,)
U8, of all of these. `block` is how many tokens a block of the device holds. Its `__metadata__` holds format,
format_version, model (a hash of all that keys and values depend on) and ffn (the FFN's path). It is not trusted:
everything is checked before anything is used. But who can write it can choose what the model remembers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ModelFileError, quoted
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import PAD_PREFIX, Declared, TensorWriter
from svdengine.kernels.executor import BlockStore
from svdengine.kernels.kv_q8 import packed_scales
from svdengine.scheduling.prefix_cache import CachedBlock, PrefixCache, block_digest, root_digest
from svdengine.scheduling.sampling import MAX_SPARSITY_BIAS

FORMAT = "svdp-kv"
FORMAT_VERSION = "1"
_PIECE = 32  # blocks that are copied at once
_TOKENS = 3  # the axis of a store's blocks that has their tokens
_SMALL = ("tokens", "lengths", "parents", "sparsity_bias")
_DTYPE_NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "float64": "F64", "uint8": "U8"}


@dataclass(frozen=True)
class KvOrigin:
    """What the keys and values of a file were computed with."""

    model: str  # a hash of the weights and of the predictor
    ffn: str  # path of the FFN: dense, sparse or auto, and whether that was deterministic
    vocab_size: int


@dataclass(frozen=True)
class SavedBlock:
    """One block of a file: what the prefix cache knows it by."""

    parent: bytes
    tokens: tuple[int, ...]
    sparsity_bias: float


class KvFile:
    """An open KV file that was checked in full."""

    def __init__(self, path: Path, origin: KvOrigin, store: BlockStore) -> None:
        """Open and check `path`. Raises ModelFileError when it is damaged, or was not computed as `origin` says."""
        self._file = TensorFile(path)
        try:
            _check_metadata(self._file, origin)
            self._kv = _check_tensors(self._file, store)
            self.blocks = _read_blocks(self._file, origin.vocab_size)
            _check_content(self._file, self._kv)
        except ValueError as error:
            self._file.close()
            raise ModelFileError(f"{path}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def copy(self, numbers: Sequence[int], store: BlockStore, blocks: Sequence[int]) -> None:
        """Write keys and values of the file's blocks `numbers` to as many blocks of a store."""
        for start in range(0, len(numbers), _PIECE):
            part = slice(start, start + _PIECE)
            store.write_blocks(blocks[part], self._kv[list(numbers[part])])

    def __enter__(self) -> KvFile:
        return self

    def __exit__(self, *_: object) -> None:
        del self._kv
        self._file.close()


def restore(file: KvFile, cache: PrefixCache, store: BlockStore) -> int:
    """Put as many of the file's blocks as are new and find a blank one into the cache; returns how many tokens."""
    claimed: list[CachedBlock] = []
    numbers: list[int] = []
    for number, saved in enumerate(file.blocks):
        known = cache.claim(saved.parent, saved.tokens, saved.sparsity_bias)
        if known is not None:
            claimed.append(known)
            numbers.append(number)
    file.copy(numbers, store, [known.block for known in claimed])
    cache.keep(claimed)
    return sum(len(known.tokens) for known in claimed)


def write_kv_file(path: Path, origin: KvOrigin, blocks: Sequence[CachedBlock], store: BlockStore) -> None:
    """Write blocks, each after its parent. Raises ModelFileError; then an older file stays as it was."""
    sample = store.read_blocks([])
    small = _describe(blocks, sample.shape[_TOKENS])
    declared: dict[str, Declared] = {
        name: (array.shape, _DTYPE_NAMES[array.dtype.name]) for name, array in small.items()
    }
    declared["kv"] = ((len(blocks), *sample.shape[1:]), _DTYPE_NAMES[sample.dtype.name])
    declared["checksum"] = ((32,), "U8")
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": origin.model, "ffn": origin.ffn}
    checksum = _checksum_of(small)
    with TensorWriter(path, declared, metadata) as writer:
        for name, array in small.items():
            writer.write(name, array)
        for start in range(0, len(blocks), _PIECE):
            part = blocks[start : start + _PIECE]
            data = store.read_blocks([known.block for known in part])
            for known, block in zip(part, data, strict=True):
                block[:, :, len(known.tokens) :] = 0  # left there by some other sequence
            checksum.update(np.ascontiguousarray(data).data)
            writer.write("kv", data, start * data[0].size)
        writer.write("checksum", np.frombuffer(checksum.digest(), np.uint8))


def _describe(blocks: Sequence[CachedBlock], size: int) -> dict[str, NDArray[Any]]:
    """The small tensors of blocks of `size` tokens."""
    numbers = {known.digest: i for i, known in enumerate(blocks) if known.digest}
    tokens = np.zeros((len(blocks), size), np.int32)
    for row, known in zip(tokens, blocks, strict=True):
        row[: len(known.tokens)] = known.tokens
    return {
        "tokens": tokens,
        "lengths": np.array([len(known.tokens) for known in blocks], np.int32),
        "parents": np.array([numbers.get(known.parent, -1) for known in blocks], np.int32),
        "sparsity_bias": np.array([known.sparsity_bias for known in blocks], np.float64),
    }


def _checksum_of(small: dict[str, NDArray[Any]]) -> Any:
    checksum = hashlib.blake2b(digest_size=32)
    for name in _SMALL:
        checksum.update(np.ascontiguousarray(small[name]).data)
    return checksum


def _check_metadata(file: TensorFile, origin: KvOrigin) -> None:
    found = file.header.metadata
    if found.get("format") != FORMAT:
        raise ValueError("is no file of saved KV blocks; give another name, it would be overwritten")
    if found.get("format_version") != FORMAT_VERSION:
        version = quoted(found.get("format_version", ""))
        raise ValueError(f"has format version {version}, this svdengine reads {FORMAT_VERSION!r}; delete it")
    if found.get("model") != origin.model:
        raise ValueError("was saved with another model or predictor; give another name, or delete it")
    if found.get("ffn") != origin.ffn:
        raise ValueError(
            f"was saved with the FFN's path {quoted(found.get('ffn', ''))}, and {origin.ffn!r} is set now;"
            " set the same, give another name, or delete it"
        )


def _check_tensors(file: TensorFile, store: BlockStore) -> NDArray[Any]:
    """Compare types and shapes with what the store holds. Returns the keys and values."""
    names = {name for name in file.arrays if not name.startswith(PAD_PREFIX)}
    if names != {*_SMALL, "kv", "checksum"}:
        raise ValueError(f"damaged: found the tensors {', '.join(map(quoted, sorted(names)))}")
    sample, entries = store.read_blocks([]), file.header.entries
    count = entries["lengths"].shape[0] if entries["lengths"].shape else 0
    expected = {
        "tokens": ("I32", (count, sample.shape[_TOKENS])),
        "lengths": ("I32", (count,)),
        "parents": ("I32", (count,)),
        "sparsity_bias": ("F64", (count,)),
        "kv": (_DTYPE_NAMES[sample.dtype.name], (count, *sample.shape[1:])),
        "checksum": ("U8", (32,)),
    }
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            hint = "; set the same --kv-dtype, or delete the file" if name == "kv" and entry.dtype != dtype else ""
            if name == "tokens" and len(entry.shape) == 2 and entry.shape[0] == count:
                hint = "; devices differ in the size of KV blocks: use the device that saved it, or delete the file"
            raise ValueError(f"{name}: found {entry.dtype} {entry.shape}, expected {dtype} {shape}{hint}")
    return file.arrays["kv"]


def _read_blocks(file: TensorFile, vocab_size: int) -> list[SavedBlock]:
    """What each block holds, after a check that a prefix cache could have written it."""
    tokens, lengths, parents, biases = (file.arrays[name] for name in _SMALL)
    size = tokens.shape[1]
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"damaged: a token lies outside 0..{vocab_size - 1}")
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= size):
        raise ValueError(f"damaged: a block has fewer tokens than 1 or more than {size}")
    if not (np.abs(biases) <= MAX_SPARSITY_BIAS).all():
        raise ValueError("damaged: a sparsity bias is out of range")
    digests: list[bytes] = []
    blocks: list[SavedBlock] = []
    for i, (length, before) in enumerate(zip(lengths.tolist(), parents.tolist(), strict=True)):
        bias = float(biases[i])
        if not -1 <= before < i or (before >= 0 and (lengths[before] != size or biases[before] != bias)):
            raise ValueError(f"damaged: block {i} cannot come after block {before}")
        parent = digests[before] if before >= 0 else root_digest(bias)
        block = SavedBlock(parent, tuple(tokens[i, :length].tolist()), bias)
        digests.append(block_digest(parent, block.tokens))
        blocks.append(block)
    if len(set(digests)) != len(digests):
        raise ValueError("damaged: the same block occurs twice")
    return blocks


def _check_content(file: TensorFile, kv: NDArray[Any]) -> None:
    checksum = _checksum_of({name: file.arrays[name] for name in _SMALL})
    for piece in _pieces(kv):
        if not np.isfinite(packed_scales(piece) if piece.dtype == np.uint8 else piece).all():
            raise ValueError("damaged: keys or values are not finite")
        checksum.update(np.ascontiguousarray(piece).data)
    if checksum.digest() != file.arrays["checksum"].tobytes():
        raise ValueError("damaged: the checksum does not match; delete the file")


def _pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), _PIECE):
        yield array[start : start + _PIECE]
