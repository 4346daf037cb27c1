"""Hostile chat templates: whatever they do, it ends soon, takes little memory, and says why."""

import os
import resource
import signal
import time

import pytest
from patience import PATIENCE
from tiny_model import CHATML, make_tokenizer

from svdengine.errors import ModelFileError, SvdEngineError
from svdengine.text import limited_process, template_program
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.limited_process import NoChildError

TOKENIZER = make_tokenizer("byte_level")
HELLO = [{"role": "user", "content": "hello"}]
SET = "{% set n = namespace(x=X, l=[]) %}"


def repeated(body: str, start: str = "'aa'", times: int = 60) -> str:
    return SET.replace("X", start) + "{% for i in range(TIMES) %}".replace("TIMES", str(times)) + body + "{% endfor %}"


# What the sandbox itself sees coming, with what it says.
SEEN = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops too often"),
    (
        "{% set a = ['\U0001f600' * 900000] %}" + "".join(f"{{% set b{i} = a[0] ~ '{i}' %}}" for i in range(300)),
        "loops too often",
    ),
    (repeated("{% set n.x = n.x ~ n.x %}"), "too long"),
    (repeated("{% set n.x = n.x + n.x %}"), "too long"),
    (repeated("{% set n.x = n.x + n.x %}", "[1]"), "too long"),
    (repeated("{% set n.x = n.x * n.x %}", "9"), "too large"),
    (repeated("{% set n.x = n.x ** n.x %}", "9"), "too large"),
    (repeated("{% set n.x = [n.x, n.x] %}", "[1]") + "{{ n.x }}", "too long"),
    (repeated("{% set n.x = [n.x, n.x] %}", "[1]") + "{{ n.x | tojson }}", "too long"),
    (repeated("{% set n.x = {1: n.x, 2: n.x} %}", "[1]") + "{{ n.x | string }}", "too long"),
    (repeated("{% set n.x = (n.x, n.x) %}", "[1]") + "{{ n.x ~ '' }}", "too long"),
    (repeated("{% set n.x = [n.x, n.x] %}", "[1]") + "{{ [n.x] | join }}", "too long"),
    (repeated("{% set n.x = [n.x, n.x] %}", "[1]") + "{{ '{}'.format(n.x) }}", "too long"),
    (repeated("{% set n.x = [n.x, n.x] %}", "[1]") + "{{ '%s' % [n.x] }}", "too long"),
    ("{{ 'a' * 1000000000 }}", "too long"),
    ("{{ [1] * 1000000000 }}", "too long"),
    ("{{ (1,) * 1000000000 }}", "too long"),
    ("{{ 10 ** 10 ** 10 ** 10 ** 10 }}", "too large"),
    ("{{ '%1000000000d' % 1 }}", "width of at most"),
    ("{{ '%.1000000000f' % 1 }}", "width of at most"),
    ("{{ '%*d' % (1000000000, 1) }}", "no width from its values"),
    ("{{ '%1000000000d' | format(1) }}", "width of at most"),
    ("{{ ('%s' * 1000) % (('a' * 100000,) * 1000) }}", "too long"),
    ("{{ ('%(a)s' * 1000) % {'a': 'a' * 100000} }}", "too long"),
    ("{{ 'a'.center(1000000000) }}", "too long"),
    ("{{ 'a'.zfill(1000000000) }}", "too long"),
    ("{{ 'a'.ljust(width) }}".replace("width", "10 ** 9"), "too long"),
    ("{{ '\t'.expandtabs(1000000000) }}", "too long"),
    ("{{ 'a' | center(1000000000) }}", "too long"),
    ("{{ 'a a a' | wordwrap(1, wrapstring='x' * 3000000) }}", "too long"),
    ("{{ [1] | batch(1000000000, 0) | list }}", "too long"),
    ("{{ [1] | slice(1000000000, 0) | list }}", "too long"),
    ("{{ 1.5 | round(1000000000, 'ceil') }}", "precision"),
    ("{{ '{:>1000000000}'.format(1) }}", "width of at most"),
    ("{{ '{:>{}}'.format(1, 1000000000) }}", "width of at most"),
    ("{{ '{x:.1000000000f}'.format_map({'x': 1.5}) }}", "width of at most"),
    ("{{ ('<b>' | e ~ '{:>1000000000}'|safe).format(1) }}", "width of at most"),
    ("{{ ('{0}' * 1000).format('a' * 100000) }}", "too long"),
    ("{{ 'aaaa'|replace('a', 'b' * 3000000) }}", "too long"),
    ("{% for i in [1] %}{{ ('a' * 100000).replace('', 'b' * 100000) }}{% endfor %}", "too long"),
    ("{{ range(99999) | list | join('x' * 100000) }}", "too long"),
    ("{{ ''.join(['a' * 4000000] * 2000) }}", "too long"),
    ("{{ ('a' * 4000).join('b' * 4000) }}", "too long"),
    ("{{ ('a' * 4000).translate({97: 'b' * 4000}) }}", "too long"),
    ("{{ 'a'.encode() }}", "bytes"),
    ("{{ (5).to_bytes(1000000000, 'big') }}", "bytes"),
    ("{{ 'a' | indent(1000000000, true) }}", "too long"),
    ("{{ [1] | tojson(indent=1000000000) }}", "indent"),
    ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", "loops too often"),
    ("{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}", "loops too often"),
    ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "too long"),
    ("{% macro f() %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endmacro %}{{ f()|length }}", "too long"),
    ("{% set x %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}{{ x|length }}", "too long"),
    (repeated("{% set n.l = n.x | sort %}", "'a' * 4000000", 99999), "too long|loops too often|more than"),
    (repeated("{% set n.l = n.x[::-1] %}", "'a' * 4000000", 99999), "loops too often"),
    (repeated("{% set n.l = n.x | upper %}", "'a' * 4000000", 99999), "loops too often"),
    (repeated("{% set n.l = n.x.count('b') %}", "'a' * 4000000", 99999), "loops too often"),
    (repeated("{% set n.l = n.l + [n.x ~ i] %}", "'a' * 3000000", 99999), "loops too often"),
]
# What only the limits of a process end.
UNSEEN = [
    repeated("{% if n.x == n.y %}{% endif %}" * 50, "range(99999) | list, y=range(99999) | list", 9999),
    repeated("{% set n.x = [n.x, n.x] %}{% set n.l = [n.l, n.l] %}", "[]") + "{{ n.x == n.l }}",
    repeated("{% set n.x = (n.x, n.x) %}", "(1,)") + "{{ {n.x: 1} | length }}",
    "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
]
COMPILED = [
    "{% if a %}" + "{% elif a %}" * 20_000 + "{% endif %}",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ a" + ".b" * 100_000 + " }}",
    "{% for i in a %}" * 5_000 + "{% endfor %}" * 5_000,
    "{{ a" + " + a" * 60_000 + " }}",
    "{{ a" + "|upper" * 30_000 + " }}",
    "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "{{ 1" + " if a else 1" * 20_000 + " }}",
]


