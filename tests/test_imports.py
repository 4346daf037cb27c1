"""What may be imported where: no training framework at inference time, and a light package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "engine": {"engine", "kernels", "models", "converters"},  # converters: only for the demo model and `convert`
    "kernels": {"kernels", "models", "engine"},  # of the engine, its errors
    "models": {"models"},
}
FRAMEWORKS = {"torch", "jax", "jaxlib", "transformers", "tensorflow", "flax"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_framework_is_imported(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & FRAMEWORKS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_import_in_one_direction(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    packages = {"kernels", "models", "converters", "tools"}
    for name in imported(path):
        if name.startswith("svdengine"):
            part = [*name.split("."), ""][1]
            assert (part if part in packages else "engine") in FOLDERS[folder], name
            if folder == "kernels" and part not in packages:
                assert part == "errors", name


def test_importing_the_package_is_light() -> None:
    heavy = {"numpy", "numba", "jinja2", "starlette"}
    code = f"import sys, svdengine; assert not {heavy} & set(sys.modules); svdengine.SamplingParams"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_promised_name_is_there() -> None:
    import svdengine

    assert all(getattr(svdengine, name) is not None for name in svdengine.__all__)
    assert set(svdengine.__all__) == set(svdengine._HOMES) <= set(dir(svdengine))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = svdengine.nothing
