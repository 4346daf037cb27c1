"""The command line: output, exit codes, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_model import write_tiny_model

from svdengine.cli import COMMANDS, main
from svdengine.commands import demo_model

GREEDY = ("--temperature", "0", "-n", "6", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny.svdp"))


def run(*arguments: str, text: str | bytes = "") -> Result:
    return CliRunner(env={"SVDENGINE_DEVICE": "reference"}).invoke(main, list(arguments), input=text)


def error_of(result: Result) -> str:
    """The only line on stderr."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SVDENGINE_DEVICE": "reference"}
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, **options)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from svdengine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'numpy', 'numba', 'jinja2', 'tokenizers', 'sentencepiece', 'llvmlite', 'starlette', 'uvicorn'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and "Usage: " in result.stdout


def test_version_and_unknown_commands() -> None:
    assert "0.1.0" in run("--version").stdout
    assert run("fly").exit_code == 2
    assert run("generate", "--fly").exit_code == 2
    assert "Did you mean chat?" in run("run").stderr and "Did you mean convert?" in run("cnvert").stderr
    assert "Did you mean" not in run("fly").stderr


def test_generate(model: str) -> None:
    first = run("generate", model, "-p", "hello world", *GREEDY)
    assert first.exit_code == 0 and first.stderr == "" and first.stdout.endswith("\n")
    assert run("generate", model, "-p", "hello world", "--speculative", *GREEDY).stdout == first.stdout
    assert run("generate", model, *GREEDY, text="hello world\n").stdout == first.stdout
    both = run("generate", model, "-p", "hello world", "-p", "once", *GREEDY)
    assert both.stdout.startswith(first.stdout)
    assert both.stderr == "[1]\n[2]\n"


def test_sizes_of_the_kv_cache(model: str) -> None:
    assert run("generate", model, "-p", "hello", "--kv-memory", "0.5G", *GREEDY).exit_code == 0
    assert run("generate", model, "-p", "hello", "--kv-memory", "half", *GREEDY).exit_code == 2
    assert "takes" in error_of(run("generate", model, "-p", "hello", "--kv-memory", "1K", *GREEDY))
    small = ("bench", model, "-p", "0", "-n", "16", "-r", "1", "--kv-memory", "100K")
    assert "fewer than 99 sequences of 16" in error_of(run(*small, "--parallel", "99"))
    assert run(*small).exit_code == 0
    assert run("generate", model, "-p", "hello", "--kv-dtype", "q8", *GREEDY).exit_code == 0


