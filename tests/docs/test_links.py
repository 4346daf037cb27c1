"""The documents name nothing that is not there: links, files, commands, options, variables and error messages."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from svdengine.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
NAMES = [
    "README.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]
FOLDERS = ("engine", "kernels", "models", "converters", "tools", "tests", "docs", ".ci", ".links")
SOURCES = ("engine", "kernels", "models", "converters")
every_document = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[str]:
    """Lines of the code blocks, each with the lines that go on from it."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def anchors(name: str) -> set[str]:
    """Names of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(read(name)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(name: str) -> list[str]:
    """Relative links of a document to nothing."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(name))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        found = target.exists() and (not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))))
        broken += [] if found else [link]
    return broken


def missing_files(text: str) -> list[str]:
    """Paths of this project, and names of Python files, that stand in code and do not exist."""
    words = [word for code in (*spans(text), *blocks(text)) for word in re.findall(r"[\w./-]+", code)]
    folders = [folder for folder in FOLDERS if (ROOT / folder).exists()]  # a source archive lacks some
    paths = {w for w in words if w.split("/")[0] in folders and "/" in w}
    python = {w for w in words if re.fullmatch(r"\w+\.py", w)}
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return [p for p in sorted(paths) if not (ROOT / p).exists()] + sorted(python - known)


@cache
def options_of(command: str) -> frozenset[str]:
    """Options of a command of svdengine."""
    found = main.get_command(click.Context(main), command)
    assert found is not None
    return frozenset(o for p in found.params for o in (*p.opts, *p.secondary_opts)) | {"--help", "-h"}


@cache
def options_of_tool(module: str) -> frozenset[str]:
    """Options that the help of a program in tools/ names."""
    name = f"svdengine.tools.{module}"
    path = ROOT / "tools" / module
    program = importlib.import_module(f"{name}.__main__" if path.is_dir() else name)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        program.main(["--help"])
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", told.getvalue()))


def known_options() -> frozenset[str]:
    tools = [p.stem for p in (ROOT / "tools").glob("*.py") if "def main(arguments" in p.read_text(encoding="utf-8")]
    found = frozenset().union(*map(options_of, COMMANDS), *map(options_of_tool, [*tools, "relufy"]))
    return found | {"--version"}


def calls(text: str) -> Iterator[list[str]]:
    """Commands that stand in code, in words. Prompts, comments and pipes are taken apart."""
    for line in (*blocks(text), *spans(text)):
        for part in re.split(r"&&|\||;", line.removeprefix("$ ").split("  #")[0]):
            try:
                yield shlex.split(part)
            except ValueError:  # prose, or a piece of JSON
                continue


def wrong_calls(text: str) -> list[str]:
    """Calls of svdengine and of its tools with a command, a module or an option that there is not."""
    wrong = []
    for words in calls(text):
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        first, second = [*words, "", ""][:2]
        if first.rpartition("/")[2] == "svdengine" and re.match("[a-z]", second):
            first = second
            wrong += [] if second in COMMANDS else [second]
        if first in COMMANDS:
            known = options_of(first)
        elif words[:2] == ["python", "-m"] and words[2].startswith("svdengine.tools."):
            first = words[2]
            module = first.removeprefix("svdengine.tools.")
            if not ((ROOT / f"tools/{module}.py").exists() or (ROOT / f"tools/{module}").is_dir()):
                wrong.append(first)
                continue
            known, given = options_of_tool(module), given - {"-m"}
        elif first.startswith("--"):
            known = known_options()
        else:
            continue
        wrong += [f"{first}: {option}" for option in sorted(given - known)]
    return wrong


