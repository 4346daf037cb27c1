"""The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer.model, or vocab.json with merges.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS, build_byte_level, split_merges
from svdengine.converters.checkpoint import explained, read_json, read_text
from svdengine.converters.turn_end import END_TEXTS, with_turn_end
from svdengine.errors import quoted
from svdengine.files.model_writer import StoredTokenizer
from svdengine.text.tokenizer_info import TokenizerInfo, TokenizerKind

# What a class takes where tokenizer_config.json does not name a token, and the class of models that have their own.
_DEFAULTS = {
    "GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
}
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "opt": "GPT2Tokenizer"}
_TEMPLATE_ROLES = ("unk", "sep", "pad", "cls", "mask")  # besides bos and eos
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
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
    prefix: int | None = None  # the one token that the file puts first
    added_tokens: Mapping[str, int] = field(default_factory=dict)  # beside tokenizer.model, and no control tokens


def read_hf_tokenizer(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[StoredTokenizer, list[Path]]:
    """The tokenizer, and the files that it was read from. Raises ValueError."""
    special = read_json(folder / "special_tokens_map.json", optional=True)
    settings = _settings(folder, special)
    if (folder / "tokenizer.json").exists():
        loaded = _load_json(folder / "tokenizer.json", settings, vocab_size)
    elif (folder / "tokenizer.model").exists():
        loaded = _load_sentencepiece(folder, settings, vocab_size)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        loaded = _load_byte_level(folder, settings, vocab_size)
    else:
        raise ValueError("found neither tokenizer.json nor tokenizer.model")
    info = _info(loaded, settings, config, generation, vocab_size)
    # Of the names that settings, config and the older file have for the end, each ends an answer.
    more = [loaded.vocabulary.get(_content(special.get("eos_token")))]
    more += [i for text, i in loaded.special_tokens.items() if text in END_TEXTS]
    ends = dict.fromkeys([*info.eos_token_ids, *(i for end in more for i in _ids(end, vocab_size))])
    info = replace(info, eos_token_ids=tuple(ends))
    return with_turn_end(StoredTokenizer(info, loaded.data, _chat_template(folder, settings))), list(loaded.files)


def _settings(folder: Path, special: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, and what the older special_tokens_map.json says.

    The latter counts more where the former does not list the tokens, and less where it does.
    """
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    return {**special, **settings} if "added_tokens_decoder" in settings else {**settings, **special}


def _load_json(path: Path, settings: Mapping[str, Any], vocab_size: int) -> _Loaded:
    text = read_text(path)
    with explained("tokenizer.json cannot be read"):
        tokenizer = Tokenizer.from_str(text)
    content = json.loads(text)
    before = content["added_tokens"]
    # Padding tokens that the model has no embedding for must not reach it; nor must a prompt be cut.
    kept = [token for token in before if token["id"] < vocab_size]
    after = [token | _flags(token, settings) for token in kept]
    known = {token["content"] for token in after}
    named = {text: tokenizer.token_to_id(text) for text in _named_special(settings) - known}
    plain = dict.fromkeys(_FLAGS, False) | {"special": True}
    after += [{"id": i, "content": text, **plain} for text, i in named.items() if _ids(i, vocab_size)]
    after.sort(key=lambda token: token["id"])
    if after != before or tokenizer.truncation or tokenizer.padding:
        content["added_tokens"] = after
        content["truncation"] = content["padding"] = None
        text = json.dumps(content, ensure_ascii=False)
        with explained("tokenizer.json cannot be read"):
            tokenizer = Tokenizer.from_str(text)
    return _from_tokenizer(tokenizer, text, (path,), vocab_size)


def _flags(token: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool]:
    """What tokenizer_config.json says of a token of tokenizer.json: it is right where the two differ."""
    declared = _decoder(settings).get(token["id"], {})
    flags = {name: declared[name] for name in _FLAGS if isinstance(declared.get(name), bool)}
    same = declared.get("content") == token["content"]
    return (flags if same else {}) | ({"special": True} if token["content"] in _named_special(settings) else {})


