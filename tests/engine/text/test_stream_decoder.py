"""The stream decoder: pieces are whole characters, and joined they are the decoded text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from svdengine.text.stream_decoder import StreamDecoder

KINDS = ("byte_level", "llama", "sentencepiece")
TOKENIZERS = {kind: make_tokenizer(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_goes_on_from_its_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(data.draw(st.text("hello wör€ 😀", min_size=1, max_size=30)))
    cut = data.draw(st.integers(0, len(ids)))
    decoder = StreamDecoder(tokenizer, ids[:cut])
    rest = "".join(decoder.push(token) for token in ids[cut:]) + decoder.flush()
    head = tokenizer.decode(ids[:cut])
    if not head.endswith("\ufffd"):
        assert head + rest == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=60))
def test_any_tokens_end(ids: list[int]) -> None:
    """Also ids of control tokens, ids that do not exist, and bytes that are no UTF-8."""
    tokenizer = TOKENIZERS["byte_level"]
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_endless_broken_bytes_are_shown_after_a_while(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    broken = tokenizer.encode("€")[-1]
    decoder = StreamDecoder(tokenizer)
    assert any(decoder.push(broken) for _ in range(100))


def test_spaces_survive() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("hello  world   once")
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == "hello  world   once"
