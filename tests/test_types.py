"""What type checkers make of programs that use the library: right ones pass, wrong ones fail where they are wrong."""

import os
import re
import subprocess
import sys

import pytest

# Each is the body of a function with these parameters, checked by `mypy --strict`.
HEADER = """\
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, assert_type

import numpy as np
from numpy.typing import NDArray

import svdengine


def program(llm: svdengine.LLM, params: svdengine.SamplingParams, name: str) -> None:
"""

RIGHT = {
    "the_readme": """
        with svdengine.load("model.svdp") as llm:
            for piece in llm.stream("Once upon a time", max_tokens=64):
                print(piece, end="")
            done = llm.generate(["One", "Two"], svdengine.SamplingParams(temperature=0.0, max_tokens=64))
            assert_type(done, list[svdengine.Completion])
            assert_type(done[0].text, str)
            assert_type(done[0].token_ids, list[int])
            assert_type(done[0].finish_reason, svdengine.FinishReason)
            assert_type(done[0].stats, svdengine.Stats)
            assert_type(llm.chat([{"role": "user", "content": "Hello"}]).text, str)
            assert_type(llm.logits(llm.tokenizer.encode("Hello")), NDArray[np.float32])
            assert_type(llm.stats(), svdengine.EngineStats)
    """,
    "load": """
        svdengine.load(Path("model.svdp"), "cpu", "sparse", 2, Path("predictor.safetensors"), context=512)
        device: svdengine.Device = "cuda"
        svdengine.load("model.svdp", device=device, ffn="dense", kv_dtype="f32", kv_memory=1 << 30)
    """,
    "ffn": """
        before: svdengine.FfnMode = llm.ffn
        llm.ffn = "sparse"
        llm.ffn = before
    """,
    "what_is_converted": """
        svdengine.SamplingParams(stop="x", stop_token_ids=[1], logit_bias={3: 1}, temperature=0)
        svdengine.SamplingParams(stop=["x", "y"], stop_token_ids={1, 2}, response_format={"type": "json_object"})
        svdengine.SamplingParams(stop=("x",), response_format=svdengine.Grammar("lark", "start: /a+/"))
        svdengine.SamplingParams(seed=None, max_tokens=None, logprobs=None, response_format=None)
        llm.stream("x", stop="x", stop_token_ids=[1])
        llm.generate("x", stop=["x"], stop_token_ids=llm.tokenizer.eos_token_ids, priority=1)
        llm.chat([], response_format={"type": "json_object"}, logit_bias={3: -1})
    """,
    "what_fields_hold": """
        assert_type(params.stop, tuple[str, ...])
        assert_type(params.stop_token_ids, tuple[int, ...])
        assert_type(params.logit_bias, Mapping[int, float])
        assert_type(params.response_format, svdengine.Grammar | None)
        assert_type(params.max_tokens, int | None)
        assert_type(replace(params, temperature=0.5), svdengine.SamplingParams)
        print({params: "a key of a dict"})
    """,
    "prompts": """
        llm.generate("x")
        llm.generate([1, 2, 3])
        llm.generate([[1, 2, 3], range(3)])
        prompts: list[svdengine.Prompt] = ["x", [1, 2, 3]]
        llm.generate(prompts)
        llm.generate(prompts, special=True)
        llm.stream("<|im_start|>user", special=True)
        assert_type(llm.prepare("<|im_start|>user", special=True), svdengine.Generation)
        llm.generate(["x", "y"], [params, params], temperature=0.5)
        llm.stream(np.array([1, 2, 3]))
        llm.logits(np.arange(3, dtype=np.int32))
    """,
    "messages": """
        conversation: list[svdengine.Message] = [{"role": "user", "content": "Hello"}]
        conversation.append({"role": "assistant", "content": llm.chat(conversation).text})
        told = [{"role": "user", "content": "Hello"}]
        llm.stream_chat(told, params, context_shift=True, template={"tools": []}, max_tokens=3)
        assert_type(llm.chat_template.render(told), svdengine.RenderedPrompt)
    """,
    "a_program_that_steps": """
        request = llm.prepare("x", params, max_tokens=3)
        assert_type(request, svdengine.Generation)
        assert_type(llm.prepare_chat([], max_tokens=3), svdengine.Generation)
        llm.add(request)
        while not request.done:
            llm.step()
        assert_type(request.completion().finish_reason, svdengine.FinishReason)
    """,
    "streams": """
        with llm.stream("x", max_tokens=3) as stream:
            pieces: Iterator[str] = stream
            print("".join(pieces))
        assert_type(stream, svdengine.TextStream)
        for step in stream.completion.logprobs or []:
            assert_type(step, svdengine.TokenLogprobs)
    """,
    "coroutines": """
        async def ask() -> str:
            stream = llm.astream("x", params, special=True, max_tokens=3)
            assert_type(stream, svdengine.AsyncTextStream)
            async for piece in stream:
                assert_type(piece, str)
            async with llm.astream_chat([{"role": "user", "content": None}], context_shift=True) as answer:
                print([piece async for piece in answer], answer.completion.finish_reason)
            assert_type(await llm.agenerate(["x", "y"], temperature=0.5), list[svdengine.Completion])
            return (await llm.achat([], template={"tools": []}, stop="x")).text

        print(ask)
    """,
    "fields_handed_on": """
        def ask(question: str, **fields: Unpack[svdengine.SamplingFields]) -> str:
            return llm.generate(question, **fields)[0].text

        options: dict[str, Any] = {"max_tokens": 3}
        ask("x", temperature=0.5)
        ask("x", **options)
    """,
    "errors": """
        try:
            llm.generate("x")
        except (svdengine.ContextOverflowError, svdengine.QueueFullError, svdengine.ShutdownError):
            pass
        except svdengine.SvdEngineError as error:
            print(error)
    """,
    "modules": """
        from svdengine.kernels.formats import WeightFormat
        from svdengine.models.config import ModelConfig

        print(WeightFormat)
        assert_type(llm.config, ModelConfig)
        assert_type(llm.config, svdengine.ModelConfig)
        assert_type(svdengine.__version__, str)
    """,
}

