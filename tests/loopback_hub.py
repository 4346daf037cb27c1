"""A server on loopback that speaks as much of the hub's HTTP interface as huggingface_hub needs for models."""

import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS = 1 << 20  # bytes from which on a file has its SHA-256 as its tag, as large files have on a hub


@dataclass
class Repo:
    """A repository: what its revisions are, and who may read it."""

    commits: dict[str, dict[str, Path | bytes]]  # commit -> path -> content
    refs: dict[str, str]  # branch or tag -> commit
    gated: bool = False
    private: bool = False


@dataclass
class Hub:
    """The state of the server, which tests change, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    token: str = "hf_right"
    url: str = ""
    asked: list[str] = field(default_factory=list)  # "GET /path", and " bytes=10-" where a range was asked for
    sent: int = 0  # bytes of files
    break_after: int | None = None  # bytes of one answer after which the connection is cut, once
    down_after: bool = False  # be down (status 503) after that
    status: int | None = None  # answer everything with it
    store: "Hub | None" = None  # another host, to which large files are redirected, as hubs do
    blobs: dict[str, Path | bytes] = field(default_factory=dict)  # of such a host, by tag
    tokens: list[str | None] = field(default_factory=list)  # that came with requests for them

    def add(self, name: str, files: dict[str, Path | bytes], revision: str = "main", **access: bool) -> str:
        """Give a repository a commit, which `revision` points to from now on."""
        commit = hashlib.sha1(repr((name, sorted(files), len(self.repos), revision)).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}))
        while commit in repo.commits:
            commit = hashlib.sha1(commit.encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs[revision] = commit
        repo.refs.setdefault("main", commit)
        for key, value in access.items():
            setattr(repo, key, value)
        return commit

    def add_folder(self, name: str, folder: Path, revision: str = "main", **access: bool) -> str:
        """Give a repository the files of a folder."""
        files: dict[str, Path | bytes] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        return self.add(name, files, revision, **access)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        self.hub.asked.append(f"{self.command} {path}" + (f" {wanted}" if wanted else ""))
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "", "broken")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        if parts[0] == "blobs":
            self.hub.tokens.append(self.headers.get("authorization"))
            return self._send(self.hub.blobs[parts[1]], {"ETag": '"of-the-store"'}, count=True)
        if "resolve" in parts:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._refuse(404, "", "no such page")

    def _repo(self, name: str, *, content: bool) -> Repo | None:
        repo, sent = self.hub.repos.get(name), self.headers.get("authorization")
        allowed = sent == f"Bearer {self.hub.token}"
        if sent and not allowed:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not allowed):
            return self._refuse(401 if not allowed else 404, "RepoNotFound", "Repository not found")
        if repo.gated and content and not allowed:
            return self._refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name, content=False)
        if repo is None:
            return
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for path, content in repo.commits[commit].items():
            size, etag = _size(content), _etag(content)
            entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": etag[:40]}
            if size >= LFS:
                entry["lfs"] = {"sha256": etag, "size": size, "pointerSize": 130}
            siblings.append(entry)
        body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": repo.private,
                "gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        self._send(json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, content=True)
        if repo is None:
            return
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.commits[commit].get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        if self.hub.store is not None and _size(content) >= LFS:
            return self._redirect(self.hub.store, content, commit)
        self._send(content, headers, count=True)

    def _redirect(self, store: Hub, content: Path | bytes, commit: str) -> None:
        etag = _etag(content)
        store.blobs[etag] = content
        self.send_response(302)
        url = store.url.replace("127.0.0.1", "localhost")  # another host by its name
        for key, value in {
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(_size(content)),
            "Location": f"{url}/blobs/{etag}",
            "Content-Length": "0",
        }.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, content: Path | bytes, headers: dict[str, str], *, count: bool = False) -> None:
        size, start = _size(content), 0
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(size - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        data = content[start:] if isinstance(content, bytes) else _read(content, start)
        limit = self.hub.break_after if count and len(data) > (self.hub.break_after or len(data)) else None
        if limit is not None:
            self.hub.break_after = None
            self.hub.status = 503 if self.hub.down_after else None
            data, self.close_connection = data[:limit], True
        self.wfile.write(data)
        if count:
            self.hub.sent += len(data)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _read(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _etag(content: Path | bytes) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest() if len(data) >= LFS else hashlib.sha1(data).hexdigest()


class LoopbackHub:
    """A context manager: the server runs while the block does."""

    def __enter__(self) -> Hub:
        self.hub = Hub()
        handler = type("Handler", (_Handler,), {"hub": self.hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.hub.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def use_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process speak with the server, with an empty cache, and without a token."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SVDENGINE_MODELS", str(folder / "models"))
    # What the library makes of HF_ENDPOINT and HF_HOME when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)


def environment_of(hub: Hub, folder: Path) -> dict[str, str]:
    """The same for another process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "SVDENGINE_MODELS": str(folder / "models"),
        "SVDENGINE_DEVICE": "reference",
    }
