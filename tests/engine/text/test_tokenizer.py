"""The tokenizer: control tokens only where they are meant, and damaged files refused."""

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import byte_level_json, make_tokenizer

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS
from svdengine.errors import ModelFileError, RequestError
from svdengine.text.tokenizer import Tokenizer
from svdengine.text.tokenizer_bounds import check_pattern
from svdengine.text.tokenizer_info import TokenizerInfo

PRECOMPILED = base64.b64encode(bytes(4) + b"a" * 10_000 + b"\0").decode()
PUBLISHED = [
    r"(?i:'s|'t|'re|'ve|'m)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+",
    r" ?[^(\s|[.,!?…。,、।])]+",
    r"(?<=\d)(?=(?:\d{3})+(?!\d))|[0-9][0-9][0-9]",
    r"<sentinel:[0-9]+>|(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z|[\p{P}!-/:-@\[-`{-~]",
    r"[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+|\s+",
]

KINDS = ("byte_level", "llama", "llama_first", "sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hello world", "two  spaces ", "€ and 😀", "<s>not one</s>", "x"])
def test_text_round_trips(kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_silent(token) for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_count_on_request(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    text = tokenizer.special_text(bos) + "hello" + tokenizer.special_text(eos)
    ids = tokenizer.encode(text, special=True)
    assert ids[0] == bos and ids[-1] == eos and len(ids) > 2
    assert tokenizer.decode(ids, special=True).replace(" ", "") == text
    assert tokenizer.decode(ids) == "hello"


@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_added_once(kind: str) -> None:
    tokenizer = make_tokenizer(kind, add_bos=True)
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id
    assert tokenizer.encode("hello", bos=False) == tokenizer.encode("hello")[1:]
    written = tokenizer.special_text(tokenizer.bos_id)
    assert tokenizer.encode(written + "hello", special=True).count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hello</s>hello there", "</s></s>", "<s>hello world</s>\n", "hello"])
def test_splitting_at_control_tokens_is_what_the_library_does(kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    whole = tokenizer.encode(text, special=True, bos=False)
    assert tokenizer.encode(text, special=True, bos=False, literals={"\ue000": "unused"}) == whole


def test_space_swallowing_control_tokens() -> None:
    source = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    source.add_special_tokens([tokenizers.AddedToken("<|x|>", lstrip=True, rstrip=True, special=True)])
    tokenizer = Tokenizer(TokenizerInfo("tokenizer.json"), source.to_str().encode())
    text = "hello  <|x|>  world <|im_end|> "
    whole = tokenizer.encode(text, special=True)
    assert tokenizer.encode(text, special=True, literals={"\ue000": ""}) == whole


def test_literals_stay_text() -> None:
    tokenizer = make_tokenizer("byte_level")
    ids = tokenizer.encode("a\ue000b<|im_end|>", special=True, literals={"\ue000": "<|im_end|>"})
    assert ids.count(3) == 1 and ids[-1] == 3
    assert ids[:-1] == tokenizer.encode("a<|im_end|>b")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_token_texts(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer.encode("hello world, once")
    assert "".join(map(tokenizer.token_text, ids)).strip() == "hello world, once"
    assert tokenizer.token_text(tokenizer.eos_id) == tokenizer.special_text(tokenizer.eos_id)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hello world", "€ and 😀 \n\t\x00"])
def test_token_bytes_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode()
    assert found.removeprefix("" if kind == "byte_level" else " ") == text
    assert tokenizer.token_bytes(tokenizer.eos_id) == tokenizer.special_text(tokenizer.eos_id).encode()
    assert tokenizer.token_bytes(99999) == b""


def test_ids_outside_the_vocabulary_are_left_out() -> None:
    for kind in KINDS:
        tokenizer = make_tokenizer(kind)
        assert tokenizer.decode([*tokenizer.encode("hello"), 99999]) == "hello"


def test_unusable_input() -> None:
    tokenizer = make_tokenizer("byte_level")
    with pytest.raises(RequestError, match="must be a string, found bytes"):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]
    assert tokenizer.decode(tokenizer.encode("lone \ud800 surrogate")) == "lone ? surrogate"


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00garbage", byte_level_json()[:500]])
def test_damaged_files_are_refused(kind: str, data: bytes) -> None:
    with pytest.raises(ModelFileError, match="tokenizer cannot be read"):
        Tokenizer(TokenizerInfo(kind), data)  # type: ignore[arg-type]


def test_a_model_without_tokenizer() -> None:
    tokenizer = Tokenizer(TokenizerInfo("none"), b"")
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        tokenizer.encode("hello")


def changed_json(change: Callable[[dict[str, Any]], object]) -> bytes:
    settings = json.loads(byte_level_json())
    change(settings)
    return json.dumps(settings).encode()


def steps(name: str, *parts: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[name]
    return lambda settings: settings.update({name: {"type": "Sequence", inner: list(parts)}})


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
MORE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
BETWEEN = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 100}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (steps("pre_tokenizer", *[LEVEL] * 200), "steps|as long"),
        (steps("pre_tokenizer", *[LEVEL] * 20), "as long"),
        (steps("normalizer", *[LEVEL] * 20), "as long"),
        (steps("normalizer", *[MORE] * 9), "as long"),
        (steps("normalizer", BETWEEN), "as long"),
        (steps("decoder", *[MORE] * 9), "as long"),
        (steps("normalizer", *[{"type": "Lowercase"}] * 1000), "steps"),
        (steps("normalizer", {"type": "Precompiled", "precompiled_charsmap": PRECOMPILED}), "of one character"),
        (lambda s: s["model"]["vocab"].update({"a" * 100_000: 5000}), "entry of more than"),
        (lambda s: s["model"].update(max_input_chars_per_word=10**9), "max_input_chars_per_word"),
        (steps("pre_tokenizer", split("(a+)+$")), "repeats what holds"),
        (steps("pre_tokenizer", split("(?:a|a)*$")), "repeats what holds"),
        (steps("pre_tokenizer", split("(?:(?:a?)b){70,}")), "repeats what holds"),
        (steps("pre_tokenizer", split("(?:a|aa){2}+$")), "repeats what holds"),
        (steps("pre_tokenizer", split("(?:[)]|[^]]a*)+$")), "repeats what holds"),
        (steps("pre_tokenizer", split("((a{1000}){1000}){1000}")), "repeats what holds"),
        (steps("pre_tokenizer", split(r"(a|b)\1")), "refers to another part"),
        (steps("pre_tokenizer", split(r"(?<x>a\g<x>?b)")), "refers to another part"),
        (steps("pre_tokenizer", split("a" * 30_000)), "30000 characters"),
    ],
)
def test_tokenizers_without_bounds_are_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ModelFileError, match=f"the model's tokenizer is refused .*({message})"):
        Tokenizer(TokenizerInfo("tokenizer.json"), changed_json(change))