# `# -> code` stands where mypy must report that error; it must report no other.
WRONG = {
    "misspelt_name": 'svdengine.laod("model.svdp")  # -> attr-defined',
    "name_of_the_package_itself": "svdengine.import_module  # -> attr-defined",
    "misspelt_import": "from svdengine import Completions  # -> attr-defined",
    "device": 'svdengine.load("model.svdp", device="gpu")  # -> arg-type',
    "ffn_of_load": 'svdengine.load("model.svdp", ffn="sparce")  # -> arg-type',
    "kv_dtype": 'svdengine.load("model.svdp", kv_dtype="q3")  # -> arg-type',
    "any_text_for_a_device": 'svdengine.load("model.svdp", device=name)  # -> arg-type',
    "path": "svdengine.load(3)  # -> arg-type",
    "argument_of_load": 'svdengine.load("model.svdp", n_ctx=512)  # -> call-arg',
    "positional_context": 'svdengine.load("model.svdp", "cpu", "auto", 2, None, 512)  # -> call-arg',
    "ffn": 'llm.ffn = "sparce"  # -> assignment',
    "config_is_read_only": "llm.config = llm.config  # -> misc",
    "misspelt_field_of_generate": 'llm.generate("x", max_token=3)  # -> call-arg',
    "misspelt_field_of_stream": 'llm.stream("x", temprature=0.5)  # -> call-arg',
    "misspelt_field_of_chat": "llm.chat([], max_new_tokens=3)  # -> call-arg",
    "misspelt_field_of_stream_chat": "llm.stream_chat([], stops=[])  # -> call-arg",
    "misspelt_field_of_prepare": 'llm.prepare("x", topk=3)  # -> call-arg',
    "misspelt_field_of_prepare_chat": "llm.prepare_chat([], top_n=3)  # -> call-arg",
    "misspelt_field_of_params": "svdengine.SamplingParams(temp=0.5)  # -> call-arg",
    "type_of_a_field": 'llm.generate("x", temperature="hot")  # -> arg-type',
    "type_of_a_field_of_params": 'svdengine.SamplingParams(max_tokens="3")  # -> arg-type',
    "stop": 'llm.generate("x", stop=3)  # -> arg-type',
    "stop_token_ids": 'llm.generate("x", stop_token_ids=["</s>"])  # -> list-item',
    "logit_bias": 'svdengine.SamplingParams(logit_bias={"a": 1.0})  # -> dict-item',
    "response_format": 'svdengine.SamplingParams(response_format="json")  # -> arg-type',
    "frozen_params": "params.temperature = 0.5  # -> misc",
    "frozen_completion": 'llm.generate("x")[0].text = "y"  # -> misc',
    "params": 'llm.generate("x", 0.5)  # -> arg-type',
    "prompts": "llm.generate(3)  # -> arg-type",
    "prompts_for_stream": 'llm.stream(["x", "y"])  # -> list-item, list-item',
    "special": 'llm.stream("x", special="yes")  # -> arg-type',
    "special_of_chat": "llm.chat([], special=True)  # -> call-arg",
    "coroutine_for_a_loop": 'list(llm.astream("x"))  # -> call-overload',
    "not_awaited": "llm.achat([]).text  # -> attr-defined",
    "misspelt_field_of_astream": 'llm.astream("x", temprature=0.5)  # -> call-arg',
    "misspelt_field_of_achat": "llm.achat([], max_token=3)  # -> call-arg, unused-coroutine",
    "messages": 'llm.chat("Hello")  # -> arg-type',
    "one_completion_of_many": 'llm.generate("x").text  # -> attr-defined',
    "finish_reason": 'llm.generate("x")[0].finish_reason == "eos"  # -> comparison-overlap',
    "reason_of_abort": 'llm.abort(llm.prepare("x"), "timeout")  # -> arg-type',
    "no_logprobs": 'llm.generate("x")[0].logprobs[0]  # -> index',
    "token_ids": 'llm.logits("x")  # -> arg-type',
    "misspelt_method": 'llm.complete("x")  # -> attr-defined',
    "misspelt_statistic": "llm.stats().step  # -> attr-defined",
    "kind_of_grammar": 'svdengine.Grammar("gbnf", "root ::= [a-z]")  # -> arg-type',
}

