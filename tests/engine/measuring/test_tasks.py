"""Task files, and accuracy on both paths of the FFN."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import LLM, RequestError
from svdengine.measuring.task_scores import _likelihood, run_task, score_tasks
from svdengine.measuring.tasks import ChoiceTask, GenerateTask, read_tasks
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
        ({"prompt": "a"}, "either choices and answer, or match"),
        ({**CHOICE, "match": "x"}, "either choices and answer, or match"),
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
    scores, pairs = score_tasks(llm, tasks, ("dense", "sparse"), progress=lambda *at: seen.append(at))
    assert [(s.task, s.ffn, s.count) for s in scores] == [
        (task, ffn, count)
        for task, count in (("choice", 2), ("generate", 1), ("sums", 1))
        for ffn in ("dense", "sparse")
    ]
    assert scores[2].correct == 1 and scores[2].accuracy == 1.0 and scores[2].accuracy_normalized is None
    assert scores[0].accuracy_normalized in (0.0, 0.5, 1.0)
    assert [sum((p.both, p.only_dense, p.only_sparse, p.neither)) for p in pairs] == [2, 1, 1]
    assert seen == [(i, 4) for i in range(1, 5)] and llm.ffn == "auto"
    assert score_tasks(llm, tasks, ("dense",))[1] == []


def test_a_task_that_does_not_fit_is_named(llm: LLM, tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path / "t.jsonl", CHOICE, {**CHOICE, "prompt": "hello " * 200}))
    with pytest.raises(RequestError, match=r"the task in line 2: .* do not fit the context of 128"):
        score_tasks(llm, tasks, ("dense",))