def _from_tokenizer(tokenizer: Tokenizer, text: str, files: tuple[Path, ...], vocab_size: int) -> _Loaded:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    _check_size(max(vocabulary.values(), default=-1), vocab_size)
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare), 0)
    return _Loaded(
        kind="tokenizer.json",
        data=text.encode("utf-8"),
        files=files,
        vocabulary=vocabulary,
        special_tokens=special,
        adds_bos=at > 0,
        adds_eos=at + len(bare) < len(whole),
        prefix=whole[0] if at == 1 else None,
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
    texts, controls = _added_to_sentencepiece(folder, settings, vocab_size)
    return _Loaded(
        kind="tokenizer.model",
        data=data,
        files=(path,),
        vocabulary={**vocabulary, **texts, **controls},
        special_tokens={**special, **controls},
        adds_bos=_stated(settings, "bos"),
        adds_eos=_stated(settings, "eos"),
        added_tokens={text: i for text, i in texts.items() if vocabulary.get(text) != i},
    )


def _added_to_sentencepiece(
    folder: Path, settings: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens beside tokenizer.model that are text, and those that are control tokens: text -> id.

    The older added_tokens.json does not say which is which: there, what has a role or looks like <|this|> is control.
    """
    named, declared = _named_special(settings), _decoder(settings)
    texts: dict[str, int] = {}
    controls: dict[str, int] = {}
    for text, i in read_json(folder / "added_tokens.json", optional=True).items():
        control = text in named or (text.startswith("<|") and text.endswith("|>"))
        (controls if control else texts)[text] = i
    for i, token in declared.items():
        text = _content(token)
        texts.pop(text, None), controls.pop(text, None)
        (texts if token.get("special") is False and text not in named else controls)[text] = i

    def usable(tokens: dict[str, int]) -> dict[str, int]:
        return {text: i for text, i in tokens.items() if text and _ids(i, vocab_size) == [i]}

    return usable(texts), usable(controls)


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
    loaded = _from_tokenizer(tokenizer, tokenizer.to_str(), files, vocab_size)
    return replace(loaded, adds_bos=_stated(settings, "bos") or False, adds_eos=_stated(settings, "eos") or False)


def _info(
    loaded: _Loaded,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    vocab_size: int,
) -> TokenizerInfo:
    name = _CLASS_OF_MODEL.get(str(config.get("model_type")), _class_name(settings))
    byte_level = loaded.kind == "tokenizer.json" and b'"ByteLevel"' in loaded.data
    defaults = {} if name == "LlamaTokenizer" and byte_level else _DEFAULTS.get(name, {})
    if loaded.kind == "tokenizer.model":
        defaults = _DEFAULTS["LlamaTokenizer"]

    def text_of(role: str) -> str:
        """How the token that the tokenizer has for a role is written; "" when it has none."""
        key = f"{role}_token"
        return _content(settings[key]) if key in settings else defaults.get(role, "")

    def named(role: str) -> int | None:
        """The id of the token that the tokenizer has for bos, eos or pad."""
        return loaded.vocabulary.get(text_of(role))

    def of_model(role: str) -> list[int]:
        """The ids that the model has for it."""
        return _ids(config.get(f"{role}_token_id"), vocab_size) + _ids(generation.get(f"{role}_token_id"), vocab_size)

    def either(role: str) -> int | None:
        found = named(role)
        return found if found is not None else next(iter(of_model(role)), None)

    # What the tokenizer's file does is what was trained; where it does nothing itself, the settings are asked.
    add_bos = loaded.adds_bos if loaded.adds_bos is not None else (name or "LlamaTokenizer") in _BOS_CLASSES
    bos = loaded.prefix if add_bos and loaded.prefix is not None and named("bos") is None else either("bos")
    eos = either("eos")
    ends = _ids(eos, vocab_size) + _ids(generation.get("eos_token_id"), vocab_size)
    ends += _ids(config.get("eos_token_id"), vocab_size)
    return TokenizerInfo(
        kind=loaded.kind,
        bos_id=bos,
        eos_id=eos,
        pad_id=either("pad"),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        add_bos=bos is not None and add_bos,
        add_eos=eos is not None and bool(loaded.adds_eos),
        special_tokens=dict(loaded.special_tokens),
        added_tokens=dict(loaded.added_tokens),
        template_tokens={f"{role}_token": text_of(role) for role in _TEMPLATE_ROLES if text_of(role)},
        unnamed=tuple(role for role, id_ in (("bos", bos), ("eos", eos)) if id_ is not None and named(role) is None),
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, the newest convention first."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = read_json(folder / "chat_template.json", optional=True).get(
        "chat_template", settings.get("chat_template")
    )
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
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


def _stated(settings: Mapping[str, Any], role: str) -> bool | None:
    """Whether the settings say that bos or eos is added; None: they do not say."""
    stated = settings.get(f"add_{role}_token")
    return stated if isinstance(stated, bool) else None


def _decoder(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The added tokens of tokenizer_config.json, by id. Raises ValueError when an id is no number."""
    decoder = settings.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return {}
    odd = next((i for i in decoder if not (i.isascii() and i.isdigit() and len(i) < 19)), None)
    if odd is not None:
        raise ValueError(f"tokenizer_config.json: added_tokens_decoder: {quoted(odd)} is not a token id")
    return {int(i): token for i, token in decoder.items() if isinstance(token, dict)}


def _declared(settings: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens of tokenizer_config.json: text -> id."""
    return {_content(token): i for i, token in _decoder(settings).items()}


def _named_special(settings: Mapping[str, Any]) -> frozenset[str]:
    """Texts that have a role, and so are control tokens whatever else is said of them."""
    found = [_content(settings.get(f"{role}_token")) for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        found += map(_content, more if isinstance(more, list) else more.values() if isinstance(more, dict) else ())
    return frozenset(text for text in found if text)


def _ids(value: Any, vocab_size: int) -> list[int]:
    """One id or a list of ids, without those that cannot be."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and 0 <= i < vocab_size]