@pytest.mark.parametrize("pattern", [p for pre in PRE_TOKENIZERS.values() for p in pre.patterns] + PUBLISHED)
def test_published_patterns_are_taken(pattern: str) -> None:
    check_pattern(pattern)
    tokenizer = Tokenizer(TokenizerInfo("tokenizer.json"), changed_json(steps("pre_tokenizer", split(pattern), LEVEL)))
    assert tokenizer.decode(tokenizer.encode("hello  World 12345")) == "hello  World 12345"


@settings(max_examples=200, deadline=None)
@given(pattern=st.text(alphabet="a[]()|*+?{}2,^\\\\", max_size=12))
def test_looking_at_any_pattern_ends(pattern: str) -> None:
    with contextlib.suppress(ModelFileError):
        check_pattern(pattern)


@pytest.mark.parametrize("tokens", [[], {"unk token": "x"}, {"unk_token": 3}, {"unk_token": None}])
def test_template_tokens_are_names_and_texts(tokens: Any) -> None:
    with pytest.raises(ValueError, match="template_tokens must map"):
        TokenizerInfo.from_dict({"kind": "none", "template_tokens": tokens or [1]}, 5)
    info = TokenizerInfo.from_dict({"kind": "none", "template_tokens": {"unk_token": "<unk>"}}, 5)
    assert TokenizerInfo.from_dict(info.to_dict(), 5) == info
    assert "template_tokens" not in TokenizerInfo("none").to_dict()
