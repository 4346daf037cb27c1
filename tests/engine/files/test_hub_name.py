"""Names of models on a hub, and what is a path instead."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdengine.errors import RequestError
from svdengine.files.hub_name import HubName, parse_model

WORD = st.text("aZ09_", min_size=1, max_size=6)
PART = st.lists(WORD, min_size=1, max_size=3).map(".".join)
MORE = st.lists(PART, min_size=1, max_size=3).map("/".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openbmb/MiniCPM-S-1B-sft", HubName("openbmb/MiniCPM-S-1B-sft")),
        ("org/name@v2", HubName("org/name", None, "v2")),
        ("org/name@refs/pr/1", HubName("org/name", None, "refs/pr/1")),
        ("org/name:a-Q4_K_M.gguf", HubName("org/name", "a-Q4_K_M.gguf")),
        ("org/name:sub/a.gguf@v2", HubName("org/name", "sub/a.gguf", "v2")),
        ("org/name@v2:a.gguf", HubName("org/name", "a.gguf", "v2")),
        ("hf://org/name", HubName("org/name")),
        ("hf://models/org/name@v2", HubName("org/name", None, "v2")),
        ("hf://org/name@v2/sub/a.gguf", HubName("org/name", "sub/a.gguf", "v2")),
        ("hf://org/name/a.gguf", HubName("org/name", "a.gguf")),
        ("hf://org/name:a.gguf", HubName("org/name", "a.gguf")),
    ],
)
def test_names(text: str, expected: HubName) -> None:
    assert parse_model(text) == expected


@pytest.mark.parametrize(
    "text",
    ["model.svdp", "./org/name", "../org/name", "/org/name", "~/x", "org/name/", "a/b/c", "models/x.svdp", "dir/x.gguf",
     "name", "", "org/na--me", "org/..", "org/name@", "org/name:a:b", "org/name@a@b", "-org/name", "org/" + "x" * 97],
)  # fmt: skip
def test_paths(text: str) -> None:
    assert parse_model(text) == Path(text)


def test_what_is_here_is_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_model("org/name") == Path("org/name")
    assert parse_model("hf://org/name") == HubName("org/name")


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://datasets/", "hf://org/name@", "hf://../x", "hf://org//x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="expected hf://ORG/NAME"):
        parse_model(text)


@given(PART, PART, st.none() | MORE, MORE)
def test_a_name_reads_back(organisation: str, repository: str, file: str | None, revision: str) -> None:
    name = HubName(f"{organisation}/{repository}", file, revision)
    assert parse_model(f"hf://{name}") == name
    assert name.stem == repository