def strings(folder: str) -> Iterator[str]:
    """Texts in the code of a folder; what is put into one is a mark."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def untrue_messages(text: str) -> list[str]:
    """Messages in the first column of the tables that the code does not say; `...` stands for anything."""
    said = [text for folder in SOURCES for text in strings(folder)]
    untrue = []
    for row in re.findall(r"^\| ([^|]*`[^|]*) \|", text, flags=re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", row):
            parts = [part for part in re.split(r"\s*\.\.\.\s*", message) if part]
            if not any(all(part in one for part in parts) for one in said):
                untrue.append(message)
    return untrue


def variables_in_code() -> set[str]:
    """Environment variables of svdengine's own, and others that it reads."""
    text = "\n".join(path.read_text(encoding="utf-8") for f in SOURCES for path in (ROOT / f).rglob("*.py"))
    return set(re.findall(r'"(SVDENGINE_[A-Z_]+)"', text)) | set(re.findall(r'environ\.get\("(\w+)"', text))


@every_document
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


@every_document
def test_files_that_are_named_exist(name: str) -> None:
    assert missing_files(read(name)) == []


@every_document
def test_commands_and_options_that_are_named_exist(name: str) -> None:
    assert wrong_calls(read(name)) == []


def test_every_page_is_in_the_index() -> None:
    index = read("docs/README.md")
    assert [p.name for p in ROOT.glob("docs/*.md") if p.name != "README.md" and f"]({p.name})" not in index] == []


def test_environment_variables_are_described_and_exist() -> None:
    page, found = read("docs/troubleshooting.md"), variables_in_code()
    assert {"SVDENGINE_DEVICE", "XDG_CACHE_HOME"} <= found
    assert [v for v in sorted(found) if f"`{v}`" not in page] == []
    named = {v for name in NAMES for v in re.findall(r"(?<!_)SVDENGINE_[A-Z_]+", read(name))}
    assert named - found == set()


def test_error_messages_are_those_of_the_code() -> None:
    page = read("docs/troubleshooting.md").partition("## Environment")[0]
    assert len(re.findall(r"^\| [^|]*`", page, flags=re.MULTILINE)) > 50
    assert untrue_messages(page) == []


def test_the_walks_count_their_files() -> None:
    page = read("docs/architecture.md")
    walks = re.findall(r"^## The way of .*?(\d+) files(.*?)(?=^Then|^## )", page, flags=re.MULTILINE | re.DOTALL)
    assert len(walks) == 2
    for count, text in walks:
        assert len(set(re.findall(r"`([\w/]+\.py)`", text))) == int(count)


def test_the_first_ten_minutes_stay_short_and_say_how_to_test() -> None:
    text = read("README.md")
    assert len(text.splitlines()) < 170
    marked = text.partition("<!-- test commands -->\n```sh\n")[2].partition("\n```")[0].splitlines()
    assert marked[0].startswith("pip install '.[test]'") and marked[-1] == "pytest -n auto"


def test_the_checks_find_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_files("`engine/no_such_file.py` and `nowhere.py` and `kernels/cpu/step.py`") == [
        "engine/no_such_file.py",
        "nowhere.py",
    ]
    assert wrong_calls(
        "```\n$ svdengine chat m.svdp --temprature 0\n```\n`svdengine dance m`, `bench --fnn both`, `--kv-safe FILE`"
    ) == [
        "chat: --temprature",
        "dance",
        "bench: --fnn",
        "--kv-safe: --kv-safe",
    ]
    assert wrong_calls("`python -m svdengine.tools.relufy a --nonsense`, `python -m svdengine.tools.none`") == [
        "svdengine.tools.relufy: --nonsense",
        "svdengine.tools.none",
    ]
    assert untrue_messages("| `is a GGUF file, not` | x |\n| `is a ... file, not a cake` | x |") == [
        "is a ... file, not a cake"
    ]
    (tmp_path / "a.md").write_text("# One\n[x](a.md#one) [y](a.md#two) [z](b.md) [w](https://arxiv.org)\n")
    monkeypatch.setattr("test_links.ROOT", tmp_path)
    assert broken_links("a.md") == ["a.md#two", "b.md"]
