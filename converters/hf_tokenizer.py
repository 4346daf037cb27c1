"""The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer.model, or vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS, build_byte_level, split_merges
from svdengine.converters.checkpoint import explained, read_json, read_text
from svdengine.files.model_writer import StoredTokenizer
from svdengine.text.tokenizer_info import TokenizerInfo, TokenizerKind

_PRE_OF_CLASS = {"GPT2Tokenizer": "gpt-2", "OPTTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "MiniCPMTokenizer")  # begin with BOS unless told not to


@dataclass(frozen=True)
class _Loaded:
    """A tokenizer file, and what is in it."""

    kind: TokenizerKind
    data: bytes
    files: tuple[Path, ...]
    vocabulary: Mapping[str, int]  # every token by its text
    special_tokens: Mapping[str, int]
    adds_bos: bool | None  # None: the file does not say
    adds_eos: bool | None


def read_hf_tokenizer(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[StoredTokenizer, list[Path]]:
    """The tokenizer, and the files that it was read from. Raises ValueError."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    if (folder / "tokenizer.json").exists():
        loaded = _load_json(folder / "tokenizer.json", vocab_size)
    elif (folder / "tokenizer.model").exists():
        loaded = _load_sentencepiece(folder, settings, vocab_size)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        loaded = _load_byte_level(folder, settings, vocab_size)
    else:
        raise ValueError("found neither tokenizer.json nor tokenizer.model")
    info = _info(loaded, settings, config, generation, vocab_size)
    return StoredTokenizer(info, loaded.data, _chat_template(folder, settings)), list(loaded.files)


def _load_json(path: Path, vocab_size: int) -> _Loaded:
    text = read_text(path)
    with explained("tokenizer.json cannot be read"):
        tokenizer = Tokenizer.from_str(text)
    beyond = [i for i in tokenizer.get_added_tokens_decoder() if i >= vocab_size]
    if beyond or tokenizer.truncation or tokenizer.padding:
        # Padding tokens that the model has no embedding for must not reach it; nor must a prompt be cut.
        content = json.loads(text)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
        content["truncation"] = content["padding"] = None
        text = json.dumps(content, ensure_ascii=False)
        tokenizer = Tokenizer.from_str(text)
    return _from_tokenizer(tokenizer, text, (path,), vocab_size)


def _from_tokenizer(tokenizer: Tokenizer, text: str, files: tuple[Path, ...], vocab_size: int) -> _Loaded:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    _check_size(max(vocabulary.values(), default=-1), vocab_size)
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    return _Loaded(
        kind="tokenizer.json",
        data=text.encode("utf-8"),
        files=files,
        vocabulary=vocabulary,
        special_tokens=special,
        adds_bos=whole[: len(bare)] != bare,
        adds_eos=whole[len(whole) - len(bare) :] != bare,
    )


def _load_sentencepiece(folder: Path, settings: Mapping[str, Any], vocab_size: int) -> _Loaded:
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    data = path.read_bytes()
    processor = SentencePieceProcessor()
    with explained("tokenizer.model cannot be read"):
        processor.LoadFromSerializedProto(data)
    size = processor.GetPieceSize()
    _check_size(size - 1, vocab_size)
    vocabulary = {processor.IdToPiece(i): i for i in range(size)}
    special = {text: i for text, i in vocabulary.items() if processor.IsControl(i) or processor.IsUnknown(i)}
    added = {**read_json(folder / "added_tokens.json", optional=True), **_declared(settings)}
    added = {text: i for text, i in added.items() if text and _ids(i, vocab_size)}
    return _Loaded(
        kind="tokenizer.model",
        data=data,
        files=(path,),
        vocabulary={**vocabulary, **added},
        special_tokens={**special, **added},
        adds_bos=None,
        adds_eos=None,
    )


def _load_byte_level(folder: Path, settings: Mapping[str, Any], vocab_size: int) -> _Loaded:
    """The files of the first GPT-2 like tokenizers, from before tokenizer.json."""
    name = _class_name(settings) or "GPT2Tokenizer"
    if name not in _PRE_OF_CLASS:
        raise ValueError(f"found vocab.json and merges.txt of a {name}, for which tokenizer.json is needed")
    vocabulary = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = split_merges([line for line in lines if line and not line.startswith("#version")])
    named = {_content(settings.get(f"{role}_token")) for role in ("bos", "eos", "unk", "pad")}
    special = sorted(text for text in {*named, *_declared(settings)} if text and text in vocabulary)
    added = [AddedToken(text, special=True, normalized=False) for text in special]
    tokenizer = build_byte_level(vocabulary, merges, PRE_TOKENIZERS[_PRE_OF_CLASS[name]], added)
    files = (folder / "vocab.json", folder / "merges.txt")
    return _from_tokenizer(tokenizer, tokenizer.to_str(), files, vocab_size)


def _info(
    loaded: _Loaded,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    vocab_size: int,
) -> TokenizerInfo:
    def named(role: str) -> int | None:
        """The id of bos, eos or pad, as the tokenizer or else the model has it."""
        found = loaded.vocabulary.get(_content(settings.get(f"{role}_token")))
        others = _ids(config.get(f"{role}_token_id"), vocab_size) + _ids(generation.get(f"{role}_token_id"), vocab_size)
        return found if found is not None else next(iter(others), None)

    def adds(role: str, measured: bool | None) -> bool:
        stated = settings.get(f"add_{role}_token")
        if isinstance(stated, bool):
            return stated
        if measured is not None:
            return measured
        return role == "bos" and (_class_name(settings) or "LlamaTokenizer") in _BOS_CLASSES

    bos, eos = named("bos"), named("eos")
    ends = _ids(eos, vocab_size) + _ids(generation.get("eos_token_id"), vocab_size)
    ends += _ids(config.get("eos_token_id"), vocab_size)
    return TokenizerInfo(
        kind=loaded.kind,
        bos_id=bos,
        eos_id=eos,
        pad_id=named("pad"),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        add_bos=bos is not None and adds("bos", loaded.adds_bos),
        add_eos=eos is not None and adds("eos", loaded.adds_eos),
        special_tokens=dict(loaded.special_tokens),
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, the newest convention first."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = read_json(folder / "chat_template.json", optional=True).get(
        "chat_template", settings.get("chat_template")
    )
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _check_size(largest: int, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {largest}, the embedding only {vocab_size} rows")


def _class_name(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def _content(token: Any) -> str:
    """The text of a token, which is given as text or as an object; "" when there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _declared(settings: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens of tokenizer_config.json: text -> id."""
    decoder = settings.get("added_tokens_decoder")
    return {_content(token): int(i) for i, token in decoder.items()} if isinstance(decoder, dict) else {}


def _ids(value: Any, vocab_size: int) -> list[int]:
    """One id or a list of ids, without those that cannot be."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and 0 <= i < vocab_size]
