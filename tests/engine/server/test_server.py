"""Answers of the HTTP server on loopback, asked by OpenAI's own client and by hand."""

import concurrent.futures
from typing import Any

import numpy as np
import openai
import pytest
from http_ask import CHAT, GREEDY, HELLO, PLAIN, ask, client_of
from live_server import LiveServer
from openai import OpenAI

from svdengine import LLM


def test_chat(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True)
    done = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert done.object == "chat.completion" and done.model == "tiny" and done.id.startswith("chatcmpl-")
    assert done.choices[0].message.content == expected.text and done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 12
    assert done.usage.prompt_tokens == expected.stats.prompt_tokens
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12


def test_a_conversation_reuses_its_prefix(client: OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    more = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model="tiny", messages=more, **GREEDY)  # type: ignore[arg-type]
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_chat_stream(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True)
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == expected.text
    assert [p.choices[0].finish_reason for p in pieces[:-1]][-1] == "length"
    assert pieces[-1].choices == [] and pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 12
    assert len({p.id for p in pieces}) == 1
    measured = (pieces[-1].usage.model_extra or {})["svdengine"]
    assert measured["tokens_per_second"] > 0 and measured["predicted_density"] is None
    no_usage = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY)
    assert all(p.choices and p.usage is None for p in no_usage)


def test_the_stream_ends_with_done(server: LiveServer) -> None:
    status, text, headers = ask(
        server, "/v1/chat/completions", {"messages": HELLO, "stream": True, "max_tokens": 3, "ignore_eos": True}
    )
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    assert text.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in text.split("\n\n")[:-1])


def test_contents_in_parts_and_all_roles(client: OpenAI, llm: LLM) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": "more", "name": "ann"},
    ]
    plain: list[Any] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello\nworld"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    expected = llm.chat(plain, temperature=0, max_tokens=12, ignore_eos=True)
    assert client.chat.completions.create(model="tiny", messages=parts, **GREEDY).choices[0].message.content == (
        expected.text
    )


def test_choices_differ_and_repeat(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "n": 3, "seed": -7, **GREEDY, "temperature": 30}
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [c.message.content for c in second.choices] == texts
    streamed = ["", "", ""]
    for piece in client.chat.completions.create(stream=True, **fields):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert streamed == texts


def test_chat_logprobs(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}
    done = client.chat.completions.create(**fields)
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.content is not None
    content = done.choices[0].logprobs.content
    assert expected.logprobs is not None
    assert [c.logprob for c in content] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-5)
    assert b"".join(bytes(c.bytes or ()) for c in content).decode(errors="replace") == expected.text
    assert all(c.top_logprobs[0].token == c.token and len(c.top_logprobs) == 2 for c in content)
    streamed = []
    for piece in client.chat.completions.create(stream=True, **fields):
        if piece.choices[0].logprobs is not None:
            streamed += piece.choices[0].logprobs.content or []
    assert [c.token for c in streamed] == [c.token for c in content]


def test_stop_strings_and_their_logprobs(client: OpenAI, llm: LLM) -> None:
    whole = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True).text
    stop = whole[4:7]
    done = client.chat.completions.create(model="tiny", messages=HELLO, stop=[stop], logprobs=True, **GREEDY)
    choice = done.choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == whole[: whole.index(stop)]
    assert choice.logprobs is not None
    shown = b"".join(bytes(c.bytes or ()) for c in choice.logprobs.content or ())
    assert shown.decode(errors="replace").startswith(choice.message.content or "")
    assert len(choice.logprobs.content or ()) <= done.usage.completion_tokens  # type: ignore[union-attr]


