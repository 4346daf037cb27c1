"""Progress on a terminal and off it, with a clock that the test moves."""

import io

from svdengine.commands.progress import StageProgress, time_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_off_a_terminal_a_line_comes_now_and_then_with_the_time_left() -> None:
    file, clock = io.StringIO(), Clock()
    report = StageProgress(file, clock)
    for done in range(1, 33):
        report("layers", done, 32)
        clock.now += 10
    lines = file.getvalue().splitlines()
    assert lines[0] == "layers 2/32, 5 min left" and lines[-1] == "layers 32/32" and len(lines) == 11
    assert lines[1] == "layers 5/32, 4 min left" and all("\r" not in line for line in lines)


def test_off_a_terminal_short_stages_say_nothing() -> None:
    file, clock = io.StringIO(), Clock()
    report = StageProgress(file, clock)
    for done in range(1, 5):
        report("statistics", done, 4)
        clock.now += 0.7
    report("layers", 1, 2)
    clock.now += 4
    report("layers", 2, 2)
    assert file.getvalue() == "layers 2/2\n"


def test_each_stage_begins_anew() -> None:
    file, clock = io.StringIO(), Clock()
    report = StageProgress(file, clock)
    report("statistics", 1, 2)
    clock.now = 100
    report("layers", 5, 10)  # taken up where it was left
    clock.now = 140
    report("layers", 6, 10)
    assert file.getvalue().splitlines() == ["layers 6/10, 3 min left"]


def test_on_a_terminal_one_line_moves_until_the_stage_ends() -> None:
    file, clock = Terminal(), Clock()
    report = StageProgress(file, clock)
    for done in range(1, 5):
        report("loss", done, 4)
        clock.now += 2
    text = file.getvalue()
    assert text.count("\r") == 4 and text.count("\n") == 1 and text.endswith("\n")
    assert "loss 3/4, 2 s left" in text


def test_no_time_is_guessed_from_nothing() -> None:
    file, clock = Terminal(), Clock()
    report = StageProgress(file, clock)
    report("layers", 1, 1)
    report("loss", 0, 8)
    assert file.getvalue().split() == ["layers", "1/1", "loss", "0/8"]


def test_times_in_words() -> None:
    assert [time_text(s) for s in (0, 40, 200, 7800)] == ["1 s", "40 s", "3 min", "2 h 10 min"]


def test_a_note_stands_behind_the_steps() -> None:
    file, clock = io.StringIO(), Clock()
    report = StageProgress(file, clock)
    report("windows", 1, 3, ", perplexity so far 9.5")
    clock.now = 60
    report("windows", 2, 3, ", perplexity so far 9.25")
    assert file.getvalue() == "windows 2/3, perplexity so far 9.25, 60 s left\n"
