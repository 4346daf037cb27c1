"""Tokenizers of folders: control tokens, BOS and roles as the classes of transformers have them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import tokenizer_json, write_hf

from svdengine.converters.conversion import open_checkpoint
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.stream_decoder import StreamDecoder
from svdengine.text.tokenizer import Tokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

transformers = pytest.importorskip("transformers")

POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
LOWER = {"type": "Lowercase"}
PREPEND = {"type": "Prepend", "prepend": "x"}


def folder(path: Path, content: dict[str, Any] | None = None, model_type: str = "llama", **settings: Any) -> Path:
    """A folder with a tokenizer of byte-level BPE. `content` changes tokenizer.json, `settings` its config."""
    write_hf(path)
    (path / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer_json()) | (content or {})))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    settings = {name: value for name, value in settings.items() if value != "absent"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((path / "config.json").read_text()) | {"bos_token_id": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


def theirs(path: Path, model_type: str = "llama") -> Any:
    config = json.loads((path / "config.json").read_text()) | {"model_type": model_type}
    (path / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(path)


def ours(path: Path) -> Tokenizer:
    stored = open_checkpoint(path).tokenizer
    return Tokenizer(TokenizerInfo.from_dict(stored.info.to_dict(), 300), stored.data)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_token": "<pad>", "unk_token": None},
        {"mask_token": {"__type": "AddedToken", "content": "[M]", **FLAGS}},
    ],
)
@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_special_tokens_are_variables_of_templates(tmp_path: Path, cls: str, settings: dict[str, Any]) -> None:
    names = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    template = "".join(f"{{{{ {name} if {name} is defined else 'none' }}}}|" for name in names)
    path = folder(tmp_path / "hf", tokenizer_class=cls, **settings)
    rendered = ChatTemplate(template, ours(path)).render([{"role": "user", "content": "a"}]).plain
    expected = theirs(path).apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
    )
    assert rendered == expected


@pytest.mark.parametrize("add", [None, False, True])
@pytest.mark.parametrize("post", [None, POST])
@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer"])
def test_bos(tmp_path: Path, cls: str, post: Any, add: bool | None) -> None:
    settings = {} if add is None else {"add_bos_token": add}
    path = folder(tmp_path / "hf", {"post_processor": post}, tokenizer_class=cls, **settings)
    assert ours(path).encode("hello") == theirs(path)("hello")["input_ids"]


NAMES: dict[str, dict[str, Any]] = {
    "both": {},
    "null": {"bos_token": None},
    "all null": {"bos_token": None, "eos_token": None},
    "absent": {"bos_token": "absent", "eos_token": "absent"},
    "objects": {role: {"__type": "AddedToken", "content": "<s>", **FLAGS} for role in ("bos_token", "eos_token")},
}


@pytest.mark.parametrize("post", [None, POST])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_roles_in_templates(tmp_path: Path, cls: str, names: str, post: Any) -> None:
    path = folder(tmp_path / "hf", {"post_processor": post}, tokenizer_class=cls, **NAMES[names])
    source = "[{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ documents is none }}]"
    tokenizer, other = ours(path), theirs(path)
    expected = other.apply_chat_template([{"role": "user", "content": "a"}], chat_template=source, tokenize=False)
    if other.eos_token == "<|endoftext|>":  # the class's own, which is not in this small vocabulary
        expected = expected.replace("<|endoftext|>", "")
    assert ChatTemplate(source, tokenizer).render([{"role": "user", "content": "a"}]).plain == expected
    assert tokenizer.encode("hello") == other("hello")["input_ids"]


def test_ids_beyond_the_number_of_texts_are_written(tmp_path: Path) -> None:
    """A vocabulary with holes, as many have whose tokens were cut out or kept free."""
    content = json.loads(tokenizer_json())
    model, added = content["model"], content["added_tokens"]
    model["vocab"]["hello"], model["vocab"]["\u0120w"] = 290, 299
    path = folder(tmp_path / "hf", {"model": model, "added_tokens": added})
    tokenizer, other = ours(path), theirs(path)
    ids = other("hello w", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode("hello w", bos=False) == ids == [290, 299]
    assert tokenizer.decode(ids) == other.decode(ids) == "hello w"
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in (290, 280, 299)) + decoder.flush() == "hello w"
    assert tokenizer.vocab_size == 300 and not tokenizer.is_silent(299)
    assert (tokenizer.token_bytes(299), tokenizer.token_bytes(280), tokenizer.token_text(280)) == (b" w", b"", "")


def test_the_older_map_of_special_tokens(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", eos_token="absent")
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "hello", **FLAGS}}))
    other = theirs(path)
    tokenizer = ours(path)
    assert tokenizer.special_text(tokenizer.eos_id) == other.eos_token == "hello"
    assert tokenizer.eos_id in tokenizer.eos_token_ids


@pytest.mark.parametrize("declared", [None, {"normalized": False}, {"normalized": True}, {"special": False}])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("normalizer", [None, LOWER, PREPEND, {"type": "Sequence", "normalizers": [PREPEND, LOWER]}])
def test_control_tokens_are_found_whatever_else_is_written(
    tmp_path: Path, normalizer: Any, normalized: bool, declared: dict[str, bool] | None
) -> None:
    """Where a template writes one exactly; and a text of the user that spells one does not decide about others."""
    content = json.loads(tokenizer_json())
    added = [token | {"normalized": normalized} for token in content["added_tokens"]]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if declared is not None:
        settings["added_tokens_decoder"] = {"2": {"content": "</s>", **FLAGS, **declared}}
    path = folder(tmp_path / "hf", {"normalizer": normalizer, "added_tokens": added}, **settings)
    tokenizer, other = ours(path), theirs(path)
    for text in ("hello</s> hello", "</s>hello", "hello", "a </s>"):
        expected = other(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=True, bos=False) == expected, text
        marked = tokenizer.encode(text + "\ue000", special=True, bos=False, literals={"\ue000": "</s>"})
        plain = tokenizer.encode(text + "\ue000", special=True, bos=False, literals={"\ue000": "w"})
        assert [i for i in marked if i == 2] == [i for i in plain if i == 2] == [i for i in expected if i == 2], text


def test_flags_of_the_config_are_right_where_the_files_differ(tmp_path: Path) -> None:
    added = [token | {"special": False} for token in json.loads(tokenizer_json())["added_tokens"]]
    texts = {"0": "<unk>", "1": "other", "2": "</s>"}
    declared = {i: {"content": text, **FLAGS} for i, text in texts.items()}
    path = folder(tmp_path / "hf", {"added_tokens": added}, bos_token=None, added_tokens_decoder=declared)
    special = {t.content for t in theirs(path).added_tokens_decoder.values() if t.special}
    assert set(ours(path).special_texts) == special - {"other"} == {"<unk>", "</s>"}


def sentencepiece_folder(path: Path, **settings: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn from", "and a little more of it"] * 9),
        model_writer=model, model_type="bpe", vocab_size=50, minloglevel=2, remove_extra_whitespaces=False,
    )  # fmt: skip
    folder(path, tokenizer_class="LlamaTokenizer", **settings)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


DECLARED = {
    "50": {"content": "<tool>", **FLAGS, "special": False},
    "55": {"content": "<sys>", **FLAGS},
    "60": {"content": "</tool>", **FLAGS, "special": False},
}


def test_added_tokens_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    tokenizer = ours(sentencepiece_folder(tmp_path / "hf", added_tokens_decoder=DECLARED))
    assert "<sys>" in tokenizer.special_texts and "<tool>" not in tokenizer.special_texts
    ids = tokenizer.encode("some<tool>text</tool> it<sys>", bos=False)
    assert 50 in ids and 60 in ids and 55 not in ids
    with_special = tokenizer.encode("some<tool>text<sys>", special=True, bos=False)
    assert with_special[-1] == 55 and 50 in with_special
    some, text = tokenizer.encode("some", bos=False), tokenizer.encode("text", bos=False)
    assert tokenizer.decode([*some, 50, *text, 60, 55]) == "some<tool> text</tool>"
    assert tokenizer.decode([*some, 50, *text, 55, *text], special=True) == "some<tool> text<sys> text"
    assert [tokenizer.is_silent(i) for i in (50, 55, 60, 61)] == [False, True, False, True]
    assert (tokenizer.token_bytes(50), tokenizer.token_text(60), tokenizer.vocab_size) == (b"<tool>", "</tool>", 61)


@pytest.mark.parametrize("declared", [None, DECLARED])
def test_sentencepiece_decodes_as_transformers(tmp_path: Path, declared: Any) -> None:
    pytest.importorskip("google.protobuf")
    path = sentencepiece_folder(tmp_path / "hf", **({"added_tokens_decoder": declared} if declared else {}))
    other, tokenizer = theirs(path), ours(path)
    ids = other("some text<tool> it", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == other.decode(ids)