def test_completions(client: OpenAI, llm: LLM) -> None:
    expected = [d.text for d in llm.generate(["hello", "once"], temperature=0, max_tokens=12, ignore_eos=True)]
    done = client.completions.create(model="tiny", prompt=["hello", "once"], **GREEDY)
    assert [c.text for c in done.choices] == expected and done.object == "text_completion"
    ids = llm.tokenizer.encode("hello")
    assert client.completions.create(model="tiny", prompt=ids, **GREEDY).choices[0].text == expected[0]
    assert [c.text for c in client.completions.create(model="tiny", prompt=[ids, ids], **GREEDY).choices] == (
        [expected[0]] * 2
    )
    echoed = client.completions.create(model="tiny", prompt="hello", echo=True, **GREEDY)
    assert echoed.choices[0].text == "hello" + expected[0]
    for echo in (False, True):
        streamed = ["", ""]
        for piece in client.completions.create(
            model="tiny", prompt=["hello", "once"], stream=True, echo=echo, **GREEDY
        ):
            streamed[piece.choices[0].index] += piece.choices[0].text
        assert streamed == [p * echo + e for p, e in zip(["hello", "once"], expected, strict=True)]
    short = client.completions.create(model="tiny", prompt="hello", extra_body={"ignore_eos": True})
    assert short.usage is not None and short.usage.completion_tokens == 16


def test_completion_logprobs(client: OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="hello", logprobs=2, **GREEDY).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.tokens) == 12 == len(found.top_logprobs) == len(found.token_logprobs)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)


@pytest.mark.parametrize("prompt", ["hello world, wörld \U0001f600 of it", "a"])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_logprobs_of_a_prompt(server: LiveServer, llm: LLM, prompt: str, length: int) -> None:
    ids = llm.tokenizer.encode(prompt)
    rows = llm.logits(ids).astype(np.float64)
    logs = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
    body = {"prompt": [ids, ids], "echo": True, "logprobs": 2, "max_tokens": length, "temperature": 0}
    status, answer, _ = ask(server, PLAIN, {**body, "ignore_eos": length > 1})
    assert status == 200
    for choice in answer["choices"]:
        found = choice["logprobs"]
        assert len({len(values) for values in found.values()}) == 1
        assert len(found["tokens"]) == len(ids) + length and choice["text"].startswith(prompt)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = [logs[i, token] for i, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        for i, top in enumerate(found["top_logprobs"][1 : len(ids)]):
            assert max(top.values()) == pytest.approx(logs[i].max(), abs=1e-4) and len(top) in (1, 2, 3)
            assert top[found["tokens"][i + 1]] == found["token_logprobs"][i + 1]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert answer["usage"]["completion_tokens"] == 2 * length


def test_logprobs_count_the_token_that_ends_the_text(server: LiveServer, llm: LLM) -> None:
    """Programs that score texts drop one generated token, whatever it is."""
    end = str(llm.tokenizer.eos_id)
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {end: 100}}
    choice = ask(server, PLAIN, body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == "hello"
    assert len(choice["logprobs"]["token_logprobs"]) == len(llm.tokenizer.encode("hello")) + 1


def test_an_echo_alone(server: LiveServer) -> None:
    _, body, _ = ask(server, PLAIN, {"prompt": "hello", "echo": True, "max_tokens": 0})
    assert body["choices"][0]["text"] == "hello" and body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 0


def test_penalties_and_bias(client: OpenAI, llm: LLM) -> None:
    token = llm.tokenizer.encode("x")[0]
    done = client.chat.completions.create(model="tiny", messages=HELLO, logit_bias={str(token): 100}, **GREEDY)
    assert done.choices[0].message.content == "x" * 12
    fields: dict[str, Any] = {"presence_penalty": 2.0, "frequency_penalty": 1.5}
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True, **fields)
    assert client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY, **fields).choices[
        0
    ].message.content == (expected.text)


