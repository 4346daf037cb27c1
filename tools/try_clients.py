"""Try client libraries on a server that runs, and say what works, as a table.

    svdengine serve model.svdp --embeddings --name NAME
    python tools/try_clients.py http://127.0.0.1:8080 NAME [CLIENT ...]

It needs nothing of svdengine, so that each client can be installed in an environment of its own; one that is not there
is left out. What a small model says is not judged: an answer must have the form that was asked for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Server(NamedTuple):
    """Where the server is, and what it calls its model."""

    url: str
    model: str

    @property
    def v1(self) -> str:
        """The base address of OpenAI's interface."""
        return f"{self.url}/v1"


Check = Callable[[Server], None]
CHECKS: dict[str, dict[str, Check]] = defaultdict(dict)  # distribution -> what is tried -> how

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
SHORT = {"max_tokens": 16, "temperature": 0}
LONGER = {"max_tokens": 100, "temperature": 0}
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "enum": ["Paris", "Rome"]}},
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": WEATHER}}


def check(client: str, what: str) -> Callable[[Check], Check]:
    """Have a function be what tries something of a client."""

    def add(function: Check) -> Check:
        CHECKS[client][what] = function
        return function

    return add


def _openai(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0)


@cache
def _person() -> Any:
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: Literal["Ann", "Bob"]
        age: int = Field(ge=0, le=120)

    return Person


@check("openai", "chat, streamed, tools, `parse`")
def _openai_chat(server: Server) -> None:
    chat = _openai(server).chat.completions
    whole = chat.create(model=server.model, messages=HELLO, **SHORT)
    pieces = list(chat.create(model=server.model, messages=HELLO, stream=True, **SHORT))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == whole.choices[0].message.content != ""
    forced: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    called = chat.create(model=server.model, messages=HELLO, **forced, **LONGER)
    (call, *_) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    turns = [*HELLO, called.choices[0].message, result]
    assert chat.create(model=server.model, messages=turns, tools=[TOOL], tool_choice="none", **SHORT).choices
    parsed = chat.parse(model=server.model, messages=HELLO, response_format=_person(), **LONGER)
    assert parsed.choices[0].message.parsed is not None


@check("openai", "completions")
def _openai_completions(server: Server) -> None:
    done = _openai(server).completions.create(model=server.model, prompt=["Once", "Twice"], logprobs=2, **SHORT)
    assert len(done.choices) == 2 and done.choices[0].logprobs.token_logprobs


@check("openai", "responses, streamed, tools, `parse`")
def _openai_responses(server: Server) -> None:
    responses = _openai(server).responses
    limits: Any = {"temperature": 0, "max_output_tokens": 16}
    longer: Any = {"temperature": 0, "max_output_tokens": 100}
    first = responses.create(model=server.model, input="Say hello.", **limits)
    second = responses.create(model=server.model, input="Again.", previous_response_id=first.id, **limits)
    assert first.output_text and second.output_text
    with responses.stream(model=server.model, input="Say hello.", **limits) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == first.output_text
    tool = {"type": "function", **TOOL["function"], "strict": True}  # type: ignore[dict-item]
    forced: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = responses.create(model=server.model, input="Hello", **forced, **longer)
    assert json.loads(called.output[0].arguments)["city"] in ("Paris", "Rome")
    parsed = responses.parse(model=server.model, input="Ann is 12.", text_format=_person(), **longer)
    assert parsed.output_parsed is not None


@check("openai", "embeddings")
def _openai_embeddings(server: Server) -> None:
    found = _openai(server).embeddings.create(model=server.model, input=["a cat", "a dog"])
    assert len(found.data) == 2 and abs(sum(x * x for x in found.data[0].embedding) - 1) < 1e-4


@check("openai", "errors: a long prompt")
def _openai_overflow(server: Server) -> None:
    import openai

    try:
        _openai(server).chat.completions.create(model=server.model, messages=_long())
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded" and error.param == "messages", error
    else:
        raise AssertionError("it was taken")


def _long() -> list[Any]:
    return [{"role": "user", "content": "hello " * 60_000}]


@check("anthropic", "messages, streamed, tools, `count_tokens`")
def _anthropic(server: Server) -> None:
    import anthropic

    messages = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0).messages
    asked: Any = {"model": server.model, "max_tokens": 16, "messages": HELLO, "temperature": 0}
    if "temperature" not in anthropic.resources.messages.Messages.create.__annotations__:
        asked["extra_body"] = {"temperature": asked.pop("temperature")}
    whole = messages.create(**asked)
    with messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    tool = {"name": "weather", "input_schema": WEATHER}
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    called = messages.create(**{**asked, "max_tokens": 100}, tools=[tool], tool_choice=any_one)
    assert called.stop_reason == "tool_use" and called.content[0].input["city"] in ("Paris", "Rome")
    assert messages.count_tokens(model=server.model, messages=HELLO).input_tokens > 0


