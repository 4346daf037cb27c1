"""The hub's client against a server on loopback: what is found, what is not, and downloads that are interrupted."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import Hub, LoopbackHub, environment_of, use_hub

from svdengine.errors import SvdEngineError
from svdengine.files import hub as client
from svdengine.files.hub import Repository, bytes_to_download, download, find_repository, remove_downloads
from svdengine.files.hub_name import HubName

NAME = HubName("org/name")
LARGE = os.urandom(3 << 20)
FILES: dict[str, Path | bytes] = {"config.json": b"{}", "model.safetensors": LARGE, "README.md": b"#"}
WANTED = ["config.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with LoopbackHub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
        monkeypatch.setattr(client, "_LARGE", 1 << 20)
        hub.add("org/name", dict(FILES))
        yield hub


def refused(name: HubName = NAME) -> str:
    """The one line on what does not work."""
    with pytest.raises(SvdEngineError) as caught:
        found = find_repository(name)
        download(found, [file for file in WANTED if file in found.files])
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


def files_of(repository: Repository) -> dict[str, bytes]:
    folder = download(repository, WANTED)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_found_and_only_what_is_needed(hub: Hub) -> None:
    found = find_repository(NAME)
    assert (found.files, found.offline) == ({name: len(data) for name, data in FILES.items()}, False)  # type: ignore[arg-type]
    assert bytes_to_download(found, WANTED) == 2 + len(LARGE)
    assert files_of(found) == {"config.json": b"{}", "model.safetensors": LARGE}
    assert bytes_to_download(found, WANTED) == 0 and hub.sent == 2 + len(LARGE)
    hub.asked.clear()
    assert files_of(found).keys() == set(WANTED) and hub.asked == []
    assert remove_downloads("org/name") == 2 + len(LARGE) and bytes_to_download(found, WANTED) == 2 + len(LARGE)
    assert remove_downloads("org/other") == 0


def test_without_the_hubs_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SvdEngineError, match="pip install huggingface_hub"):
        find_repository(HubName("some/model"))


def test_revisions(hub: Hub) -> None:
    old = hub.repos["org/name"].refs["main"]
    new = hub.add("org/name", {"config.json": b"[]"}, "v2")
    assert find_repository(NAME).commit == find_repository(HubName("org/name", None, old)).commit == old
    assert find_repository(HubName("org/name", None, "v2")).commit == new
    hub.repos["org/name"].refs["refs/pr/1"] = new
    assert find_repository(HubName("org/name", None, "refs/pr/1")).commit == new
    message = refused(HubName("org/name", None, "v3"))
    assert message.startswith("org/name has no revision 'v3'; ") and hub.url in message


def test_missing_gated_and_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"org/none: no such file here, and no such model at {hub.url}; if it is private, log in" in refused(
        HubName("org/none")
    )
    hub.repos["org/name"].gated = True
    assert refused().startswith(f"org/name is gated: ask for access at {hub.url}/org/name, then log in with `hf auth")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not give org/name to this account; log in" in refused()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert files_of(find_repository(NAME))["model.safetensors"] == LARGE
    hub.repos["org/name"].private = True
    assert find_repository(NAME).files
    monkeypatch.delenv("HF_TOKEN")
    assert "if it is private, log in" in refused()


def test_large_files_lie_elsewhere_and_the_token_does_not_go_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repos["org/name"].private = True
    with LoopbackHub() as store:
        hub.store, store.break_after, store.down_after = store, 1 << 20, True
        assert "answered with status 503 for org/name, file model.safetensors" in refused()
        store.status = None
        assert files_of(find_repository(NAME))["model.safetensors"] == LARGE
        assert store.sent == len(LARGE) and set(store.tokens) == {None}


def test_a_file_that_went(hub: Hub) -> None:
    found = find_repository(NAME)
    del hub.repos["org/name"].commits[found.commit]["config.json"]
    with pytest.raises(SvdEngineError, match=r"org/name, file config\.json: http.* has no such file"):
        download(found, WANTED)


def test_a_hub_that_is_ill(hub: Hub) -> None:
    for status, message in ((500, "answered with status 500 for org/name; try again later"), (403, "does not give")):
        hub.status = status
        assert message in refused()


def test_what_is_no_hub(hub: Hub) -> None:
    hub.status = 200
    assert refused() == f"{hub.url} gave an answer on org/name that is not a hub's; HF_ENDPOINT says where the hub is"


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(find_repository(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find_repository(NAME)
    assert found.offline and files_of(found) == whole
    assert find_repository(HubName("org/name", None, found.commit[:8])).commit == found.commit
    assert "org/none is not on this machine, and HF_HUB_OFFLINE forbids to look it up" in refused(HubName("org/none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_repository(NAME).offline
    message = refused(HubName("org/none"))
    assert message.startswith("org/none is not on this machine, and http://127.0.0.1:9 cannot be reached (")


def test_a_broken_connection_goes_on_by_itself(hub: Hub) -> None:
    hub.break_after = 1 << 20
    assert files_of(find_repository(NAME))["model.safetensors"] == LARGE
    assert hub.sent == 2 + len(LARGE)


def test_an_interrupted_download_goes_on(hub: Hub) -> None:
    hub.break_after, hub.down_after = 1 << 20, True
    assert "answered with status 503 for org/name, file model.safetensors" in refused()
    hub.status = None
    found = find_repository(NAME)
    left = bytes_to_download(found, WANTED)
    assert 0 < left < len(LARGE)
    assert files_of(found)["model.safetensors"] == LARGE
    assert any(asked.endswith(f"bytes={len(LARGE) - left}-") for asked in hub.asked)
    assert hub.sent == 2 + len(LARGE)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_off_a_terminal_there_are_lines(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "_LINE_SECONDS", 0.0)
    files_of(find_repository(NAME))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert all(re.fullmatch(r"model\.safetensors: \d of 3 MB, [\d.]+ MB/s, \d+ min left", line) for line in lines)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from huggingface_hub import constants\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1 << 16\n"
        "from svdengine.files import hub\n"
        "from svdengine.files.hub_name import HubName\n"
        "hub._LARGE = 1 << 20\n"
        "import time; time.sleep = lambda s: os.kill(os.getpid(), signal.SIGKILL)  # before it tries again\n"
        f"found = hub.find_repository(HubName('org/name')); hub.download(found, {WANTED!r})"
    )
    hub.break_after = 1 << 20
    done = subprocess.run([sys.executable, "-c", code], env=environment_of(hub, tmp_path), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = find_repository(NAME)
    assert bytes_to_download(found, WANTED) < len(LARGE)
    assert files_of(found)["model.safetensors"] == LARGE and hub.sent < len(LARGE) + (1 << 17)


def test_what_is_damaged_is_not_gone_on_with(hub: Hub) -> None:
    found = find_repository(NAME)
    download(found, ["config.json"])
    partial = client._partial(found, "model.safetensors")
    partial.write_bytes(bytes(1 << 20))
    with pytest.raises(SvdEngineError, match="what an earlier download had left was damaged, and is removed"):
        download(found, WANTED)
    assert files_of(found)["model.safetensors"] == LARGE
    remove_downloads("org/name")
    download(found, ["config.json"])
    partial.write_bytes(bytes(5 << 20))  # more than the whole
    assert files_of(found)["model.safetensors"] == LARGE


def test_two_programs_download_once(hub: Hub) -> None:
    found = find_repository(NAME)
    threads = [threading.Thread(target=download, args=(found, WANTED)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files_of(found)["model.safetensors"] == LARGE
    assert sum("GET" in a and "safetensors" in a for a in hub.asked) == 1


def test_names_of_files_that_lead_elsewhere_are_left_out(hub: Hub) -> None:
    hub.add(
        "org/bad", {"../up.gguf": b"x", "/root.gguf": b"x", "a\\b.gguf": b"x", "a\x1b[2J.gguf": b"x", "ok.gguf": b"x"}
    )
    assert list(find_repository(HubName("org/bad")).files) == ["ok.gguf"]


def test_the_tag_of_a_large_file_is_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert client._has_hash(tmp_path / "a", hashlib.sha256(b"abc").hexdigest())
    assert not client._has_hash(tmp_path / "a", hashlib.sha256(b"abd").hexdigest())
    assert client._has_hash(tmp_path / "a", "0" * 40)  # of git's kind: its size was checked


def test_looking_up_is_all_that_imports_the_library() -> None:
    code = "import sys, svdengine.files.hub, svdengine.loading; assert 'huggingface_hub' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