def test_a_full_context_can_be_shifted(client: OpenAI) -> None:
    fields: dict[str, Any] = {**GREEDY, "max_tokens": 300, "extra_body": {"ignore_eos": True, "context_shift": True}}
    done = client.chat.completions.create(model="tiny", messages=HELLO, **fields)
    assert done.usage is not None and done.usage.completion_tokens == 300
    long = client.completions.create(model="tiny", prompt=[5] * 400, **fields)
    assert long.usage is not None and long.usage.completion_tokens == 300


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    more: dict[str, Any] = {"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    more |= {"max_completion_tokens": 3, "top_p": 0.9, "stop": None, "modalities": ["text"], "safety_identifier": "x"}
    done = client.chat.completions.create(model="tiny", messages=HELLO, **more)
    assert done.usage is not None and done.usage.completion_tokens <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": [], "parallel_tool_calls": False},
        {"stream_options": {"include_usage": True}},
        {"store": True},
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "none"},
        {"logprobs": False, "top_logprobs": 0},
        {"verbosity": "medium"},
        {"add_generation_prompt": True},
        {"functions": [], "function_call": "none"},
        {"min_tokens": 0, "length_penalty": 1, "use_beam_search": False, "skip_special_tokens": True},
        {"add_special_tokens": False},
        {"seed": -(1 << 63)},
        {"seed": (1 << 64) - 1},
        {"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant"}, *HELLO]},
        {"messages": [{"role": "user", "content": "hi", "reasoning_content": None, "x": {"y": [1]}}]},
    ],
)
def test_what_has_a_plain_meaning_is_taken(server: LiveServer, fields: dict[str, Any]) -> None:
    status, body, _ = ask(server, CHAT, {"messages": HELLO, "max_tokens": 2, **fields})
    assert status == 200, body


def test_values_that_say_all_or_the_likeliest(server: LiveServer, llm: LLM) -> None:
    def texts(**fields: Any) -> list[str]:
        base = {"prompt": "hello", "max_tokens": 9, "temperature": 50, "ignore_eos": True, "logprobs": False}
        return [ask(server, PLAIN, {**base, **fields})[1]["choices"][0]["text"] for _ in range(2)]

    greedy = llm.generate("hello", temperature=0, max_tokens=9, ignore_eos=True)[0].text
    assert texts(top_p=0) == [greedy] * 2
    assert texts(seed=3, top_k=-1) == texts(seed=3, top_k=0) != [greedy] * 2
    assert len(set(texts(seed=-1))) == 2
    _, body, _ = ask(server, PLAIN, {"prompt": "hello", "max_tokens": -1, "ignore_eos": True})
    assert body["usage"]["total_tokens"] == llm.context


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "svdengine"
    assert (model.model_extra or {})["max_model_len"] == 256
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_an_answer_goes_on_with_the_last_message(server: LiveServer, llm: LLM) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "well, <|im_end|> "}]
    prompt = llm.chat_template.encode(HELLO) + llm.tokenizer.encode(begun[1]["content"], bos=False)
    expected = llm.generate([prompt], temperature=0, max_tokens=9, ignore_eos=True)[0].text
    body = {"messages": begun, "temperature": 0, "max_tokens": 9, "ignore_eos": True}
    assert (
        ask(server, CHAT, {**body, "continue_final_message": True})[1]["choices"][0]["message"]["content"] == expected
    )
    bare = llm.chat_template.encode(begun, add_generation_prompt=False)
    assert ask(server, CHAT, {**body, "add_generation_prompt": False})[1]["usage"]["prompt_tokens"] == len(bare)


def test_tokenize(server: LiveServer, llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello wörld")
    _, body, _ = ask(server, "/tokenize", {"content": "hello wörld"})
    assert body["tokens"] == ids and body["count"] == len(ids)
    assert ask(server, "/detokenize", {"tokens": ids})[1]["content"] == "hello wörld"
    _, body, _ = ask(server, "/tokenize", {"content": "hello world", "with_pieces": True})
    assert "".join(t["piece"] for t in body["tokens"]) == "hello world"
    _, body, _ = ask(server, "/tokenize", {"messages": HELLO})
    assert body["tokens"] == llm.chat_template.encode(HELLO)


def test_many_at_a_time(server: LiveServer, llm: LLM) -> None:
    prompts = ["hello", "once upon a time", "what is 2 + 2?", "the"] * 4
    expected = {p: llm.generate(p, temperature=0, max_tokens=12, ignore_eos=True)[0].text for p in set(prompts)}

    def complete(prompt: str) -> str:
        return client_of(server).completions.create(model="tiny", prompt=prompt, **GREEDY).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(complete, prompts)) == [expected[p] for p in prompts]