@pytest.fixture(params=["child", "here"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Templates run in a child process, or here where none can be started."""
    if request.param == "here":
        monkeypatch.setattr(template_program.LimitedProcess, "ask", _no_child)
    return str(request.param)


def _no_child(*_: object) -> None:
    raise NoChildError("none")


@pytest.mark.parametrize(("source", "message"), SEEN)
def test_the_sandbox_sees_it_coming(source: str, message: str, place: str) -> None:
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError, match=f"was stopped: .*({message}|loops too often|it (took|needs) more than)"):
        ChatTemplate(source, TOKENIZER).render(HELLO)
    assert time.process_time() - begin < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 450_000  # kB: characters of four bytes


@pytest.mark.parametrize("source", UNSEEN)
def test_the_process_ends_what_the_sandbox_does_not_see(source: str) -> None:
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = ChatTemplate(source, TOKENIZER)
    with pytest.raises(ModelFileError, match=r"was stopped: it (took|needs) more than"):
        template.render(HELLO)
    assert time.monotonic() - begin < PATIENCE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


@pytest.mark.parametrize("source", COMPILED)
def test_compiling_is_bounded(source: str) -> None:
    try:
        ChatTemplate(source, TOKENIZER).render(HELLO)
    except SvdEngineError as error:
        assert "chat template" in str(error)


def test_a_template_goes_on_after_its_child_was_killed() -> None:
    source = (
        "{% for m in messages %}{% for i in range(m.n) %}{% if x == y %}{% endif %}{% endfor %}{{ m.n }}{% endfor %}"
    )
    template = ChatTemplate(source, TOKENIZER)
    long = "a" * 2_000_000
    for _ in range(2):
        with pytest.raises(ModelFileError, match="took more than 2 s"):
            template.render([{"role": "user", "content": "", "n": 90_000}], x=long, y=long + "")
        assert template.render([{"role": "user", "content": "", "n": 7}], x=long, y=long).plain == "7"
    child = template._program._child
    assert child is not None and child._process is not None
    child._process.kill()
    child._process.wait()
    assert template.render([{"role": "user", "content": "", "n": 7}]).plain == "7"


def test_each_process_has_its_own_child() -> None:
    template = ChatTemplate(CHATML, TOKENIZER)
    text = template.render(HELLO).plain
    forked = os.fork()
    if not forked:
        os._exit(0 if template.render(HELLO).plain == text else 1)
    assert [template.render(HELLO).plain for _ in range(5)] == [text] * 5
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert template.render(HELLO).plain == text


def test_no_child_is_left() -> None:
    template = ChatTemplate(CHATML, TOKENIZER)
    child = template._program._child
    assert child is not None and child._process is not None
    pid = child._process.pid
    os.kill(pid, 0)
    del template, child
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("program", ["", "/bin/false", "/bin/cat", "/nothing"])
def test_without_child_processes_the_sandbox_stays(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", program)
    monkeypatch.setattr(limited_process, "_START_SECONDS", 0.5)
    template = ChatTemplate(CHATML, TOKENIZER)
    assert template.render(HELLO).plain.endswith("assistant\n") and template._program._child is None
    with pytest.raises(ModelFileError, match="too long"):
        ChatTemplate("{{ 'a' * 1000000000 }}", TOKENIZER).render(HELLO)
