"""A hub of models, through huggingface_hub: what a repository holds, and files of it in that library's own cache.

Address, token, cache and whether there is a network are what the library makes of HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE
and HF_HUB_OFFLINE. It is imported when a name has to be looked up, and not before.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from svdengine.errors import SvdEngineError, quoted
from svdengine.files.hub_name import HubName

_LARGE = 8 << 20  # bytes from which on a file is downloaded so that it can go on later
_MOST_OVER_HTTP = 50 * 10**9  # bytes of a file that hubs give without their own protocol
_CHUNK = 1 << 22
_PARTIAL = ".svdengine.incomplete"
_LINE_SECONDS = 30.0  # between lines about a download, off a terminal


@dataclass(frozen=True)
class Repository:
    """What a name stands for at one commit."""

    name: HubName
    commit: str
    files: Mapping[str, int]  # path -> bytes
    offline: bool  # known from the cache alone

    @property
    def short_commit(self) -> str:
        """As people write it."""
        return self.commit[:7]


def find_repository(name: HubName) -> Repository:
    """Ask the hub what a name stands for now, or the cache where there is no network. Raises SvdEngineError."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError as error:
        raise SvdEngineError(
            f"{name} is a model on a hub, which needs the package huggingface_hub; run: pip install huggingface_hub"
        ) from error

    try:
        with _explained(name):
            info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    except SvdEngineError as error:
        cause = error.__cause__
        if isinstance(cause, OfflineModeIsEnabled) or is_network_failure(cause):
            cached = _cached_repository(name)
            if cached is not None:
                return cached
        raise
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
        raise SvdEngineError(f"{hub_address()} gave no commit for {name}; HF_ENDPOINT says where the hub is")
    files = {s.rfilename: s.size or 0 for s in info.siblings or () if _is_safe(s.rfilename)}
    return Repository(name, info.sha, files, offline=False)


def hub_address() -> str:
    """Where names are looked up."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def cache_folder() -> Path:
    """Where downloads are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def bytes_to_download(repository: Repository, files: list[str]) -> int:
    """Bytes of files that are not here yet; what an interrupted download has left is."""
    total = 0
    for file in files:
        if _cached(repository, file) is None:
            total += repository.files[file]
            if repository.files[file] >= _LARGE:
                total -= _kept_of(repository, file)
    return max(0, total)


def download(repository: Repository, files: list[str]) -> Path:
    """Fetch files, those first that are small; the folder of the snapshot, where all of them are then.

    A large one that is interrupted goes on at the next call. Raises SvdEngineError.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
    for file in sorted(files, key=lambda f: repository.files[f]):
        with _explained(repository.name, file):
            if _cached(repository, file) is None:
                _fetch(repository, file)
    if not repository.offline:
        _note_revision(repository)
    return _snapshot(repository)


def downloaded_bytes(repository: str) -> int:
    """Bytes that the cache holds of a repository."""
    folder = _repository_folder(repository) / "blobs"
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def remove_downloads(repository: str) -> int:
    """Remove what the cache holds of a repository; bytes that are free then."""
    size = downloaded_bytes(repository)
    shutil.rmtree(_repository_folder(repository), ignore_errors=True)
    return size


def is_network_failure(error: BaseException | None) -> bool:
    """Whether nothing answered: no name, no route, no connection, or no answer in time."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return True
    if error is None or isinstance(error, HfHubHTTPError):
        return False
    # The library changed its HTTP client twice; all have these errors, and no common one.
    transport = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "urllib3")
    return transport or isinstance(error, ConnectionError | TimeoutError)


def _fetch(repository: Repository, file: str) -> None:
    from huggingface_hub import hf_hub_download

    if _LARGE <= repository.files[file] <= _MOST_OVER_HTTP and not repository.offline:
        _fetch_blob(repository, file)
    hf_hub_download(repository.name.repository, file, revision=repository.commit)  # links a blob that is there


