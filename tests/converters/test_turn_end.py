"""What ends an answer: the token that the chat template writes there, whatever the config calls the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import TOKENS, checkpoint_weights, gguf_tensors, tokenizer_json, write_gguf, write_hf

from svdengine.converters.conversion import open_checkpoint
from svdengine.text.tokenizer_info import TokenizerInfo

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }} <over>\n{% endfor %}"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
END, START = len(TOKENS), len(TOKENS) + 1  # ids of the two tokens that are added


def folder(path: Path, texts: tuple[str, str], special: bool = True, **settings: Any) -> Path:
    """A folder with </s> (2) as the end of everything in the config, and two more tokens."""
    write_hf(path)
    content = json.loads(tokenizer_json())
    content["added_tokens"] += [
        {"id": END + i, "content": text, "special": special, **FLAGS} for i, text in enumerate(texts)
    ]
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.0}))
    return path


def ends(path: Path) -> tuple[int, ...]:
    return open_checkpoint(path).tokenizer.info.eos_token_ids


def info(path: Path) -> TokenizerInfo:
    return open_checkpoint(path).tokenizer.info


IM = ("<|im_end|>", "<|im_start|>")
DECODER = {str(END + i): {"content": text, "special": True, **FLAGS} for i, text in enumerate(IM)}


@pytest.mark.parametrize("settings", [{}, {"added_tokens_decoder": DECODER}, {"eos_token": "</s>"}])
@pytest.mark.parametrize("special", [True, False])
def test_turbosparse(tmp_path: Path, settings: dict[str, Any], special: bool) -> None:
    """config.json says 2, generation_config.json nothing, special_tokens_map.json <|im_end|>."""
    path = folder(tmp_path / "hf", IM, special, **settings)
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", **FLAGS}}))
    assert set(ends(path)) == {2, END}
    assert info(path).special_tokens["<|im_end|>"] == END


def test_the_older_file_counts_less_where_the_newer_one_lists_the_tokens(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", IM, eos_token="</s>", added_tokens_decoder=DECODER)
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<unk>"}))
    assert (info(path).eos_id, info(path).pad_id) == (2, 0)


def test_bamboo(tmp_path: Path) -> None:
    """A base model: its map says </s>, and there is no template."""
    path = folder(tmp_path / "hf", ("<x>", "<y>"), eos_token="</s>")
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert ends(path) == (2,)


@pytest.mark.parametrize(
    ("texts", "template", "expected"),
    [
        (IM, CHATML, {2, END}),
        (("<over>", "<turn>"), TURNS, {2, END}),
        (("<over>", "<turn>"), "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {2}),
        (("<over>", "<turn>"), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {2}),
        (("<over>", "<turn>"), "{% for m in messages %}<turn>{{ m.content }}\n--<over>{% endfor %}", {2}),
        (("<over>", "<over>b"), "{% for m in messages %}{{ m.content }}<over>b{% endfor %}", {2, START}),
        (("<over>", "<turn>"), "{{ raise_exception('not this way') }}", {2}),
        (("<over>", "<turn>"), "{% for m in messages %}", {2}),
        (("<over>", "<turn>"), "{{ 'four<over>' * 10 ** 9 }}", {2}),
        (("<|eot_id|>", "<turn>"), None, {2, END}),
        (("<over>", "<turn>"), None, {2}),
    ],
    ids=range(11),
)
def test_what_the_template_writes_after_an_answer(
    tmp_path: Path, texts: tuple[str, str], template: str | None, expected: set[int]
) -> None:
    settings = {} if template is None else {"chat_template": template}
    path = folder(tmp_path / "hf", texts, bos_token="<s>", eos_token="</s>", **settings)
    assert set(ends(path)) == expected


@pytest.mark.parametrize(
    ("texts", "template", "expected"),
    [
        (IM, CHATML, {2, END}),
        (("<over>", "<turn>"), TURNS, {2, END}),
        (("<over>", "<turn>"), None, {2}),
        (IM, None, {2, END}),
    ],
)
def test_gguf(tmp_path: Path, texts: tuple[str, str], template: str | None, expected: set[int]) -> None:
    tokens, types = [*TOKENS, *texts], [3] * 3 + [1] * (len(TOKENS) - 3) + [3, 3]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.chat_template": template}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(checkpoint_weights()), **fields)
    assert set(ends(path)) == expected
