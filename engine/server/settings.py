"""How a server is run."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from svdengine.errors import RequestError

KEY_VARIABLE = "SVDENGINE_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Limits, and who may use the server."""

    name: str  # of the model, in answers
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()  # empty: whoever reaches the server may use it
    cors_origins: tuple[str, ...] = ()  # web pages of other servers that may use this one; "*": all
    embeddings: bool = False  # whether embeddings are made of the model's hidden states
    capacity: int = 64  # completions that run or wait at a time
    max_body: int = 4 << 20  # bytes
    max_connections: int = 1024  # in all
    address_connections: int = 256  # of one address
    head_seconds: float = 10.0  # for a client to say what it wants
    body_seconds: float = 30.0  # for a client to send its request
    request_seconds: float = 600.0  # for an answer; then it ends as if its length limit were reached
    drain_seconds: float = 30.0  # for running requests, when the server is asked to end
    log_prompts: bool = False  # whether the log has what was asked

    @property
    def loopback(self) -> bool:
        """Whether only programs on this machine reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_api_keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Keys given, those in a file (one a line, after # a comment), and that of the environment.

    Raises RequestError when the file cannot be read or holds none, or a key is empty or not ASCII.
    """
    keys = [*given]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the API keys in {file}: {error}") from error
        found = [key for line in lines if (key := line.partition("#")[0].strip())]
        if not found:
            raise RequestError(f"{file} holds no API key")
        keys += found
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    if not all(key.isascii() and key.isprintable() and key.strip() for key in keys):
        raise RequestError("an API key must be printable ASCII text that is not empty")
    return tuple(keys)
