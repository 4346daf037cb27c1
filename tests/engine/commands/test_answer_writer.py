"""Answers on a terminal: words are not cut, nothing is lost, and Markdown is rendered where it is sure."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdengine.commands.answer_writer import AnswerWriter

BOLD, ITALIC, CODE, FAINT, END = "\x1b[1m", "\x1b[3m", "\x1b[36m", "\x1b[2m", "\x1b[0m"


def written(*pieces: str, width: int | None = 40, styled: bool = True) -> str:
    out: list[str] = []
    writer = AnswerWriter(out.append, width=width, styled=styled)
    for piece in pieces:
        writer.push(piece)
    writer.close()
    return "".join(out)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a **bold** word", f"a {BOLD}bold{END} word"),
        ("**all of it**", f"{BOLD}all{END}{BOLD} {END}{BOLD}of{END}{BOLD} {END}{BOLD}it{END}"),
        ("an *em*, `x = 1`.", f"an {ITALIC}em{END}, {CODE}x{END}{CODE} {END}{CODE}={END}{CODE} {END}{CODE}1{END}."),
        ("2 * 3 * 4", "2 * 3 * 4"),
        ("x**2 and y**2", "x**2 and y**2"),
        ("a ** b ** c", "a ** b ** c"),
        ("snake_case_name", "snake_case_name"),
        ("**open and no end", "**open and no end"),
        ("## Head", f"{BOLD}Head{END}"),
        ("#hashtag", "#hashtag"),
        ("> said", f"{FAINT}> {END}said"),
        ("```py\na  *b* `c`\n```\nafter", f"{FAINT}```py{END}\n{CODE}a  *b* `c`{END}\n{FAINT}```{END}\nafter"),
        ("| a | **b** |", "| a | **b** |"),
    ],
)
def test_markdown(text: str, shown: str) -> None:
    assert written(text) == shown
    assert written(*text) == shown  # letter by letter


def test_words_go_to_the_next_line() -> None:
    text = "The quick brown fox jumps over the lazy dog and runs away from it."
    lines = written(text, width=20).split("\n")
    assert all(len(line) <= 20 for line in lines) and " ".join(line.strip() for line in lines) == text
    assert written("x" * 50 + " y", width=20) == "x" * 50 + "\ny"
    item = written("- one two three four five six", width=12).split("\n")
    assert item[0].startswith("- one") and all(line.startswith("  ") for line in item[1:])
    assert written("12. one two three", width=10).split("\n")[1].startswith("    ")
    assert plain(written("**one two** three", width=8)).split() == ["one", "two", "three"]
    code = "```\n" + "long line of code " * 5 + "\n```"
    assert plain(written(code, width=20)) == code
    assert written("漢字" * 12, width=20).count("\n") == 2


def test_off_a_terminal_nothing_is_changed() -> None:
    text = "a **b**\n```\nx\n```\n" + "word " * 50
    assert written(*text, width=None) == text


@settings(deadline=None)
@given(
    st.lists(st.text("ab *`_#->|.1\n~漢", max_size=12), max_size=12),
    st.integers(5, 40),
    st.booleans(),
)
def test_pieces_do_not_matter_and_no_letter_is_lost(pieces: list[str], width: int, styled: bool) -> None:
    text = "".join(pieces)
    assert written(*pieces, width=width, styled=styled) == written(text, width=width, styled=styled)
    shown = plain(written(text, width=width, styled=styled))
    keep = str.maketrans("", "", "*`# \n") if styled else str.maketrans("", "", " \n")
    assert shown.translate(keep) == text.translate(keep)


def test_most_of_an_answer_is_there_before_its_end() -> None:
    out: list[str] = []
    writer = AnswerWriter(out.append, width=80, styled=True)
    writer.push("Paris is the capital of Fra")
    assert "".join(out) == "Paris is the capital of "
    writer.push("nce, and **no end ")
    assert "".join(out) == "Paris is the capital of France, and "
    writer.push("x " * 200)
    assert "**no end" in "".join(out)