@check("ollama", "`chat`, `generate`, streamed, tools, `format`, `list`, `show`, `embed`")
def _ollama(server: Server) -> None:
    import ollama

    client = ollama.Client(host=server.url)
    options, longer = ({"num_predict": count, "temperature": 0} for count in (16, 100))
    whole = client.chat(server.model, messages=HELLO, options=options).message.content
    pieces = client.chat(server.model, messages=HELLO, options=options, stream=True)
    assert "".join(piece.message.content for piece in pieces) == whole
    assert client.generate(server.model, "Once upon a time", options=options).response
    assert client.chat(server.model, messages=HELLO, tools=[TOOL], options=options).message is not None
    form = client.chat(server.model, messages=HELLO, format=_person().model_json_schema(), options=longer)
    assert _person().model_validate_json(form.message.content)
    assert client.list().models and client.show(server.model).modelinfo
    assert len(client.embed(server.model, ["a cat", "a dog"]).embeddings) == 2


@check("langchain-openai", "chat, streamed, tools, structured output, responses, errors: a long prompt")
def _langchain(server: Server) -> None:
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    at: Any = {"base_url": server.v1, "api_key": "none", "model": server.model, "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**at, max_tokens=64)
    whole = chat.invoke("Say hello.")
    assert "".join(str(piece.content) for piece in chat.stream("Say hello.")) == whole.content
    assert chat.bind_tools([TOOL], tool_choice="any").invoke("Weather in Rome?").tool_calls
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(_person(), method=method).invoke("Ann is 12."), _person())
    assert ChatOpenAI(**at, use_responses_api=True, max_tokens=16).invoke("Say hello.").text
    try:
        chat.invoke("hello " * 60_000)
    except ContextOverflowError:
        return
    raise AssertionError("it was not recognised as too long")


@check("langchain-openai", "embeddings (`check_embedding_ctx_length=False`)")
def _langchain_embeddings(server: Server) -> None:
    from langchain_openai import OpenAIEmbeddings

    at: Any = {"base_url": server.v1, "api_key": "none", "model": server.model}
    texts = [f"text {i}" for i in range(40)]
    assert len(OpenAIEmbeddings(**at, check_embedding_ctx_length=False).embed_documents(texts)) == 40


@check("instructor", "tools, JSON schema")
def _instructor(server: Server) -> None:
    import instructor

    person = _person()
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(_openai(server), mode=mode)
        made = client.chat.completions.create(
            model=server.model, messages=HELLO, response_model=person, temperature=0, max_tokens=200, max_retries=0
        )
        assert isinstance(made, person)


@check("litellm", "`completion`, streamed, `responses`, `embedding`, errors: a long prompt")
def _litellm(server: Server) -> None:
    import litellm

    at: Any = {"model": f"openai/{server.model}", "api_base": server.v1, "api_key": "none", "num_retries": 0}
    whole = litellm.completion(messages=HELLO, **at, **SHORT).choices[0].message.content
    pieces = litellm.completion(messages=HELLO, stream=True, **at, **SHORT)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    assert litellm.responses(input="Say hello.", max_output_tokens=16, **at).output
    assert len(litellm.embedding(input=["a cat", "a dog"], encoding_format="float", **at).data) == 2
    try:
        litellm.completion(messages=_long(), **at)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was not recognised as too long")


@check("pydantic-ai-slim", "text, `NativeOutput`, `ToolOutput`, tools beside `NativeOutput`, responses")
def _pydantic_ai(server: Server) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.usage import UsageLimits

    provider = OpenAIProvider(base_url=server.v1, api_key="none")
    limits: Any = {"temperature": 0, "max_tokens": 60, "parallel_tool_calls": False}
    for made in (OpenAIChatModel, OpenAIResponsesModel):
        model = made(server.model, provider=provider)
        assert Agent(model, model_settings=limits).run_sync("Say hello.").output
        for kind in (NativeOutput, ToolOutput):
            agent: Any = Agent(model, output_type=kind(_person()), model_settings=limits)
            assert isinstance(agent.run_sync("Ann is 12.").output, _person())
        both: Any = Agent(model, output_type=NativeOutput(_person()), model_settings=limits, retries=3)
        both.tool_plain(_age_of)
        with _may_tire():
            both.run_sync("How old is Ann?", usage_limits=UsageLimits(request_limit=4))


def _age_of(name: str) -> int:
    """The age of a person."""
    return 12