Errors = list[tuple[int, str]]  # line and code of each


def program(case: str) -> str:
    return HEADER + "\n".join("    " + line.removeprefix("        ") for line in case.strip("\n ").splitlines()) + "\n"


def expected(text: str) -> Errors:
    found = ((number, line.partition("# -> ")[2]) for number, line in enumerate(text.splitlines(), 1))
    return [(number, code) for number, codes in found if codes for code in codes.split(", ")]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    """What mypy says of each program, by the name of its file, when svdengine is a package that was installed."""
    folder = tmp_path_factory.mktemp("programs")
    for kind, cases in (("right", RIGHT), ("wrong", WRONG)):
        for name, case in cases.items():
            (folder / f"{kind}_{name}.py").write_text(program(case), encoding="utf-8")
    options = ["--strict", "--config-file=", "--cache-dir=cache", f"--python-executable={sys.executable}"]
    options += ["--no-error-summary", "--no-pretty", "--hide-error-context"]
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    files = sorted(path.name for path in folder.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files], cwd=folder, env=environment, capture_output=True, text=True
    )
    errors: dict[str, Errors] = {name.removesuffix(".py"): [] for name in files}
    for line in done.stdout.splitlines():
        if found := re.fullmatch(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]", line):
            errors[found[1]].append((int(found[2]), found[3]))
        else:
            assert ": note: " in line, line
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    return errors


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str, reported: dict[str, Errors]) -> None:
    assert reported[f"right_{name}"] == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_fail_where_they_are_wrong(name: str, reported: dict[str, Errors]) -> None:
    wanted = expected(program(WRONG[name]))
    assert wanted and reported[f"wrong_{name}"] == wanted
