"""One request of a client: the completions that it needs of the engine, and how they are told."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from svdengine.scheduling.completion import Completion
from svdengine.scheduling.request import Generation
from svdengine.server.api_error import ApiError
from svdengine.server.body import Body
from svdengine.server.framing import Framing, Object
from svdengine.server.request_loop import Update


@dataclass(frozen=True)
class StreamOptions:
    """Whether the answer comes in pieces, and what these tell besides.

    include_usage: what it took, after the last piece.
    include_layers: for each token the shares of neurons that its step computed, by layer.
    """

    stream: bool = False
    include_usage: bool = False
    include_layers: bool = False


@dataclass(frozen=True)
class Head:
    """What an answer and all its pieces begin with."""

    kind: str  # such as "chat.completion"
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, suffix: str = "") -> Object:
        """The fields, in a new object."""
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.model,
        }


class Job(Protocol):
    """Requests for the engine, each an index, and the JSON made of what comes back."""

    @property
    def requests(self) -> Sequence[Generation]:
        """What the engine runs."""
        ...

    @property
    def prompt_field(self) -> str:
        """The field of the body that holds what may be too long."""
        ...

    @property
    def options(self) -> StreamOptions:
        """How the answer is sent."""
        ...

    @property
    def framing(self) -> Framing:
        """How its pieces are written when they are streamed."""
        ...

    def opening(self) -> list[Object]:
        """Pieces that come before any text."""
        ...

    def pieces(self, index: int, update: Update) -> list[Object]:
        """Pieces that tell of an update."""
        ...

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """Pieces that come after all text."""
        ...

    def answer(self, completions: Sequence[Completion]) -> Object:
        """The whole in one object, when it does not come in pieces."""
        ...


def take_stream_options(body: Body) -> StreamOptions:
    """`stream` and `stream_options`."""
    stream = bool(body.take("stream", bool))
    given = body.take("stream_options", dict)
    if given is None:
        return StreamOptions(stream)
    options = Body(given)
    usage, layers = bool(options.take("include_usage", bool)), bool(options.take("include_layers", bool))
    options.ignore("include_obfuscation")
    options.finish()
    return StreamOptions(stream, usage and stream, layers and stream)


def check_model(body: Body, name: str) -> None:
    """Raise ApiError when the body asks for another model than `name`."""
    model = body.take("model", str)
    if model is not None and model != name:
        message = f"the model {model[:200]!r} is not served here; this server has {name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def usage(completions: Sequence[Completion], choices: int) -> Object:
    """What the completions took; `choices` of them share a prompt. The last field is our own."""
    first = [c.stats for c in completions[::choices]]
    prompt = sum(stats.prompt_tokens for stats in first)
    generated = sum(c.stats.generated_tokens for c in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in first)},
        "svdengine": _figures(completions),
    }


def _figures(completions: Sequence[Completion]) -> Object:
    stats = [c.stats for c in completions]
    return {
        "seconds": round(max(s.seconds for s in stats), 4),
        "time_to_first_token": round(min(s.time_to_first_token for s in stats), 4),
        "tokens_per_second": round(sum(s.tokens_per_second for s in stats), 2),
        "predicted_density": stats[0].predicted_density,
        "active_density": stats[0].active_density,
    }