@contextmanager
def _may_tire() -> Iterator[None]:
    """A small model may call a tool for ever, which the clients end; an error of the server is another thing."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("UsageLimitExceeded", "MaxTurnsExceeded"):
            raise


@check("openai-agents", "responses and chat: text, tools, `output_type`, streamed")
def _agents(server: Server) -> None:
    import asyncio

    import openai
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=0)

    async def run() -> None:
        for made in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
            at: Any = {
                "name": "helper",
                "model": made(server.model, openai_client=client),
                "model_settings": ModelSettings(temperature=0, max_tokens=60, parallel_tool_calls=False),
            }
            assert (await Runner.run(Agent(**at), "Say hello.")).final_output
            found = await Runner.run(Agent(**at, output_type=_person()), "Ann is 12.")
            assert isinstance(found.final_output, _person())
            streamed = Runner.run_streamed(Agent(**at), "Say hello.")
            assert [event async for event in streamed.stream_events()]
            both = Agent(**at, output_type=_person(), tools=[function_tool(_age_of)])
            with _may_tire():
                await Runner.run(both, "How old is Ann?", max_turns=4)

    asyncio.run(run())


def _command(name: str, *arguments: str, folder: str | None = None, **environment: str) -> str:
    """What a program of the environment says. Raises AssertionError when it fails."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or name
    found = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout


@check("llm", "a model of `extra-openai-models.yaml`, streamed and not, `--schema`")
def _llm(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = ["model_id: here", f"model_name: {server.model}", f"api_base: {server.v1}", "supports_schema: true"]
        Path(folder, "extra-openai-models.yaml").write_text("- " + "\n  ".join(lines) + "\n", encoding="utf-8")
        at = {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        asked = ("-m", "here", "Say hello.", "-o", "max_tokens", "100", "-o", "temperature", "0")
        assert _command("llm", *asked, **at).strip() == _command("llm", *asked, "--no-stream", **at).strip() != ""
        assert "age" in json.loads(_command("llm", *asked, "--schema", "name, age int", **at))


@check("lm_eval", "`local-completions` on a task of multiple choice")
def _lm_eval(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        questions = [{"q": f"{i} + 1 =", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(3)]
        Path(folder, "q.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
        task = {
            "task": "sums",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{folder}/q.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        Path(folder, "sums.yaml").write_text(json.dumps(task), encoding="utf-8")
        at = f"base_url={server.v1}/completions,model={server.model},tokenizer_backend=remote"
        arguments = ("--model", "local-completions", "--model_args", at, "--tasks", "sums", "--include_path", folder)
        assert "acc" in _command("lm_eval", *arguments, HF_HOME=folder)


@check("aider-chat", "one message about a file")
def _aider(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.py").write_text("print('helo')\n", encoding="utf-8")
        settings = [{"name": f"openai/{server.model}", "extra_params": {"max_tokens": 64}}]
        Path(folder, ".aider.model.settings.yml").write_text(json.dumps(settings), encoding="utf-8")
        arguments = ["--model", f"openai/{server.model}", "--openai-api-base", server.v1, "--openai-api-key", "none"]
        arguments += ["--no-git", "--yes-always", "--no-show-model-warnings", "--no-check-update", "--edit-format"]
        arguments += ["whole", "--map-tokens", "0", "--no-stream", "--message", "Fix the spelling.", "a.py"]
        said = _command("aider", *arguments, folder=folder, HOME=folder, AIDER_ANALYTICS="false")
        assert ("Tokens:" in said or "token limit" in said) and "litellm." not in said, said[-2000:]


_SCRIPT = """
import OpenAI from "openai";
const [base, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base + "/v1", apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: "Say hello." }], max_tokens: 16, temperature: 0 };
const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
let said = "";
for await (const piece of await client.chat.completions.create({ ...asked, stream: true }))
  said += piece.choices[0]?.delta?.content ?? "";
if (said !== whole || !whole) throw new Error("streamed text differs");
const first = await client.responses.create({ model, input: "Say hello.", max_output_tokens: 16 });
if (!first.output_text) throw new Error("no text");
const vectors = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
if (vectors.data.length !== 2 || !(vectors.data[0].embedding.length > 2)) throw new Error("no vectors");
"""


def try_node(server: Server, folder: Path) -> str:
    """OpenAI's client for JavaScript, as `npm install openai` put it into a folder; its version."""
    (folder / "try.mjs").write_text(_SCRIPT, encoding="utf-8")
    _command("node", "try.mjs", *server, folder=str(folder))
    package = json.loads((folder / "node_modules/openai/package.json").read_text(encoding="utf-8"))
    return str(package["version"])


def main() -> int:
    """Print a row for each thing that was tried; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"by default all of: {', '.join(CHECKS)}")
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="a folder in which `npm install openai` was run")
    given = parser.parse_args()
    server, failed = Server(given.url.rstrip("/"), given.model), 0
    for client in given.clients or CHECKS:
        try:
            version = importlib.metadata.version(client)
        except importlib.metadata.PackageNotFoundError:
            continue
        for what, function in CHECKS[client].items():
            failed += not _passes(f"| {client} | {version} | {what} |", lambda function=function: function(server))  # type: ignore[misc]
    if given.node is not None:
        failed += not _passes(
            "| openai (JavaScript) | chat, streamed, responses, embeddings |", lambda: try_node(server, given.node)
        )
    return 1 if failed else 0


def _passes(row: str, run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:
        traceback.print_exc()
        print(f"{row} FAILED", flush=True)
        return False
    print(row, flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
