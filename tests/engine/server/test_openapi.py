"""/openapi.json is true to what the server checks and answers: schemathesis tries it."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from http_ask import ask
from hypothesis import HealthCheck, Phase, given, settings
from live_server import LiveServer, live_server
from patience import PATIENCE
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from svdengine.server.app import Routes
from svdengine.server.body import NotedFields
from svdengine.server.chat_fields import CHAT_DETAILS, COMPLETION_DETAILS
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
UNTOLD = {"/openapi.json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("openapi"), context=128, request_seconds=1.0, embeddings=True) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


@pytest.fixture(scope="module")
def document(server: LiveServer) -> Any:
    status, found, _ = ask(server, "/openapi.json")
    assert status == 200
    return found


def operations(server: LiveServer) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def attempt(server: LiveServer, examples: int, seeded: bool) -> None:
    """Send `examples` requests that fit the document, and as many that do not, to every operation."""
    for operation in operations(server):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue

            @settings(
                max_examples=examples,
                deadline=None,
                derandomize=seeded,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS, timeout=PATIENCE)

            check()


@pytest.mark.slow
def test_the_server_does_what_the_document_says(server: LiveServer) -> None:
    attempt(server, 6, seeded=True)


@pytest.mark.long
def test_it_does_so_for_long(server: LiveServer) -> None:
    attempt(server, 200, seeded=False)


def test_every_path_is_told(server: LiveServer, document: Any) -> None:
    told = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    there = {(path.replace(":path", ""), method) for path, method, _ in Routes(server.service).paths()}
    assert told == {(path, method) for path, method in there if path not in UNTOLD}


def test_a_path_with_a_line_break_has_an_error_of_the_right_form(server: LiveServer) -> None:
    status, body, _ = ask(server, "/v1/models/a%0Ab")
    assert status == 404 and "there is no '/v1/models/a" in body["error"]["message"]
    assert list(ask(server, "/api/a%0Ab")[1]) == ["error"]


@pytest.mark.parametrize(
    ("path", "make", "least", "details"),
    [
        ("/v1/chat/completions", ChatJob, {"messages": [{"role": "user", "content": "a"}]}, CHAT_DETAILS),
        ("/v1/completions", CompletionJob, {"prompt": "a"}, COMPLETION_DETAILS),
    ],
)
def test_the_fields_are_those_that_are_read(
    server: LiveServer, document: Any, path: str, make: Any, least: Any, details: Any
) -> None:
    told = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    notes = NotedFields(least)
    make(server.llm, "tiny", notes)
    assert told.keys() == notes.schemas.keys() > details.keys()
    for name in told:  # whatever is wrong with the value, the field is known
        _, body, _ = ask(server, path, {**least, name: {"no": "value"}})
        error = body.get("error") or {}
        assert (error.get("code"), error.get("param")) != ("unknown_parameter", name)
    assert ask(server, path, {**least, "no_such_field": 1})[1]["error"]["code"] == "unknown_parameter"
