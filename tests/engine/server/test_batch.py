"""svdengine batch: order, errors on their lines, and going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_model import write_tiny_model

import svdengine
from svdengine.cli import main
from svdengine.errors import RequestError
from svdengine.files.model_file import read_model_file
from svdengine.scheduling.engine_loop import Engine
from svdengine.server.batch_run import BatchRun, finished_lines, read_lines
from svdengine.server.completion_job import CompletionJob
from svdengine.text.tokenizer import Tokenizer

GREEDY = ("--temperature", "0", "-n", "6", "--ignore-eos")
LINES: list[Any] = [
    {"prompt": "hello", "max_tokens": 30},
    {"messages": [{"role": "user", "content": "hello"}], "custom_id": "talk"},
    {
        "custom_id": "as OpenAI's",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}], "n": 2},
    },
    {"prompt": "hello", "temperature": -1},
    {"prompt": "once", "stream": True},
    {"url": "/v1/embeddings", "body": {"input": "x"}},
    {"method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}},
    ["no object"],
    {},
    {"prompt": "x " * 9999},
    *({"prompt": f"hello {i}", "max_tokens": 1 + i % 5} for i in range(20)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("batch") / "tiny.svdp")


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in LINES) + "{broken", encoding="utf-8")
    return path


def run(*arguments: Any) -> Result:
    return CliRunner(env={"SVDENGINE_DEVICE": "reference"}).invoke(main, ["batch", *map(str, arguments)])


def test_answers_in_order(model: Path, requests: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run(requests, model, "-o", output, *GREEDY)
    assert result.exit_code == 0, result.output
    assert "8 lines could not be answered" in result.stderr
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [f["line"] for f in found] == [1 + 2 * i for i in range(len(LINES) + 1)]
    assert [f["custom_id"] for f in found[:4]] == [None, "talk", "as OpenAI's", None]
    bodies = [f["response"]["body"] for f in found]
    assert all((f["error"] is None) == (f["response"]["status_code"] == 200) for f in found)
    assert [i for i, f in enumerate(found) if f["error"]] == [3, 4, 5, 6, 7, 8, 9, 30]
    for i, message in ((3, "temperature"), (4, "stream"), (5, "url must"), (6, "POST"), (8, "prompt"), (9, "context")):
        assert message in found[i]["error"] and bodies[i]["error"]["message"] == found[i]["error"]
    with svdengine.load(model, device="reference") as llm:
        expected = llm.generate("hello", temperature=0, max_tokens=30, ignore_eos=True)[0]
        assert bodies[0]["choices"][0]["text"] == expected.text
        chat = llm.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=6, ignore_eos=True).text
    assert [c["message"]["content"] for c in [*bodies[1]["choices"], *bodies[2]["choices"]]] == [chat] * 3
    assert [b["usage"]["completion_tokens"] for b in bodies[10:30]] == [1 + i % 5 for i in range(20)]
    assert bodies[2]["model"] == "tiny"


def test_control_tokens_in_prompts_count_where_that_is_said(model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = "<|im_start|>user"
    asked: list[Any] = [{"prompt": text}, {"prompt": text, "parse_special": False}, {"messages": LINES[1]["messages"]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    assert run(source, model, "-o", output, "--special", *GREEDY).exit_code == 0
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    lengths = [each["response"]["body"]["usage"]["prompt_tokens"] for each in found]
    with svdengine.load(model, device="reference") as llm:
        assert lengths[:2] == [len(llm.tokenizer.encode(text, special)) for special in (True, False)]


@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_going_on(model: Path, requests: Path, tmp_path: Path, kept: int) -> None:
    whole, partial = tmp_path / "whole.jsonl", tmp_path / "partial.jsonl"
    run(requests, model, "-o", whole, *GREEDY)
    lines = whole.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    result = run(requests, model, "-o", partial, *GREEDY)
    assert result.exit_code == 0, result.output
    assert (f"{kept} of 31 lines were answered before" in result.stderr) == (kept > 0)

    def texts(path: Path) -> list[Any]:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(f["line"], f["error"], f["response"]["body"].get("choices")) for f in found]

    assert texts(partial) == texts(whole)
    before = partial.read_bytes()
    assert run(requests, model, "-o", partial, *GREEDY).exit_code == 0 and partial.read_bytes() == before


def test_answers_to_other_requests_are_left_alone(model: Path, requests: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for text in ('{"input": "0"}\n', "[]\n", "hello\n"):
        output.write_text(text, encoding="utf-8")
        result = run(requests, model, "-o", output)
        assert result.exit_code == 1 and "is no answer to line 1" in result.stderr
        assert output.read_text(encoding="utf-8") == text
    with pytest.raises(RequestError, match="no answer"):
        finished_lines(requests, output)


def test_a_file_that_is_no_output_is_left_alone(model: Path, requests: Path, tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    for text in ("my only copy", '{"line":2,"input":"', '{"line": 1', "\0" * 50):
        output.write_text(text, encoding="utf-8")
        result = run(requests, model, "-o", output)
        assert result.exit_code == 1 and "is no answer to line 1" in result.stderr
        assert output.read_text(encoding="utf-8") == text


def test_an_answer_without_its_newline_is_kept(model: Path, requests: Path, tmp_path: Path) -> None:
    whole, shorn = tmp_path / "whole.jsonl", tmp_path / "shorn.jsonl"
    run(requests, model, "-o", whole, *GREEDY)
    lines = whole.read_bytes().splitlines(keepends=True)
    for count in (3, len(lines)):
        shorn.write_bytes(b"".join(lines[:count]).rstrip())
        assert finished_lines(requests, shorn) == count
        assert shorn.read_bytes() == b"".join(lines[:count])
    for cut in (0, 5, 20, 60):
        shorn.write_bytes(lines[0] + lines[1][:cut])
        assert finished_lines(requests, shorn) == 1 and shorn.read_bytes() == lines[0]


ODD = [
    '{"prompt": "a", "seed": %s}' % ("9" * 400),
    '{"prompt": "a", "temperature": %s}' % ("9" * 5000),
    '{"prompt": "a", "temperature": NaN}',
    '{"prompt": "a", "custom_id": %s}' % ("9" * 400),
    '{"prompt": "a", "logit_bias": {"1": 1e999}}',
    '{"prompt": [%s]}' % ("9" * 25),
    '{"prompt": "\\ud800"}',
    "[" * 100_000,
    '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 3}}',
]


def test_odd_lines_have_their_errors(model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*ODD, '{"prompt": "a"}']), encoding="utf-8")
    assert run(source, model, "-o", output, *GREEDY).exit_code == 0
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(ODD) + 1 and found[-1]["error"] is None
    statuses = [f["response"]["status_code"] for f in found]
    assert 500 not in statuses and statuses[:6] == [400] * 6 and statuses[7] == 400


def test_any_exception_is_the_error_of_its_line(
    model: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes up: when a line is read, queued, run or told."""
    real = {name: getattr(svdengine.LLM, name) for name in ("prepare", "add")}
    real["step"], real["answer"] = Engine.step, CompletionJob.answer

    def failing(name: str, wanted: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            if wanted(*arguments):
                raise OSError(f"{name} broke")
            return real[name](self, *arguments, **options)

        return call

    steps = iter([True, False, True])
    with read_model_file(model) as file:
        broken = Tokenizer(file.tokenizer_info, file.tokenizer_bytes).encode("hello 1")
    monkeypatch.setattr(svdengine.LLM, "prepare", failing("prepare", lambda prompt, *_: prompt == broken))
    monkeypatch.setattr(svdengine.LLM, "add", failing("add", lambda r: r.params.max_tokens == 3))
    monkeypatch.setattr(CompletionJob, "answer", failing("answer", lambda done: len(done[0].token_ids) == 4))
    output = tmp_path / "out.jsonl"
    assert run(requests, model, "-o", output, *GREEDY).exit_code == 0
    errors = [json.loads(line)["error"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert "prepare broke" in errors[11] and "add broke" in errors[12] and "answer broke" in errors[13]
    assert errors[14] is None
    monkeypatch.setattr(Engine, "step", failing("step", lambda: next(steps, False)))
    output.unlink()
    assert run(requests, model, "-o", output, *GREEDY).exit_code == 0
    errors = [json.loads(line)["error"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(errors) == len(LINES) + 1 and "step broke" in errors[0] and errors[29] is None
    monkeypatch.setattr(Engine, "step", failing("step", lambda: True))
    output.unlink()
    assert run(requests, model, "-o", output, *GREEDY).exit_code == 1


def test_a_run_that_is_given_up_frees_its_blocks(model: Path, requests: Path) -> None:
    with svdengine.load(model, device="reference", context=128) as llm:
        results = BatchRun(llm, "tiny", {"temperature": 0, "ignore_eos": True}, 4).results(read_lines(requests))
        assert next(results)["line"] == 1
        results.close()  # type: ignore[attr-defined]
        llm._engine.prefix_cache.clear()
        assert llm._engine.pool.free_count == llm._engine.pool.block_count


@pytest.mark.parametrize(("given", "rows"), [((), 64), (("--prefill-rows", 5), 5)])
def test_rows_of_prompts(
    model: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[Any, ...], rows: int
) -> None:
    found: list[int] = []
    real = Engine.__init__

    def spy(self: Engine, *arguments: Any, **options: Any) -> None:
        found.append(options["prefill_rows"])
        real(self, *arguments, **options)

    monkeypatch.setattr(Engine, "__init__", spy)
    assert run(requests, model, "-o", tmp_path / "out.jsonl", *given).exit_code == 0
    assert found == [rows]


def test_wrong_usage(model: Path, requests: Path, tmp_path: Path) -> None:
    assert run(requests, model).exit_code == 2
    assert run(tmp_path / "missing", model, "-o", tmp_path / "x").exit_code == 2
    result = run(requests, model, "-o", tmp_path / "no" / "x")
    assert result.exit_code == 1 and "there is no folder" in result.stderr