def test_generate_json(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("once upon\n", encoding="utf-8")
    prompts = ("-p", "hello", "-f", str(tmp_path / "prompt.txt"))
    result = run("generate", model, *prompts, "--json", "--logprobs", "2", *GREEDY)
    first, second = map(json.loads, result.stdout.splitlines())
    assert [first["prompt"], second["prompt"]] == ["hello", "once upon"]
    assert list(first) == ["prompt", "text", "token_ids", "finish_reason", "stats", "logprobs"]
    assert len(first["token_ids"]) == len(first["logprobs"]) == first["stats"]["generated_tokens"] == 6
    assert len(first["logprobs"][0]["top"]) == 2
    assert "logprobs" not in json.loads(run("generate", model, "-p", "hello", "--json", *GREEDY).stdout)


def test_control_tokens_on_the_command_line(model: str) -> None:
    common = ("generate", model, "-p", "<|im_start|>user\nhi<|im_end|>\n", "--json", *GREEDY)
    plain, special = (json.loads(run(*common, *more).stdout)["stats"]["prompt_tokens"] for more in ((), ("--special",)))
    assert special < plain
    assert "are tokens. By default they are text" in " ".join(run("generate", "--help").stdout.split())
    assert "--special is for prompts without --chat" in run(*common, "--special", "--chat").stderr


def test_generate_chat(model: str) -> None:
    common = ("generate", model, "-p", "hi", "--json", *GREEDY)
    plain, chat = (json.loads(run(*common, *more).stdout) for more in ((), ("--chat",)))
    assert chat["stats"]["prompt_tokens"] > plain["stats"]["prompt_tokens"]
    assert run("generate", model, "-p", "hi", "--system", "x").exit_code == 2
    assert run("generate", model, "-p", "hi", "--logprobs", "1").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("-p", ""), "", "the prompt is empty"),
        ((), "", "standard input is empty"),
        (("-f", "missing.txt"), "", "cannot read missing.txt: No such file"),
        (("-f", "."), "", "cannot read .: Is a directory"),
        (("-p", "a", "--temperature", "-1"), "", "temperature must lie between"),
        (("-p", "a", "--top-p", "0"), "", "--top-p must be above 0"),
        (("-p", "a", "--stop", ""), "", "stop must be strings"),
        (("-p", "a", "--context", "9999"), "", "made for a context of 512"),
        (
            (
                "-p",
                "a " * 600,
            ),
            "",
            "maximum context length is 512 tokens",
        ),
        (("-p", "a", "--ffn", "sparse"), "", "has no predictor"),
        (("-p", "a", "--device", "ascend"), "", "Ascend cannot be used: no Ascend runtime (CANN) was found; install"),
        (("-p", "a", "--deterministic"), "", "deterministic results are not offered on the device reference"),
    ],
)
def test_errors_are_one_line(model: str, arguments: tuple[str, ...], text: str, message: str) -> None:
    assert message in error_of(run("generate", model, *arguments, text=text))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--threads", "-1"), ("--threads", "0"), ("--context", "0"), ("--kv-dtype", "q3"), ("--logit-bias", "x")],
)
def test_wrong_usage(model: str, option: str, value: str) -> None:
    assert run("generate", model, "-p", "a", option, value).exit_code == 2


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "noise.svdp").write_bytes(os.urandom(1000))
    for name in ("missing.svdp", "noise.svdp", "."):
        assert str(tmp_path) in error_of(run("generate", str(tmp_path / name), "-p", "a"))


