"""The text that a predictor is calibrated on where none is given: many kinds, of which some are only measured on."""

from pathlib import Path

import pytest
from small_checkpoints import write_hf

from svdengine.converters.default_text import HELD_OUT, WRITTEN, default_text, written_tokens
from svdengine.converters.hf_checkpoint import HfCheckpoint
from svdengine.converters.machine_text import CODE, read_passages
from svdengine.converters.split_text import SplitText, one_in_five
from svdengine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    stored = HfCheckpoint(write_hf(folder / "hf")).tokenizer
    return Tokenizer(stored.info, stored.data)


def test_kinds_that_are_measured_on_are_never_fitted(tokenizer: Tokenizer) -> None:
    written = [[7] * 128] * 20
    text = default_text(tokenizer, None, 20_000, 128, written)
    assert 20_000 <= sum(map(len, text.windows)) < 20_300 and max(map(len, text.windows)) <= 128
    measured = {kind for kind, held_out in zip(text.kinds, text.held_out, strict=True) if held_out}
    fitted = {kind for kind, held_out in zip(text.kinds, text.held_out, strict=True) if not held_out}
    assert measured == set(HELD_OUT) and not measured & fitted and {CODE, WRITTEN, "stories"} <= fitted
    assert text == default_text(tokenizer, None, 20_000, 128, written)
    assert sum(map(len, text.fitting)) == pytest.approx(16_000, abs=128)


def test_no_kind_has_more_than_its_share(tokenizer: Tokenizer) -> None:
    text = default_text(tokenizer, None, 8000, 128, [[7] * 128] * written_tokens(8000))
    count = dict.fromkeys(text.kinds, 0)
    for window, kind in zip(text.windows, text.kinds, strict=True):
        count[kind] += len(window)
    fitted = [tokens for kind, tokens in count.items() if kind not in HELD_OUT]
    assert max(fitted) - min(fitted) <= 2 * 128


def test_the_text_is_rich_in_kinds() -> None:
    passages = read_passages()
    assert set(HELD_OUT) < set(passages) and len(passages) >= 10
    assert all(len(texts) >= 5 and min(map(len, texts)) > 30 for texts in passages.values())
    every = [text for texts in passages.values() for text in texts]
    assert len(set(every)) == len(every)


def test_held_out_kinds_share_the_tokens_that_are_wanted() -> None:
    windows = [[1] * 100] * 30 + [[2] * 40] * 10
    text = SplitText(windows, ["long"] * 30 + ["short"] * 10, [True] * 40)
    found = text.held_out_kinds(1600)
    assert {kind: sum(map(len, part)) for kind, part in found.items()} == {"long": 800, "short": 400}
    assert {kind: sum(map(len, part)) for kind, part in text.held_out_kinds(100).items()} == {"long": 50, "short": 40}
    assert one_in_five([[1, 2]] * 4).held_out_kinds(100) == {}


def test_more_is_held_out_where_more_is_to_be_measured_but_no_more_than_a_third(tokenizer: Tokenizer) -> None:
    for measured, expected in ((0, 1600), (2000, 2000), (6000, 2667)):
        text = default_text(tokenizer, None, 8000, 128, [[7] * 128] * 5, measured)
        assert sum(map(len, text.fitting)) == pytest.approx(8000 - expected, abs=150)
