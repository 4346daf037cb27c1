"""What may be imported where: no training framework at inference time, a light package, and no circle of rooms."""

import ast
import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("engine", "kernels", "models", "converters", "tools")
FRAMEWORKS = {"torch", "jax", "jaxlib", "transformers", "tensorflow", "flax"}

# Room -> rooms that it may import from, besides itself and the errors. "engine" is what lies in that folder itself.
# CONTRIBUTING.md has the same table, with what lives where.
MAY_IMPORT = {
    "models": set(),
    "kernels": {"models"},
    "text": set(),
    "scheduling": {"text", "kernels", "models"},
    "speculation": {"scheduling", "kernels"},
    "files": {"text", "scheduling", "kernels", "models"},
    "engine": {"text", "scheduling", "speculation", "files", "kernels", "models"},
    "converters": {"engine", "text", "scheduling", "files", "kernels", "models"},
    "measuring": {"engine", "text", "scheduling", "files", "kernels", "models", "converters"},
    "server": {"engine", "text", "scheduling"},
    "commands": {
        "engine", "text", "scheduling", "files", "kernels", "models", "converters", "measuring", "server",
    },
    "tools": {
        "engine", "text", "scheduling", "files", "kernels", "models", "converters", "measuring", "server", "commands",
    },
}  # fmt: skip


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def room_of(module: str) -> str:
    """The room of a module of ours: svdengine.text.tokenizer is in text, svdengine.llm in engine."""
    part = [*module.split("."), ""][1]
    return part if part in MAY_IMPORT else "errors" if part == "errors" else "engine"


def room_of_file(path: Path) -> str:
    folder, part, *_ = path.relative_to(ROOT).parts
    return part if folder == "engine" and part in MAY_IMPORT else folder


def cuts_across(path: Path, room: str) -> list[str]:
    """What a file of this room imports and may not."""
    allowed = MAY_IMPORT[room] | {room, "errors"}
    ours = (name for name in imported(path) if name.split(".")[0] == "svdengine")
    return [name for name in ours if room_of(name) not in allowed]


def modules_that_import_each_other(files: list[Path]) -> list[str]:
    """A circle of modules that import each other, if only when a function runs, or nothing."""
    names = {path: module_name(path) for path in files}
    known = set(names.values())
    edges = {
        name: {found for full in imports_that_run(path) if (found := module_in(full, known)) and found != name}
        for path, name in names.items()
    }
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for following in sorted(edges[name]):
            if circle := walk(following, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(known) if (circle := walk(name, []))), [])


def imports_that_run(path: Path) -> Iterator[str]:
    """As `imported`, but for what only type checkers read."""
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            left.extend(node.orelse)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        else:
            left.extend(ast.iter_child_nodes(node))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "engine" else parts
    return ".".join(["svdengine", *(part for part in parts if part != "__init__")])


def module_in(full: str, known: set[str]) -> str | None:
    """The module that `from a.b import c` loads: a.b.c where that is one, else a.b."""
    return full if full in known else parent if (parent := full.rpartition(".")[0]) in known else None


@pytest.mark.parametrize("folder", SHIPPED)
def test_there_is_something_to_check(folder: str) -> None:
    assert python_files(folder), f"no Python file was found in {ROOT / folder}"


@pytest.mark.parametrize("folder", ["engine", "kernels", "models"])
def test_no_framework_is_imported_at_run_time(folder: str) -> None:
    for path in python_files(folder):
        assert not {name.split(".")[0] for name in imported(path)} & FRAMEWORKS, path


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_in_one_direction(room: str) -> None:
    files = [path for path in python_files(*SHIPPED) if room_of_file(path) == room]
    assert files, f"the room {room} is empty"
    assert not {str(path.relative_to(ROOT)): bad for path in files if (bad := cuts_across(path, room))}


def test_the_table_of_rooms_has_no_circle() -> None:
    left = {room: set(may) for room, may in MAY_IMPORT.items()}
    while left:
        free = {room for room, may in left.items() if not may & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {room: may for room, may in left.items() if room not in free}


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "stray.py"
    file.write_text("def late():\n    from svdengine.measuring.benchmark import run_benchmark\n")
    assert cuts_across(file, "scheduling") == ["svdengine.measuring.benchmark.run_benchmark"]
    assert cuts_across(file, "commands") == []


def test_no_modules_import_each_other() -> None:
    assert modules_that_import_each_other(python_files(*SHIPPED)) == []


def test_contributing_has_the_same_table() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| `")]
    told = {row[0].strip("`/").removeprefix("engine/"): row[2] for row in rows}
    assert told.keys() == MAY_IMPORT.keys()
    for room, may in MAY_IMPORT.items():
        assert set(told[room].replace(",", " ").split()) - {"nothing"} == may, room


def test_importing_the_package_is_light() -> None:
    heavy = {"numpy", "numba", "jinja2", "starlette"}
    code = f"import sys, svdengine; assert not {heavy} & set(sys.modules); svdengine.SamplingParams"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_promised_name_is_there() -> None:
    import svdengine

    for name in svdengine.__all__:
        value = getattr(svdengine, name)
        assert getattr(value, "__module__", "").startswith("svdengine.") or typing.get_origin(value) is not None, name
    assert set(svdengine.__all__) == set(svdengine._HOMES) <= set(dir(svdengine))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = svdengine.nothing


def test_type_checkers_are_told_the_same_names() -> None:
    import svdengine

    (told,) = (node for node in ast.parse(Path(svdengine.__file__).read_text("utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in told.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(told.body) and ast.unparse(told.test) == "TYPE_CHECKING"
    names = {name.name: node.module for node in imports for name in node.names}
    assert names == {name: f"svdengine.{home}" for name, home in svdengine._HOMES.items()}
    assert all(name.asname == name.name for node in imports for name in node.names)  # what makes a name public


def test_help_explains_every_field() -> None:
    import svdengine

    values = [getattr(svdengine, name) for name in svdengine.__all__]
    classes = [value for value in values if dataclasses.is_dataclass(value)]
    assert svdengine.SamplingParams in classes and svdengine.EngineStats in classes
    for value in classes:
        begins = [line.strip().partition(": ")[0] for line in value.__doc__.splitlines() if ": " in line]
        explained = {name for begin in begins for name in begin.split(", ")}
        assert {field.name for field in dataclasses.fields(value)} <= explained, value


def test_the_links_of_editable_installs_are_the_tree() -> None:
    """.links/svdengine has a relative link for each thing that the wheel puts into svdengine, and no other."""
    links = ROOT / ".links" / "svdengine"
    engine = [path for path in (ROOT / "engine").iterdir() if path.name != "__pycache__"]
    others = [ROOT / folder for folder in SHIPPED if folder != "engine"]
    found = {path.name: path.readlink() for path in links.iterdir() if path.name != "__pycache__"}
    assert found == {path.name: Path("../..") / path.relative_to(ROOT) for path in [*engine, *others]}
