"""Text that every machine has: of several kinds, the same each time, chats by the model's template."""

from pathlib import Path

from small_checkpoints import write_hf

from svdengine.converters.hf_checkpoint import HfCheckpoint
from svdengine.converters.machine_text import machine_windows
from svdengine.text.tokenizer import Tokenizer


def test_windows_of_several_kinds(tmp_path: Path) -> None:
    stored = HfCheckpoint(write_hf(tmp_path / "hf")).tokenizer
    tokenizer = Tokenizer(stored.info, stored.data)
    windows = machine_windows(tokenizer, None, 3000, 128)
    assert windows == machine_windows(tokenizer, None, 3000, 128)
    assert 3000 <= sum(map(len, windows)) < 3128 and max(map(len, windows)) <= 128
    texts = [tokenizer.decode(ids) for ids in windows]
    assert len(set(texts)) == len(texts)
    assert texts[0].startswith('"You are late," said the old man')
    assert any("def " in text or "return" in text for text in texts[1::4])  # code comes in turn with the others
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    assert all(ids[: len(start)] == start for ids in windows)


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    stored = HfCheckpoint(write_hf(tmp_path / "hf")).tokenizer
    tokenizer = Tokenizer(stored.info, stored.data)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    broken = "{% for"
    with_template, plain = (
        [tokenizer.decode(ids) for ids in machine_windows(tokenizer, source, 40_000, 200)]
        for source in (template, broken)
    )
    assert any(text.startswith("[user]What should I consider") for text in with_template)
    assert any(text.startswith("User: What should I consider") for text in plain)