def test_chat_over_a_pipe(model: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"hello\n\nand again\n/stats\n/save {saved}\n/help\n"
    result = run("chat", model, *GREEDY, text=lines)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "> " not in result.stdout
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert result.stdout == messages[1]["content"] + "\n" + messages[3]["content"] + "\n"
    assert "2 answers" in result.stderr and "reused" in result.stderr and "tokens/s" in result.stderr


def test_chat_keeps_the_kv_cache(model: str, tmp_path: Path) -> None:
    kept, talk = tmp_path / "talk.kv", ("chat", model, "--system", "be kind to the user " * 3, *GREEDY)
    plain = run(*talk, text="hello\n")
    first = run(*talk, "--kv-save", str(kept), text="hello\n")
    second = run(*talk, "--kv-save", str(kept), text="hello\n")
    assert first.stdout == second.stdout == plain.stdout
    assert f"tokens of the KV cache are in {kept}" in first.stderr and " reused" not in first.stderr
    assert f"tokens of {kept} are in the KV cache" in second.stderr and " reused" in second.stderr
    before = Path(model).read_bytes()
    assert "is no file of saved KV blocks" in error_of(run(*talk, "--kv-save", model, text="hello\n"))
    assert Path(model).read_bytes() == before


def test_chat_quits_and_explains(model: str) -> None:
    result = run("chat", model, *GREEDY, text="/quit\nhello\n")
    assert result.exit_code == 0 and result.stdout == ""
    long = run("chat", model, *GREEDY, text="hello " * 600)
    assert long.exit_code == 1 and "maximum context length is 512 tokens" in long.stderr
    assert "--context-shift" in long.stderr
    assert run("chat", model, *GREEDY, "--context-shift", text="hello " * 600).exit_code == 0
    assert run("chat", model, text="/fly\n").exit_code == 1


def test_eval(model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("once upon a time there was a system. " * 10, encoding="utf-8")
    result = run("eval", model, "--perplexity", str(tmp_path / "text.txt"), "--window", "32", "--json")
    found = json.loads(result.stdout)
    assert found["perplexity"] > 1 and found["tokens"] > 20 and found["bits_per_byte"] > 0
    assert "perplexity" in run("eval", model, "--perplexity", str(tmp_path / "text.txt")).stdout
    for name, data, message in (
        ("empty", b" \n", "is empty"),
        ("short", b"a", "too few"),
        ("binary", b"\x00\x01", "zero bytes"),
        ("latin", b"caf\xe9", "not UTF-8 text (byte 3)"),
    ):
        (tmp_path / name).write_bytes(data)
        assert message in error_of(run("eval", model, "--perplexity", str(tmp_path / name)))
    assert run("eval", model).exit_code == 2


def test_bench(model: str) -> None:
    rows = json.loads(run("bench", model, "--pp", "8", "--tg", "4", "-r", "2", "--json").stdout)
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    for key in ("ffn", "tokens_per_second", "stddev", "bytes_per_token", "gb_per_second"):
        assert all(key in row for row in rows)
    together = json.loads(
        run("bench", model, "-p", "0", "-n", "20", "-r", "1", "--parallel", "1", "--parallel", "3", "--json").stdout
    )
    assert [row["test"] for row in together] == ["tg20", "tg20x3"]
    assert together[1]["bytes_per_token"] < together[0]["bytes_per_token"]
    table = run("bench", model, "-p", "8", "-n", "0", "-r", "1").stdout.splitlines()
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    deep = json.loads(run("bench", model, "-p", "4", "-n", "3", "-d", "30", "-r", "1", "--json").stdout)
    assert [row["test"] for row in deep] == ["pp4 @ d30", "tg3 @ d30"]
    assert "made for a context" in error_of(run("bench", model, "-d", "9999"))
    assert run("bench", model, "--pp", "0", "--tg", "0").exit_code == 2
    assert run("bench", model, "--pp", "-1").exit_code == 2
    assert "made for a context" in error_of(run("bench", model, "--pp", "9999"))


def test_names_that_users_of_other_programs_type(model: str) -> None:
    common = ("-p", "hello world", "-n", "6", "--ignore-eos")
    ours = run("generate", model, *common, "--temperature", "0.5", "--repetition-penalty", "1.2", "--seed", "3")
    theirs = run(
        *(
            "generate",
            *common,
            "-m",
            model,
            "--temp",
            "0.5",
            "--repeat-penalty",
            "1.2",
            "-s",
            "3",
            "-t",
            "1",
            "-c",
            "64",
        )
    )
    assert ours.exit_code == 0 and theirs.stdout == ours.stdout and theirs.stderr == ""
    assert run("generate", "--model", model, "--ctx-size", "64", *common).exit_code == 0
    moved = run("chat", "-m", model, "hello", *GREEDY)
    assert moved.exit_code == 0 and moved.stdout == run("chat", model, "hello", *GREEDY).stdout
    assert "unexpected extra argument" in run("generate", model, "-m", model, *common).stderr
    layers = run("generate", model, *common, "-ngl", "99")
    assert layers.exit_code == 0 and "--device" in layers.stderr
    assert run("chat", model, "-sys", "be kind", "hi", *GREEDY).stdout == (
        run("chat", model, "--system", "be kind", "hi", *GREEDY).stdout
    )


def test_help_has_groups_defaults_and_examples() -> None:
    for name in ("chat", "generate", "serve", "bench", "batch", "eval"):
        page = run(name, "--help").stdout
        assert all(f"\n{group}:\n" in page for group in ("Model", "Sparsity", "Speed and memory", "Examples")), name
        assert "x<=None" not in page and "--ctx-size" not in page
        assert page.partition("Examples:")[2].count(f"svdengine {name}") == 2
    page = " ".join(run("chat", "--help").stdout.split())
    assert "[default: the model's own, else 0.8]" in page and "[default: auto]" in page


def test_a_schema_on_the_command_line(model: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    schema = '{"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}'
    (tmp_path / "schema.json").write_text(schema, encoding="utf-8")
    for given in (schema, f"@{tmp_path / 'schema.json'}"):
        found = run("generate", model, "-p", "hello", "-j", given, "-n", "60")
        assert json.loads(found.stdout)["a"] in ("yes", "no")
    assert run("generate", model, "-p", "hi", "--grammar", 'start: "yes"').stdout == "yes\n"
    assert "it is no JSON" in run("generate", model, "-p", "hi", "-j", "{").stderr
    assert "a schema is a JSON object" in run("generate", model, "-p", "hi", "-j", "[]").stderr
    assert run("generate", model, "-p", "hi", "-j", "{}", "--grammar", "x").exit_code == 2


def test_one_question(model: str) -> None:
    talked = run("chat", model, *GREEDY, text="hello\n").stdout
    asked = run("chat", model, "hello", *GREEDY)
    assert asked.exit_code == 0 and asked.stdout == talked and asked.stderr == ""
    assert run("chat", model, "-p", "hello", *GREEDY).stdout == talked
    told = run("chat", model, "hello", "-v", *GREEDY)
    assert told.stdout == talked and "tokens/s" in told.stderr and "/help for help" in told.stderr
    assert run("chat", model, "-q", *GREEDY, text="hello\n").stderr == ""
    assert run("chat", model, " ").exit_code == 2
    assert run("chat", model, "hello", "-p", "hello").exit_code == 2


def test_a_question_without_a_model(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_model, "demo_model", lambda report, progress=None: Path(model))
    monkeypatch.chdir(tmp_path)
    answer = run("chat", "-p", "name three rivers", *GREEDY).stdout
    assert answer and run("chat", "name three rivers", *GREEDY).stdout == answer
    assert (
        run("chat", "name", "three rivers", "-m", model, *GREEDY).stdout
        == run(*("chat", model, "name three rivers", *GREEDY)).stdout
    )
    for question in ("rivers?", "is 1/2 > 1//3, or not?", "a very long question " * 20):
        assert run("chat", question, *GREEDY).exit_code == 0, question
    assert run("chat", "name three rivers", "-p", "and hills", *GREEDY).exit_code == 2
    told = run("chat", "name", "three rivers", *GREEDY)
    assert told.exit_code == 2 and "svdengine chat -p 'name three rivers'" in told.stderr
    (tmp_path / "my models").mkdir()
    for missing in ("my river.svdp", "./my river", "my models/river", "river.svdp"):
        assert "there is no such file" in error_of(run("chat", missing, *GREEDY)), missing
    assert "there is no such file" in error_of(run("chat", "-m", "my river", "hello", *GREEDY))


def test_devices() -> None:
    machine = json.loads(run("devices", "--json", "--no-measure").stdout)
    assert machine["cores"] >= 1 and machine["isa"] and len(machine["accelerators"]) == 2
    assert "not measured" in run("devices", "--no-measure").stdout


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_stops_the_answer_and_not_the_program(model: str) -> None:
    code = (
        "import signal, sys, threading, svdengine.llm as l\n"
        "real = l.LLM._advance\n"
        "calls = []\n"
        "def advance(self, request):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: signal.raise_signal(signal.SIGINT)\n"
        "    real(self, request)\n"
        "l.LLM._advance = advance\n"
        f"from svdengine.cli import main; main(['chat', {model!r}, '--temperature', '0', '--ignore-eos', '-n', '20'])"
    )
    done = python(code, input="hello\nagain\n")
    assert done.returncode == 0, done.stderr
    assert "stopped]" in done.stderr.splitlines()[0] and " 20 tokens" in done.stderr.splitlines()[1]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupts_elsewhere_exit_130(model: str) -> None:
    # A shell's background job ignores SIGINT, and so would the program.
    code = "import svdengine.loading as l, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "l.load = lambda *a, **k: signal.raise_signal(signal.SIGINT)\n"
    code += f"from svdengine.cli import main; main(['generate', {model!r}, '-p', 'a'])"
    done = python(code)
    assert done.returncode == 130 and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_reader_that_leaves_is_no_error(model: str) -> None:
    command = f"{sys.executable} -m svdengine.cli generate {model} -p hello --ignore-eos -n 100 | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "SVDENGINE_DEVICE": "reference"}
    )
    assert done.stderr == ""
