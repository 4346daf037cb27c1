"""What ReLU-fication trains, and on what: the model in PyTorch, and the text."""

from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import block_table, make_batch, random_tokens, relative_error, zoo
from numpy.typing import NDArray
from relufy_setup import decoder, source
from small_checkpoints import CONFIG

from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import SvdEngineError
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.text.chat_template import ChatTemplate

torch = pytest.importorskip("torch")

from svdengine.tools.relufy.decoder import (  # noqa: E402
    Decoder,
    KvCache,
    make_student,
    read_decoder,
)
from svdengine.tools.relufy.distill import perplexity  # noqa: E402
from svdengine.tools.relufy.precision import mixed_precision  # noqa: E402
from svdengine.tools.relufy.text import _TOGETHER, Prompt, Sampling, Windows, Writer, _sample, read_windows  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: Decoder, tokens: list[int]) -> Any:
    return model.head(model(torch.tensor([tokens])))[0].detach().numpy()


@pytest.mark.parametrize(
    "name", ["llama", "llama_silu_biases", "llama_llama3", "llama_yarn", "mistral", "qwen2", "qwen3"]
)
def test_the_model_is_that_of_the_executors(name: str) -> None:
    config = zoo()[name]
    model, weights = decoder(config)
    tokens = random_tokens(config, 29)
    expected = ReferenceExecutor(config, weights, 8).forward(make_batch([(tokens, 0)], [block_table(len(tokens))]))
    assert relative_error(logits(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_token_by_token_is_the_same_as_all_at_once(name: str) -> None:
    model, _ = decoder(zoo()[name])
    tokens = torch.tensor([random_tokens(model.config, 17), random_tokens(model.config, 17, 1)])
    caches = [KvCache(2, 17, model.config, model.embedding.weight) for _ in model.layers]
    steps = torch.cat([model(tokens[:, i : i + 1], caches) for i in range(17)], 1)
    assert torch.allclose(steps, model(tokens), atol=1e-5)


def test_the_student_owns_only_what_it_trains() -> None:
    teacher, _ = decoder(zoo()["qwen3"])  # tied embeddings
    names = {name for name, _ in teacher.named_parameters()}
    for train, trained in (("ffn", ("ffn.", "ffn_norm.")), ("layers", ("layers.",)), ("all", ("",))):
        student = make_student(teacher, train)
        theirs = dict(teacher.named_parameters())
        own = {name for name, p in student.named_parameters() if p is not theirs[name]}
        assert own == {n for n in names if any(part in n for part in trained)}
        assert own == {name for name, p in student.named_parameters() if p.requires_grad}
        assert student.head.weight is student.embedding.weight


def test_text_of_files_and_chats(tmp_path: Path) -> None:
    writer = Writer(open_checkpoint(source(tmp_path)))
    text, chats = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("".join(chr(97 + i // 40 % 10) for i in range(4000)))
    chats.write_text('[{"role": "user", "content": "%s"}]\n' % ("0123456789" * 40))
    found = read_windows(writer, [text, chats], 20)
    assert len(found.held_out) == 200 // 20 + 1
    for part in (found.train, found.held_out):
        assert part.tokens.shape[1] == 20 and part.given.shape == part.tokens.shape and part.foretold.all()
    seen = {writer.tokenizer.decode(list(map(int, w))) for w in found.held_out.tokens}
    assert "0123456789" * 2 in seen
    text.write_text("short")
    with pytest.raises(SvdEngineError, match="too short"):
        read_windows(writer, [text], 20)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_are_as_likely_as_the_model_says(tmp_path: Path, temperature: float) -> None:
    model = read_decoder(open_checkpoint(source(tmp_path)))
    windows = _sample(model, repeat(Prompt([1], temperature)), 4000, 2, torch.Generator().manual_seed(0), ())[0].numpy()
    with mixed_precision(torch.device("cpu")), torch.no_grad():
        logits = model.head(model(torch.tensor([[1]])))[0, 0].float()
    expected = torch.softmax(logits / temperature, -1).numpy()
    found = np.bincount(windows[:, 1], minlength=len(expected)) / len(windows)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(windows))
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 0.04  # Kolmogorov's bound at 1e-5


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 9))
def test_what_a_window_has_to_foretell(seed: int, rows: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    windows = Windows(rng.integers(0, 9, (rows, size)).astype(np.int32), rng.random((rows, size)) < 0.5)
    found = windows.foretold
    assert np.array_equal(found[:, :-1], ~windows.given[:, 1:])  # what `perplexity` counts
    assert np.array_equal(found[:, -1], ~windows.given[:, -1])  # the next token is not known: as the last one
    assert np.array_equal(windows[np.arange(rows)[::-1]].foretold, found[::-1])


def test_sampled_text_begins_with_prompts_and_is_repeatable(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(tmp_path))
    model, writer = read_decoder(checkpoint), Writer(checkpoint)

    def written(seed: int) -> NDArray[np.int32]:
        sampling = Sampling(model, writer, 24, seed)
        sampling.write(1000)
        return sampling.windows.tokens

    windows = written(5)
    assert windows.shape == (42, 24) and windows.min() >= 0 and windows.max() < CONFIG.vocab_size
    prompts = [prompt.tokens[:12] for prompt in writer.prompts(5)]
    assert all(list(row[: len(p)]) == p for row, p in zip(windows, prompts, strict=False))
    assert np.array_equal(windows, written(5))
    assert not np.array_equal(windows, written(6))


def test_sampling_goes_on_from_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_TOGETHER, "cpu", 8)
    checkpoint = open_checkpoint(source(tmp_path))
    model, writer = read_decoder(checkpoint), Writer(checkpoint)
    whole, first, second = (Sampling(model, writer, 24, 5) for _ in range(3))
    whole.write(1000)
    first.write(2 * 8 * 24)
    second.load(first.state())
    second.write(1000)
    tokens, given = whole.windows.tokens, whole.windows.given
    assert len(first.windows) == 16 and np.array_equal(second.windows.tokens, tokens)
    assert np.array_equal(second.windows.given, given) and given[:, 0].all() and not given.all(1).any()
    assert len(np.unique(tokens, axis=0)) == 42


def test_perplexity_is_of_what_was_not_given(tmp_path: Path) -> None:
    model = read_decoder(open_checkpoint(source(tmp_path)))
    windows = np.array([random_tokens(CONFIG, 12, seed) for seed in range(9)], np.int32)
    given = np.random.default_rng(0).random(windows.shape) < 0.4
    tokens = torch.from_numpy(windows).long()
    with mixed_precision(torch.device("cpu")), torch.no_grad():
        chances = torch.log_softmax(model.head(model(tokens)).float(), -1)
    losses = [
        -float(chances[row, at - 1, tokens[row, at]]) for row in range(9) for at in range(1, 12) if not given[row, at]
    ]
    assert perplexity(model, Windows(windows, given)) == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


def test_held_out_text_answers_other_questions(tmp_path: Path) -> None:
    writer = Writer(open_checkpoint(source(tmp_path)))
    train, held = ({tuple(p.tokens) for p in writer.prompts(1, held_out=h) if p.temperature < 1} for h in (False, True))
    assert len(train) > 10 * len(held) > 0 and not train & held


def test_the_model_answers_what_it_asked_itself(tmp_path: Path) -> None:
    """After the end of the question comes what the template writes there, and only after that of the answer another."""
    writer = Writer(open_checkpoint(source(tmp_path)))
    writer.template = ChatTemplate(
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}",
        writer.tokenizer,
    )
    asked = next(p for p in writer.prompts(1) if p.then is not None)
    assert asked.then is not None and asked.then.then is None and asked.then.temperature < asked.temperature
    [end] = writer.tokenizer.encode("</s>", special=True, bos=False)
    chat = [{"role": "user", "content": "a"}]
    question = writer.tokenizer.encode("a", special=True, bos=False)
    assert [*asked.tokens, *question, end, *asked.then.tokens] == writer.template.encode(chat)


def test_a_conversation_goes_on_with_the_next_question(tmp_path: Path) -> None:
    """As the template writes it: without a second system prompt, and with nothing that the model itself wrote."""
    checkpoint = open_checkpoint(source(tmp_path))
    writer = Writer(checkpoint)
    writer.template = ChatTemplate(
        "{{ 'system: ' }}{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}",
        writer.tokenizer,
    )
    [end] = writer.tokenizer.encode("</s>", special=True, bos=False)
    asked = next(p for p in writer.prompts(1) if p.then is not None)
    answered = next(p for p in writer.prompts(1) if p.then is None)
    assert asked.turn is not None and answered.turn is not None and asked.then is not None
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    so_far = writer.template.encode(before, add_generation_prompt=False)
    assert so_far[-1] == end
    whole = writer.template.encode([*before, {"role": "user", "content": "c"}])
    question = writer.tokenizer.encode("c", special=True, bos=False)
    assert [*so_far, *asked.turn, *question, end, *asked.then.tokens] == whole
    assert answered.tokens[-len(answered.turn) :] == answered.turn and len(answered.turn) < len(answered.tokens)
    model, prompts = read_decoder(checkpoint), [Prompt([7, 5, 5], turn=[8, 6])] * 400
    ends = set(range(0, 40, 3))
    sampled, given = _sample(model, iter(prompts), 8, 60, torch.Generator().manual_seed(0), ends)
    windows = sampled.tolist()
    first_ends = [next((i for i in range(3, 40) if row[i] in ends), None) for row in windows]
    followed = [row[i + 1 : i + 3] for row, i in zip(windows, first_ends, strict=True) if i is not None]
    assert all(row[:3] == [7, 5, 5] for row in windows)
    assert len(followed) > 3 and all(turn == [8, 6] for turn in followed)
    for row, i in zip(given.tolist(), first_ends, strict=True):
        assert row[:3] == [True] * 3 and (i is None or row[3 : i + 3] == [False] * (i - 2) + [True] * 2)


def test_a_text_of_two_parts_is_followed_by_another(tmp_path: Path) -> None:
    model = read_decoder(open_checkpoint(source(tmp_path)))
    prompts = [Prompt([7, i], then=Prompt([8, i])) for i in range(100)]
    windows = _sample(model, iter(prompts), 8, 60, torch.Generator().manual_seed(0), set(range(0, 40, 3)))[0].numpy()
    followed = 0
    for row in windows.tolist():
        parts, at = [row[0]], 2
        while at < 60 - 20:
            drawn, at = row[at], at + 1
            if drawn < 40 and drawn % 3 == 0:
                parts, at = [*parts, row[at]], at + 2
        assert parts == [7, 8] * (len(parts) // 2) + [7] * (len(parts) % 2)
        followed += len(parts) - 1
    assert followed > 5


def test_where_a_text_ends_the_next_prompt_begins(tmp_path: Path) -> None:
    model = read_decoder(open_checkpoint(source(tmp_path)))
    prompts = [[7, 3, i] for i in range(100)]  # of which 3 would be an end, if it had been drawn
    windows = _sample(model, map(Prompt, prompts), 8, 60, torch.Generator().manual_seed(0), set(range(0, 40, 3)))[
        0
    ].numpy()
    begun = [list(windows[:, :3][row]) for row in range(8)]
    assert begun == prompts[:8]
    later = 0
    for row in windows.tolist():
        drawn, at = 0, 3
        while at < 60 - 20:
            drawn, at = row[at], at + 1
            if drawn < 40 and drawn % 3 == 0:
                assert row[at : at + 2] == [7, 3]
                later, at = later + 1, at + 3
    assert later > 5
