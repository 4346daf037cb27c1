"""The tokenizer: control tokens only where they are meant, and damaged files refused."""

import pytest
import tokenizers
from tiny_model import byte_level_json, make_tokenizer

from svdengine.errors import ModelFileError, RequestError
from svdengine.text.tokenizer import Tokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

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
