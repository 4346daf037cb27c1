"""Task files, and accuracy on both paths of the FFN."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import LLM, RequestError
from svdengine.measuring.code_runner import run_program
from svdengine.measuring.task_scores import _likelihood, answer_tasks, mcnemar, pair, run_task, score
from svdengine.measuring.tasks import ChoiceTask, CodeTask, GenerateTask, read_tasks, shipped_tasks
from svdengine.scheduling.sampler import negative_log_likelihood


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_sparse_model(tmp_path_factory.mktemp("tasks") / "sparse.svdp")
    with svdengine.load(path, device="reference", context=128) as llm:
        yield llm


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def generate_task(match: str, kind: Any) -> GenerateTask:
    return GenerateTask(1, "t", "hello", False, match, kind, 6, ())


CHOICE = {"prompt": "hello", "choices": [" world", " user"], "answer": 1}
MATCH = {"prompt": "what is 2 + 2?", "match": 4, "max_tokens": 5, "stop": ["\n"], "task": "sums", "chat": True}
CODE = {"prompt": "def f(n):\n", "tests": "assert f(1) == 2", "max_tokens": 8}


def test_a_file_of_both_kinds(tmp_path: Path) -> None:
    first, second, third = read_tasks(write(tmp_path / "t.jsonl", CHOICE, "", MATCH, {**CHOICE, "answer": " world"}))
    assert first == ChoiceTask(1, "choice", "hello", False, (" world", " user"), 1)
    assert second == GenerateTask(3, "sums", "what is 2 + 2?", True, "4", "number", 5, ("\n",))
    assert isinstance(third, ChoiceTask) and third.answer == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: expected a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "occurs twice"),
        ({"choices": ["a", "b"], "answer": 0}, "prompt must be a text"),
        ({"prompt": "a"}, "either choices and answer, or match, or tests"),
        ({**CHOICE, "match": "x"}, "either choices and answer, or match, or tests"),
        ({**CHOICE, "answer": 2}, "an index in 0..1"),
        ({**CHOICE, "answer": True}, "an index in 0..1"),
        ({**CHOICE, "answer": "c"}, "'c' is not one of the choices"),
        ({**CHOICE, "choices": ["a"]}, "at least two"),
        ({**CHOICE, "stop": ["a"]}, "unknown field 'stop'"),
        ({**MATCH, "kind": "fuzzy"}, "exact, regex or number"),
        ({**MATCH, "match": "four", "kind": "number"}, "must be a number, found 'four'"),
        ({**MATCH, "match": "(", "kind": "regex"}, "no regular expression"),
        ({**MATCH, "match": ""}, "match must be a text"),
        ({**MATCH, "max_tokens": 0}, "max_tokens must be"),
        ({**MATCH, "stop": "a"}, "stop must be a list"),
        ({**MATCH, "chat": 1}, "chat true or false"),
        ({**MATCH, "tests": "assert 1"}, "either choices and answer, or match, or tests"),
        ({**CODE, "tests": "f(1)"}, "code with assertions"),
        ({**CODE, "tests": "assert f("}, "tests are no Python code"),
        ({**CODE, "kind": "exact"}, "unknown field 'kind'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(RequestError, match="line 2") as caught:
        read_tasks(write(tmp_path / "t.jsonl", CHOICE, record))
    assert message in str(caught.value)


def test_files_that_hold_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"prompt": "caf\xe9"}')
    for name, message in (("missing", "cannot read"), ("empty", "holds no tasks"), ("latin", "line 1: 'utf-8'")):
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(RequestError, match=message):
            read_tasks(tmp_path / name)


def test_matches() -> None:
    assert generate_task("yes ", "exact").matches(" yes\n") and not generate_task("yes", "exact").matches("yes!")
    assert generate_task("ye+s", "regex").matches("oh, yeees!") and not generate_task("^yes", "regex").matches("oh yes")
    number = generate_task("1200", "number")
    assert number.matches("12 times 100 is 1,200.") and number.matches("so 1200.0") and not number.matches("1200 or 3")
    assert not number.matches("none") and generate_task("-0.5", "number").matches("it is -.5")


def test_likelihoods_are_those_of_the_logits(llm: LLM) -> None:
    task = ChoiceTask(1, "t", "hello", False, (" world and", " user"), 0)
    tokens = llm.tokenizer.encode("hello world and")
    start = len(llm.tokenizer.encode("hello"))
    expected = -negative_log_likelihood(llm.logits(tokens)[start - 1 : -1], tokens[start:])
    assert _likelihood(llm, task, " world and", 0.0) == pytest.approx(expected, rel=1e-4)
    values = [_likelihood(llm, task, choice, 0.0) for choice in task.choices]
    assert run_task(llm, task).correct == (values[0] > values[1])


def test_both_paths(llm: LLM, tmp_path: Path) -> None:
    text = llm.generate("hello", temperature=0.0, max_tokens=5)[0].text
    right = {"prompt": "hello", "match": text, "max_tokens": 5}
    tasks = read_tasks(write(tmp_path / "t.jsonl", CHOICE, {**CHOICE, "answer": 0, "chat": True}, right, MATCH))
    seen: list[tuple[int, int]] = []
    answers = answer_tasks(llm, tasks, ("dense", "sparse"), progress=lambda *at: seen.append(at))
    scores = sorted((s for ffn in answers for s in score(tasks, answers[ffn], ffn)), key=lambda s: s.task)
    pairs = pair(tasks, ("dense", answers["dense"]), ("sparse", answers["sparse"]))
    assert [(s.task, s.ffn, s.count) for s in scores] == [
        (task, ffn, count)
        for task, count in (("choice", 2), ("generate", 1), ("sums", 1))
        for ffn in ("dense", "sparse")
    ]
    assert scores[2].correct == 1 and scores[2].accuracy == 1.0 and scores[2].accuracy_normalized is None
    assert scores[0].accuracy_normalized in (0.0, 0.5, 1.0)
    assert [sum((p.both, p.only_first, p.only_second, p.neither)) for p in pairs] == [2, 1, 1]
    assert seen == [(i, 4) for i in range(1, 5)] and llm.ffn == "auto"


def test_a_task_that_does_not_fit_is_named(llm: LLM, tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path / "t.jsonl", CHOICE, {**CHOICE, "prompt": "hello " * 200}))
    with pytest.raises(RequestError, match=r"the task in line 2: .* do not fit the context of 128"):
        answer_tasks(llm, tasks, ("dense",))


def code_task(prompt: str, chat: bool) -> CodeTask:
    return CodeTask(1, "t", prompt, chat, "assert f(1) == 2", 8, ())


def test_the_program_in_an_answer() -> None:
    chat = code_task("Write f.", chat=True)
    assert chat.program("Here:\n```python\ndef f(n): ...\n```\nand\n```\nother\n```") == "def f(n): ...\n"
    assert chat.program("```\ndef f(n): ...") == "def f(n): ...", "an answer that was cut"
    assert chat.program("def f(n): ...") == "def f(n): ..."
    assert code_task("def f(n):\n", chat=False).program("    return 2") == "def f(n):\n    return 2"


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def f(n): return n + 1", ""),
        ("import math, collections, json, re, itertools\ndef f(n): return math.floor(n) + 1", ""),
        ("def f(n): return n", "AssertionError"),
        ("def f(n) return n", "SyntaxError"),
        ("x = 1", "NameError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("input()", "EOFError"),
        ("while True: pass", "took more than"),
        ("x = [0] * 10**9", "needs more than"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('made', 'w')", "PermissionError"),
        ("import os\nos.remove('x')", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import ctypes", "PermissionError"),
        ("import sys\nsys.stdout.write('[\"x\"]'); print(1)\ndef f(n): return 2", ""),
    ],
)
def test_programs_are_run_apart(program: str, problem: str) -> None:
    found = run_program(program, "assert f(1) == 2")
    assert (problem in found and bool(found) == bool(problem)) or problem == found, found


def test_tasks_of_code(llm: LLM, tmp_path: Path) -> None:
    (task,) = read_tasks(write(tmp_path / "t.jsonl", CODE))
    assert task == CodeTask(1, "code", "def f(n):\n", False, "assert f(1) == 2", 8, ())
    assert not run_task(llm, task).correct
    whole = code_task("def f(n):\n    return n + 1\n#", chat=False)
    text = llm.generate(whole.prompt, temperature=0.0, max_tokens=8)[0].text
    assert run_task(llm, whole).correct == ("\n" not in text)


def test_shipped_tasks_are_right() -> None:
    """Every task of code is passed by its solution, and not by one that gives nothing."""
    solutions = json.loads((Path(__file__).parents[2] / "data" / "code_solutions.json").read_text())
    assert set(shipped_tasks()) == {"arithmetic", "choices", "code"}
    for name in shipped_tasks():
        tasks = read_tasks(Path(name))
        assert 60 <= len(tasks) <= 100 and len({task.prompt for task in tasks}) == len(tasks)
    code = [task for task in read_tasks(Path("code")) if isinstance(task, CodeTask)]
    assert len(code) == len(solutions)
    for task in code:
        (name,) = [name for name in solutions if f" {name}(" in task.prompt]
        for body, right in ((solutions[name], True), (f"def {name}(*_):\n    return None", False)):
            names: dict[str, Any] = {}
            exec(body, names)
            try:
                exec(task.tests, names)
            except (AssertionError, TypeError):
                assert not right, task
            else:
                assert right, task


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar(a: int, b: int) -> None:
    p = mcnemar(a, b)
    assert p == mcnemar(b, a) and 0 < p <= 1
    assert p == pytest.approx(min(1.0, 2 * sum(_coin(a + b, k) for k in range(min(a, b) + 1))))
    assert mcnemar(0, 10) == pytest.approx(2 / 1024) and mcnemar(5, 5) == 1.0 and mcnemar(0, 0) == 1.0


def _coin(throws: int, heads: int) -> float:
    ways = 1.0
    for i in range(heads):
        ways = ways * (throws - i) / (i + 1)
    return ways / 2**throws
