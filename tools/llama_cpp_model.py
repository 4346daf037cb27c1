"""A thin hold on llama.cpp through the low-level API of llama-cpp-python: load, tokenize, decode, logits."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError
from svdengine.tools.run_program import run_program


def import_llama_cpp() -> Any:
    """The package llama_cpp, told to report errors only. Raises SvdEngineError with what to install."""
    try:
        import llama_cpp
    except ImportError as error:
        raise SvdEngineError("llama.cpp is not installed; run: pip install 'svdengine[peers]'") from error
    llama_cpp.llama_log_set(_quiet(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


def llama_cpp_version() -> str:
    """Of the Python package, and how its library was compiled."""
    llama_cpp = import_llama_cpp()
    return f"{llama_cpp.__version__} ({llama_cpp.llama_print_system_info().decode().strip(' |')})"


def quantize_gguf(source: Path, output: Path, kind: str, program: Path | None = None) -> None:
    """Make an f32, q8_0 or q4_0 file with llama.cpp's own quantiser; of q8_0 all matrices are Q8_0.

    In a q4_0 file llama.cpp keeps some matrices at more bits, as it always does. `program` is llama-quantize; without
    it the library quantises. Raises SvdEngineError when it fails.
    """
    if program is not None:
        _run_quantizer(program, source, output, kind)
        return
    llama_cpp = import_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[kind]
    params.allow_requantize = True
    if kind == "q8_0":
        params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    partial = output.with_name(output.name + ".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        partial.unlink(missing_ok=True)
        raise SvdEngineError(f"llama.cpp could not quantise {source}")
    partial.replace(output)


def _run_quantizer(program: Path, source: Path, output: Path, kind: str) -> None:
    partial = output.with_name(output.name + ".partial")
    options = ["--allow-requantize"]
    if kind == "q8_0":
        options += ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
    name = "F32" if kind == "f32" else kind.upper()
    try:
        run_program([str(program), *options, str(source), str(partial), name], f"cannot quantise {source}")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


class LlamaCppModel:
    """One model and one sequence. A context manager.

    `rows` is the most tokens that one `decode` takes; llama.cpp chooses whether to use flash attention, unless it may
    not. Raises SvdEngineError when llama.cpp cannot load the file.
    """

    def __init__(
        self, path: Path, threads: int, context: int = 1024, rows: int = 512, flash_attention: bool = True
    ) -> None:
        self._lib = lib = import_llama_cpp()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise SvdEngineError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, rows, rows
        params.n_threads = params.n_threads_batch = threads
        if not flash_attention:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SvdEngineError(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self._batch = lib.llama_batch_init(rows, 0, 1)
        self._position = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._position = 0

    def decode(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        """Add tokens to the sequence; logits (1, vocabulary) of the last, or (n, vocabulary) of `every` one.

        The array is llama.cpp's own buffer: it holds until the next call.
        """
        lib, batch, count = self._lib, self._batch, len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self._position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        batch.n_tokens = count
        status = lib.llama_decode(self._context, batch)
        if status:
            raise SvdEngineError(f"llama_decode returned {status}")
        self._position += count
        rows = count if every else 1
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (rows, self.vocab_size))

    def tokenize(self, text: str) -> list[int]:
        """Token ids; control tokens may be written in the text."""
        data = text.encode()
        room = len(data) + 8
        tokens = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, room, True, True)
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        text = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(256)
            size = self._lib.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, False)
            text += piece.raw[:size]
        return text.decode("utf-8", errors="replace")

    def ends(self, token: int) -> bool:
        """Whether the token ends a completion."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the memory."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_callback: Any = None  # held, since the library keeps calling it


def _quiet(llama_cpp: Any) -> Any:
    global _callback
    if _callback is None:

        @llama_cpp.llama_log_callback
        def report(level: int, text: bytes, _: Any) -> None:
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                print(text.decode(errors="replace").rstrip(), file=sys.stderr)

        _callback = report
    return _callback