def _fetch_blob(repository: Repository, file: str) -> None:
    """Download one large file into the cache, from where an interrupted download ended.

    The library itself begins large files anew, since it writes each download to a file of another name. So this uses
    its parts: its lock and its place for the file, and its loop that reads over HTTP and goes on after broken
    connections.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(repository.name.repository, file, revision=repository.commit)
    found = get_hf_file_metadata(url)
    etag, size = found.etag, found.size
    if size is None or not etag or not re.fullmatch(r"[\w-]{6,128}", etag):
        return  # the library says what is wrong with it
    blob = _repository_folder(repository.name.repository) / "blobs" / etag
    lock = cache_folder() / ".locks" / blob.parent.parent.name / f"{etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        partial = _partial(repository, file)
        with partial.open("r+b" if partial.exists() else "wb") as stream:
            kept = _begin_of(stream, size)
            progress_lines: Any = _ProgressLines
            # The URL of the hub, and not the one that it leads to: the client drops the token where the host changes.
            http_get(
                url,
                stream,
                resume_size=kept,
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=Path(file).name,
                tqdm_class=None if sys.stderr.isatty() else progress_lines,
            )
        if kept and not _has_hash(partial, etag):
            partial.unlink()
            raise SvdEngineError(f"{file}: what an earlier download had left was damaged, and is removed; run it again")
        partial.replace(blob)


def _note_revision(repository: Repository) -> None:
    """Write down which commit the revision is, for a time without a network. The library does so for names alone."""
    revision = repository.name.revision
    reference = _repository_folder(repository.name.repository) / "refs" / revision
    if ".." not in revision and revision != repository.commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repository.commit, encoding="utf-8")


class _ProgressLines:
    """What stands in for a progress bar where there is no terminal: a line now and then, with the time left."""

    def __init__(self, *_: object, total: int | None = None, initial: int = 0, desc: str = "", **__: object) -> None:
        self._total, self._done, self._name = total or 0, initial, desc
        self._first, self._begin = initial, time.monotonic()
        self._next = self._begin + _LINE_SECONDS

    def update(self, count: int) -> None:
        """Take bytes that came."""
        self._done += count
        now = time.monotonic()
        if now < self._next or not self._total:
            return
        self._next = now + _LINE_SECONDS
        rate = (self._done - self._first) / max(now - self._begin, 1e-9)
        left = (self._total - self._done) / max(rate, 1)
        done = (
            f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left / 60:.0f} min left"
        )
        print(f"{self._name}: {done}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> _ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _begin_of(stream: IO[bytes], size: int) -> int:
    """Go to the end of what is there already; nothing where it is more than the whole."""
    kept = stream.seek(0, os.SEEK_END)
    if kept > size:
        kept = stream.seek(0)
        stream.truncate()
    return kept


def _has_hash(path: Path, etag: str) -> bool:
    """Whether a file is what its tag says: that of a large file is its SHA-256."""
    if len(etag) != 64:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == etag


def _partial(repository: Repository, file: str) -> Path:
    """Where a download of a large file is kept until it is whole."""
    name = hashlib.sha256(f"{repository.commit} {file}".encode()).hexdigest()[:40]
    return _repository_folder(repository.name.repository) / "blobs" / f"{name}{_PARTIAL}"


def _kept_of(repository: Repository, file: str) -> int:
    path = _partial(repository, file)
    return path.stat().st_size if path.exists() else 0


def _repository_folder(repository: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=repository, repo_type="model")


def _snapshot(repository: Repository) -> Path:
    return _repository_folder(repository.name.repository) / "snapshots" / repository.commit


def _cached(repository: Repository, file: str) -> Path | None:
    path = _snapshot(repository) / file
    return path if path.exists() else None


def _cached_repository(name: HubName) -> Repository | None:
    """What the cache knows of a name: the files of the commit that was downloaded last."""
    folder = _repository_folder(name.repository)
    reference = folder / "refs" / name.revision
    if reference.is_file():
        commits = [reference.read_text(encoding="utf-8").strip()]
    else:
        commits = [path.name for path in folder.glob("snapshots/*") if path.name.startswith(name.revision)]
    if len(commits) != 1:
        return None
    snapshot = folder / "snapshots" / commits[0]
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    files = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in paths}
    return Repository(name, commits[0], files, offline=True) if files else None


def _is_safe(path: str) -> bool:
    """Whether the name of a file stays in its folder, and can be printed."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not any(part in ("", ".", "..") for part in parts)


@contextmanager
def _explained(name: HubName, file: str | None = None) -> Iterator[None]:
    """Turn what the library and its HTTP client raise into one line that says what to do."""
    try:
        yield
    except (SvdEngineError, KeyboardInterrupt):
        raise
    except Exception as error:
        message = _explanation(error, name, file)
        if message is None:
            raise
        raise SvdEngineError(message) from error


def _explanation(error: Exception, name: HubName, file: str | None) -> str | None:
    """One line on an error of the library or its HTTP client, or None on one that is neither's."""
    from huggingface_hub import errors as hub

    address, what = hub_address(), f"{name}, file {file}" if file else str(name)
    token = "log in with `hf auth login`, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    if isinstance(error, hub.OfflineModeIsEnabled):
        return f"{what} is not on this machine, and HF_HUB_OFFLINE forbids to look it up; unset it once"
    if isinstance(error, hub.GatedRepoError):
        return f"{name.repository} is gated: ask for access at {address}/{name.repository}, then {token}"
    if isinstance(error, hub.RevisionNotFoundError):
        where = f"{address}/{name.repository}/tree/main"
        return f"{name.repository} has no revision {quoted(name.revision)}; {where} lists branches and tags"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"{name.repository}: no such file here, and no such model at {address}; if it is private, {token}"
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return f"{what}: {address} has no such file"
    if isinstance(error, hub.HFValidationError):
        return f"{what}: not a name that a hub can have: {_first_line(error)}"
    if status in (401, 403):
        return f"{address} does not give {what} to this account; {token}"
    if status == 429:
        return f"{address} has had too many requests from here; try again in a few minutes"
    if status is not None:
        return f"{address} answered with status {status} for {what}; try again later"
    if is_network_failure(error):
        return f"{what} is not on this machine, and {address} cannot be reached ({_first_line(error)})"
    if isinstance(error, ValueError | LookupError | TypeError):  # of reading the answer
        return f"{address} gave an answer on {what} that is not a hub's; HF_ENDPOINT says where the hub is"
    return f"{what}: {_first_line(error)}" if isinstance(error, OSError) else None


def _first_line(error: BaseException) -> str:
    """Of what went wrong at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
