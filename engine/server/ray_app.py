"""Several copies of the server behind one address, on one machine or a cluster, by Ray Serve. Extra `ray`.

    serve run svdengine.server.ray_app:app model=/models/model.svdp replicas=2 threads=8

Every replica is what `svdengine serve` runs, in a process of its own with its own KV cache; Ray Serve spreads requests
over them, starts a replica again that died, and lets running answers end before it stops one. Before the replicas are
doors (door.py), small processes without a model, which tell clients of a replica that died while it answered them. The
model file must be at the same path on every machine.

Arguments, beside `model`: replicas, threads (cores of a replica), device, ffn, predictor, context, kv_dtype, kv_memory
(bytes), name, max_requests (of a replica), api_key_file and host. API keys are also read from the environment of the
replicas; the address on which Ray listens is Ray's own setting (`serve run` has it in its config file), and `host` only
says here whether that is more than this machine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdengine.errors import RequestError, SvdEngineError
from svdengine.server.asgi_messages import answer_messages
from svdengine.server.door import Door
from svdengine.server.settings import Settings, read_api_keys

if TYPE_CHECKING:
    from starlette.types import Message, Scope

try:
    from ray import serve
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
except ImportError as error:
    raise SvdEngineError('replicas need Ray Serve; run: pip install "svdengine[ray]"') from error

_TEXTS = ("device", "ffn", "predictor", "kv_dtype")
_NUMBERS = ("context", "kv_memory")  # with threads, which Ray is told of too
_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)  # what says that a replica ended
_REPLICAS = "svdengine"
_DOORS = 2  # at most; more than one, for one that dies not to take all answers along
_SPARE = 64  # requests of a replica that do not run the model, such as /health, or are told to come later


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run` and for Ray's config files. Raises RequestError on arguments that are no use."""
    given = dict(arguments)
    if "model" not in given:
        raise RequestError("give the model file: model=/models/model.svdp")
    model = str(given.pop("model"))
    replicas = _number(given.pop("replicas", 1), "replicas")
    options: dict[str, Any] = {name: str(given.pop(name)) for name in _TEXTS if name in given}
    options |= {name: _number(given.pop(name), name) for name in (*_NUMBERS, "threads") if name in given}
    key_file = given.pop("api_key_file", None)
    settings = Settings(
        name=str(given.pop("name", Path(model).stem)),
        host=str(given.pop("host", "127.0.0.1")),
        api_keys=read_api_keys((), Path(key_file) if key_file else None),
        capacity=_number(given.pop("max_requests", 64), "max_requests"),
    )
    if given:
        raise RequestError(f"{sorted(given)[0]!r} is no argument of this application")
    return replicated(model, settings, replicas=replicas, options=options)


def replicated(model: str, settings: Settings, *, replicas: int, options: Mapping[str, Any]) -> serve.Application:
    """Replicas that each load the model with `options` of `svdengine.load`, and doors before them."""
    per_replica = settings.capacity + _SPARE
    drain: dict[str, Any] = {"graceful_shutdown_timeout_s": settings.drain_seconds}
    backend: Any = serve.deployment(
        Replica,
        name=_REPLICAS,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": options.get("threads", 1)},
        max_ongoing_requests=per_replica,
        **drain,
    )

    def build() -> Door:  # in the door's process, when it starts
        return Door(_ask, settings, _LOST)

    doors: Any = serve.deployment(
        serve.ingress(build)(),
        name="door",
        num_replicas=min(replicas, _DOORS),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=replicas * per_replica,
        **drain,
    )
    application: serve.Application = doors.bind(backend.bind(model, settings, dict(options)))
    return application


class Replica:
    """One model in a process of its own."""

    def __init__(self, model: str, settings: Settings, options: dict[str, Any]) -> None:
        """Load it, with `options` of `svdengine.load`."""
        from svdengine.loading import load
        from svdengine.server.app import create_app
        from svdengine.server.service import Service

        self._service = Service(load(model, **{"sequences": 2, **options}), settings)
        self._app = create_app(self._service)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """What the server answers a request, as ASGI messages. Cancelled when the client goes."""
        async with aclosing(answer_messages(self._app, scope, body)) as messages:
            async for message in messages:
                yield message

    async def check_health(self) -> None:
        """Raises SvdEngineError, for Ray to start the replica again, when a step of the model does not end."""
        if self._service.condition() == "stuck":
            raise SvdEngineError("a step of the model does not end")

    def __del__(self) -> None:
        """Cut what still runs, which Ray has waited for."""
        if hasattr(self, "_service"):
            self._service.close()


async def _ask(scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Have one of the replicas answer, which is told when the answer is not wanted to its end."""
    replicas: Any = serve.get_deployment_handle(_REPLICAS)
    answer = replicas.options(stream=True).answer.remote(scope, body)
    try:
        async for message in answer:
            yield message
    except BaseException:
        answer.cancel()
        raise


def _number(value: Any, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise RequestError(f"{name} must be a whole number of at least 1, found {value!r}")
    return number
