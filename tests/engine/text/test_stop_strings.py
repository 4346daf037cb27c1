"""Stop strings: the shown text does not depend on how it was cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from svdengine.text.stream_decoder import StopStrings

_text = st.text("ab\n", max_size=20)


def letter_by_letter(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first stop string that is complete ends the text, the longest if several are."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.lists(_text, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_any_split_gives_the_same_text(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (shown, matcher.found) == letter_by_letter("".join(pieces), stops)


@given(_text, st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4))
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    final, _ = letter_by_letter(text, stops)
    shown = ""
    for letter in text:
        shown += matcher.push(letter)
        assert final.startswith(shown)
    assert matcher.found is None or matcher.push("more") == ""


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopStrings(["User:"])
    assert matcher.push("Hello U") == "Hello "
    assert matcher.push("ser") == ""
    assert matcher.push("s and") == "Users and"
    assert matcher.push("\nUser: x") == "\n"
    assert matcher.found == "User:"
