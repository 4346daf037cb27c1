"""ReLU-fication: a small random SwiGLU model becomes a ReGLU one, through interruptions, and is written as it was."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import block_table, make_batch, random_tokens, random_weights, relative_error, zoo
from small_checkpoints import CONFIG, checkpoint_weights, gguf_tensors, hf_tensors, write_gguf, write_hf

from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import SvdEngineError
from svdengine.kernels.formats import dequantize, quantize
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models.config import ModelConfig

torch = pytest.importorskip("torch")

from svdengine.tools.relufy.__main__ import main, parse, seconds  # noqa: E402
from svdengine.tools.relufy.decoder import (  # noqa: E402
    Decoder,
    Ffn,
    KvCache,
    counted_zeros,
    make_student,
    observed,
    parameter,
    read_decoder,
    read_student,
)
from svdengine.tools.relufy.distill import Distillation, divergence_gradient, drawn_gradient  # noqa: E402
from svdengine.tools.relufy.rounding import Rounding, round_q4, round_q4_with_feedback  # noqa: E402
from svdengine.tools.relufy.run import Interrupted, Run  # noqa: E402
from svdengine.tools.relufy.saved_run import SavedRun  # noqa: E402
from svdengine.tools.relufy.schedule import Steering, learning_rate  # noqa: E402
from svdengine.tools.relufy.settings import Settings  # noqa: E402
from svdengine.tools.relufy.text import Writer, _sample, read_windows, sample_windows  # noqa: E402
from svdengine.tools.relufy.thresholds import Thresholds, balance, fold_thresholds  # noqa: E402

SILU = replace(CONFIG, activation="silu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Silent:
    """A status line that can do something at its nth update."""

    def __init__(self, at: int | None = None, act: Any = None) -> None:
        self.at, self.act, self.updates, self.said = at, act, 0, []

    def show(self, text: str) -> None:
        self.updates += 1
        if self.updates == self.at:
            self.act()

    def say(self, text: str) -> None:
        self.said.append(text)


def source(folder: Path, ffn_scale: float = 1.0) -> Path:
    weights = checkpoint_weights(SILU)
    weights["down"] *= ffn_scale
    return write_hf(folder / "source", hf_tensors(weights, SILU), hidden_act="silu")


def settings(folder: Path, name: str = "out", **changes: Any) -> Settings:
    """A run of a few seconds."""
    small = Settings(
        folder / "source", folder / name, sampled_tokens=4096, sparsity=0.6, window=32, layer_tokens=2048,
        layer_epochs=6, layer_rate=3e-3, steps=60, rate=2e-3,
    )  # fmt: skip
    return replace(small, **changes)


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def decoder(config: ModelConfig) -> tuple[Decoder, dict[str, Any]]:
    weights = random_weights(config)
    model = Decoder(config)
    with torch.no_grad():
        for name, w in weights.items():
            if len(w) == config.layer_count and w.ndim > 1 and name not in ("embedding", "lm_head"):
                for layer, part in enumerate(w):
                    parameter(model, name, layer).copy_(torch.from_numpy(part))
            else:
                parameter(model, name, None).copy_(torch.from_numpy(w))
    return model.requires_grad_(False), weights


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


def test_the_gradient_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(4100, 8, generator=generator) for _ in range(2))  # more rows than are held at once
    head = torch.nn.Linear(8, 19, bias=False)
    leaf = found.clone().requires_grad_()
    ours, theirs = torch.log_softmax(head(leaf), -1), torch.log_softmax(head(wanted), -1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    expected.backward()
    divergence, gradient = divergence_gradient(found, head.requires_grad_(False), wanted, head)
    assert divergence == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(gradient, leaf.grad, rtol=1e-3, atol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_steering_is_bounded_and_begins_late(zeros: list[float], goal: float) -> None:
    steering, total = Steering("relu"), len(zeros)
    for step, measured in enumerate(zeros):
        weight = steering.weight(step, total, goal)
        assert 0 <= weight <= 6 and (weight == 0 or step >= 0.15 * total)
        steering = steering.after(measured, step, total, goal)
    assert 0 <= learning_rate(1.0, total - 1, total) <= 1


def test_steering_reaches_its_goal() -> None:
    """Against a plant in which sparsity answers the weight with a delay."""
    steering, zeros, total = Steering("relu"), 0.6, 400
    for step in range(total):
        weight = steering.weight(step, total, 0.9)
        zeros += 0.05 * (0.6 + 0.2 * weight - zeros)
        steering = steering.after(min(zeros, 1.0), step, total, 0.9)
    assert zeros == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("activation", ["fatrelu", "relu"])
def test_the_student_ends_close_to_its_teacher_and_sparse(tmp_path: Path, activation: str) -> None:
    folder = source(tmp_path, ffn_scale=4.0)  # or the residual stream would hardly notice
    status = Silent()
    wanted = settings(tmp_path, steps=200, sampled_tokens=16384, sparsity=0.6, activation=activation)
    report = Run(wanted, status).run()  # type: ignore[arg-type]
    teacher = read_decoder(open_checkpoint(folder))
    student = read_decoder_of(tmp_path / "out")
    swapped = make_student(teacher, "ffn")
    tokens = [random_tokens(CONFIG, 100, seed) for seed in range(8)]

    def distance(model: Decoder) -> float:
        ours, theirs = (torch.log_softmax(m.head(m(torch.tensor(tokens))), -1) for m in (model, teacher))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()

    assert distance(student) < 0.7 * distance(swapped)  # which has fewer zeros, 50 %
    assert report.stages[-1].zeros == pytest.approx(0.6, abs=0.05)
    assert [stage.name[:7] for stage in report.stages] == ["teacher", "ReLU in", "stage 1", "stage 2"]
    assert "stage 2, end to end" in status.said[-1] and "stage 2" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out.partial").exists()


def read_decoder_of(folder: Path) -> Decoder:
    """The student that a run of `source` wrote."""
    return read_student(open_checkpoint(folder), read_decoder(open_checkpoint(folder.with_name("source"))), "ffn")


@pytest.mark.parametrize("activation", ["fatrelu", "relu"])
def test_transformers_and_the_reference_give_the_same_logits(
    tmp_path: Path, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from model_zoo import canonical_weights

    from svdengine.models import hf_source

    source(tmp_path)
    wanted = settings(tmp_path, steps=12, layer_epochs=1, activation=activation)
    Run(wanted, Silent()).run()  # type: ignore[arg-type]
    folder = tmp_path / "out"
    config = open_checkpoint(folder).config
    if activation == "fatrelu":  # as the card says
        card = (folder / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        assert f'"threshold": {config.activation_threshold!r}' in code
        monkeypatch.setitem(transformers.activations.ACT2FN, "fatrelu", None)  # so that it is taken out again
        exec(code)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert replace(config, activation="relu", activation_threshold=0.0) == CONFIG
    tensors = {name: t.float().numpy() for name, t in weights_of(folder).items()}
    weights = canonical_weights(config, tensors, hf_source)
    tokens = random_tokens(config, 41)
    ours = ReferenceExecutor(config, weights, 8).forward(make_batch([(tokens, 0)], [block_table(len(tokens))]))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert relative_error(ours, expected) < 1e-4


def interrupted(wanted: Settings, at: int, act: Any) -> bool:
    """Run until the nth update; whether it came to that."""
    try:
        Run(wanted, Silent(at, act), save_every=0).run()  # type: ignore[arg-type]
    except (Interrupted, ZeroDivisionError):
        return True
    return False


def stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("activation", ["fatrelu", "relu"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, activation: str) -> None:
    """Stopped and broken off while sampling, in the middle of a layer, and in stage 2, again and again."""
    source(tmp_path)
    short: dict[str, Any] = {"steps": 12, "layer_epochs": 2, "layer_tokens": 1024, "activation": activation}
    whole = Silent()
    Run(settings(tmp_path, "whole", **short), whole).run()  # type: ignore[arg-type]
    for name, act, stride in (("stopped", stop, 7), ("broken", crash, 11)):
        wanted = settings(tmp_path, name, **short)
        at, count = 1, 0
        while interrupted(wanted, at, act):
            at, count = at + stride, count + 1
        assert count >= 2
        assert all(torch.equal(w, weights_of(tmp_path / "whole")[n]) for n, w in weights_of(tmp_path / name).items())


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_dies_while_it_saves_its_text_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    source(tmp_path)
    wanted, save = settings(tmp_path, steps=None, seconds=3.0, layer_epochs=1, layer_tokens=512), SavedRun.save_text

    def dies(self: SavedRun, text: Any) -> None:
        if written:
            save(self, text)
        crash()

    monkeypatch.setattr(SavedRun, "save_text", dies)
    assert interrupted(wanted, -1, None)
    monkeypatch.setattr(SavedRun, "save_text", save)
    assert not interrupted(wanted, -1, None) and (tmp_path / "out").exists()


def test_another_run_does_not_go_on_from_this_one(tmp_path: Path) -> None:
    source(tmp_path)
    assert interrupted(settings(tmp_path), 3, stop)
    with pytest.raises(SvdEngineError, match="other settings or files \\(sparsity\\)"):
        Run(settings(tmp_path, sparsity=0.7), Silent())  # type: ignore[arg-type]
    (tmp_path / "out.partial/state.pt").write_bytes(b"damaged")
    with pytest.raises(SvdEngineError, match="remove the folder to begin anew"):
        Run(settings(tmp_path), Silent())  # type: ignore[arg-type]


def test_two_runs_do_not_work_on_one_folder(tmp_path: Path) -> None:
    source(tmp_path)
    first = Run(settings(tmp_path), Silent())  # type: ignore[arg-type]
    with pytest.raises(SvdEngineError, match="another process is at work"):
        Run(settings(tmp_path), Silent())  # type: ignore[arg-type]
    first.saved.close()
    assert interrupted(settings(tmp_path), 1, stop)


def test_thresholds_follow_the_target_and_spare_the_important() -> None:
    model = make_student(decoder(SILU)[0], "ffn")
    first, second, *_ = model.ffns()
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(50, SILU.ffn_size, generator=generator) for _ in model.layers]
    gradients[0][:, :20] *= 3.0
    gradients[1] *= 0.25
    thresholds = Thresholds(model.ffns())
    thresholds.measure(gradients)
    tokens = torch.tensor([random_tokens(SILU, 64, seed) for seed in range(4)])
    for _ in range(60):
        with observed(model.ffns(), thresholds.observe), torch.no_grad():
            model(tokens)
        thresholds.follow(0.8)
    with counted_zeros(model.ffns()) as zeros, torch.no_grad():
        model(tokens)
    assert float(sum(zeros)) / len(zeros) == pytest.approx(0.8, abs=0.02)
    assert zeros[1] > zeros[0] + 0.1
    assert first.threshold[:20].mean() < 0.5 * first.threshold[20:].mean()
    before = [ffn.threshold for ffn in (first, second)]
    again = Thresholds(model.ffns())
    again.load(thresholds.state())
    assert all(torch.equal(ffn.threshold, t) for ffn, t in zip((first, second), before, strict=True))


def test_timing_steps_changes_nothing(tmp_path: Path) -> None:
    teacher, _ = decoder(SILU)
    student = make_student(teacher, "ffn")
    windows = np.array([random_tokens(SILU, 32, seed) for seed in range(8)], np.int32)
    distillation = Distillation(teacher, student, settings(tmp_path), windows)
    before = {name: p.clone() for name, p in student.named_parameters()}
    few, many = distillation.steps_in_time(1.0), distillation.steps_in_time(100.0)
    assert 1 <= few < many
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert not distillation.optimizer.state and distillation.step == 0


def test_a_drawn_gradient_is_of_one_token_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    found, head = torch.randn(300, 8, generator=generator), torch.nn.Linear(8, 5, bias=False)
    gradient = drawn_gradient(found, head, generator)
    chances = torch.softmax(head(found), -1)
    # Expected minus drawn row of the head.
    drawn = torch.cdist(chances @ head.weight - gradient, head.weight)
    assert drawn.min(1).values.max() < 1e-3
    share = torch.bincount(drawn.argmin(1), minlength=5) / 300
    assert torch.allclose(share, chances.mean(0), atol=0.1)


@given(st.integers(0, 2**31), st.floats(0.01, 100.0))
def test_folded_thresholds_leave_what_an_ffn_computes(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = zoo()["llama_silu_biases"]
    ffn = Ffn(config)
    for p in ffn.parameters():
        torch.nn.init.normal_(p, generator=generator)
    ffn.threshold = scale * (torch.rand(config.ffn_size, generator=generator) + 0.01)
    x = torch.randn(17, config.hidden_size, generator=generator)
    with torch.no_grad():
        expected = ffn.double()(x.double())
        one = fold_thresholds([ffn])
        assert bool((ffn.threshold == one).all()) and one > 0
        assert torch.allclose(ffn(x.double()), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@given(st.integers(0, 2**31), st.floats(0.01, 100.0))
def test_balanced_neurons_leave_what_an_ffn_computes(seed: int, scale: float) -> None:
    model, _ = decoder(zoo()["llama_silu_biases"])
    student = make_student(model, "ffn")
    ffn = next(student.ffns())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, student.config.hidden_size, generator=generator)
    with torch.no_grad():
        ffn.gate.weight[::2] *= scale
        ffn.threshold = torch.rand(ffn.up.out_features, generator=generator)
        before = ffn(x)
        balance([ffn])
        after = ffn(x)
    assert torch.allclose(ffn.gate.weight.norm(dim=1), ffn.up.weight.norm(dim=1), rtol=1e-4)
    near = (before - after).abs() / before.abs().max()
    assert (near > 1e-4).float().mean() < 0.02  # a gate on its threshold may fall to the other side


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200), st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
def test_weights_are_rounded_as_a_file_rounds_them(seed: int, rows: int, columns: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weights = (scale * rng.standard_normal((rows, columns)) + rng.integers(-1, 2)).astype(np.float32)
    expected = dequantize(quantize(weights, "q4"), "q4", columns)
    assert np.array_equal(round_q4(torch.from_numpy(weights)).numpy(), expected)


@pytest.mark.parametrize("columns", [64, 90])
def test_rounding_with_feedback_keeps_products_and_the_grid(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(1000, columns // 4, generator=generator) @ mixed + 0.1 * torch.randn(
        1000, columns, generator=generator
    )
    weights = torch.randn(50, columns, generator=generator)
    rounded = round_q4_with_feedback(weights, x.T @ x / len(x))
    plain = round_q4(weights)

    def error(w: Any) -> float:
        return float((x @ (w - weights).T).square().mean())

    assert error(rounded) < 0.5 * error(plain)
    assert torch.allclose(round_q4(rounded), rounded, atol=1e-5)
    assert torch.allclose(round_q4(rounded.half().float()), rounded, atol=1e-2)  # as a file of float16 gives it back


def test_rounding_is_of_the_student_alone_and_ends() -> None:
    teacher, _ = decoder(zoo()["qwen3"])  # tied embeddings
    student = make_student(teacher, "ffn")
    layer = student.layers[0]
    before = {name: p.clone() for name, p in student.named_parameters()}

    def rounded(p: Any) -> Any:
        return torch.from_numpy(dequantize(quantize(p.detach().numpy(), "q4"), "q4", p.shape[1]))

    for embedding in (False, True):
        with Rounding(student, embedding).rounded():
            assert torch.equal(layer.ffn.gate.weight, rounded(before["layers.0.ffn.gate.weight"]))
            assert torch.equal(layer.ffn.down.weight.T, rounded(before["layers.0.ffn.down.weight"].T))
            assert torch.equal(layer.attention.q.weight, rounded(before["layers.0.attention.q.weight"]))
            assert torch.equal(layer.ffn_norm.weight, before["layers.0.ffn_norm.weight"])
            assert torch.equal(student.head.weight, before["embedding.weight"]) != embedding
            assert student.head.weight is student.embedding.weight
            assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
        assert {name: id(p) for name, p in student.named_parameters() if not p.requires_grad} == {
            name: id(p) for name, p in teacher.named_parameters() if id(p) in {id(q) for q in student.parameters()}
        }
        assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_a_run_goes_on_from_an_earlier_one_with_rounded_weights(tmp_path: Path) -> None:
    source(tmp_path, ffn_scale=4.0)
    first = Run(settings(tmp_path), Silent()).run()  # type: ignore[arg-type]
    again = settings(tmp_path, "more", student=tmp_path / "out", dtype="q4", embedding_dtype="q4", steps=120, rate=1e-3)
    second = Run(again, Silent()).run()  # type: ignore[arg-type]
    names = [stage.name for stage in second.stages]
    assert names == ["teacher, SiLU", "student of an earlier run", "stage 2, end to end, in q4"]
    teacher, start, end = second.stages
    assert start.zeros == pytest.approx(first.stages[-1].zeros, abs=0.01)
    assert end.zeros == pytest.approx(0.6, abs=0.05)
    assert end.perplexity / teacher.perplexity - 1 < 0.8 * (start.perplexity / teacher.perplexity - 1)  # both in q4
    before, after = (weights_of(tmp_path / name)["model.embed_tokens.weight"].float() for name in ("out", "more"))
    assert not torch.equal(before, after) and relative_error(after.numpy(), before.numpy()) < 0.2
    assert torch.allclose(round_q4(after), after, atol=2e-3)


def test_a_student_of_another_source_is_refused(tmp_path: Path) -> None:
    source(tmp_path)
    wanted = settings(tmp_path, steps=4, layer_epochs=1, train="layers")
    Run(wanted, Silent()).run()  # type: ignore[arg-type]
    refused = ((tmp_path / "out", "same source and --train"), (tmp_path / "source", "expected one of .* with relu"))
    for student, said in refused:
        with pytest.raises(SvdEngineError, match=said):
            Run(settings(tmp_path, "more", student=student), Silent())  # type: ignore[arg-type]


def test_from_gguf_with_thresholds(tmp_path: Path) -> None:
    tensors = gguf_tensors(checkpoint_weights(SILU), SILU)
    path = write_gguf(tmp_path / "source.gguf", tensors, **{"llama.hidden_act": None})
    wanted = settings(tmp_path, steps=12, layer_epochs=1)
    Run(replace(wanted, source=path), Silent()).run()  # type: ignore[arg-type]
    before, after = open_checkpoint(path), open_checkpoint(tmp_path / "out")
    threshold = after.config.activation_threshold
    assert threshold > 0
    assert after.config == replace(before.config, activation="fatrelu", activation_threshold=threshold)
    assert after.tokenizer.info == before.tokenizer.info
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    attention = "model.layers.1.self_attn.q_proj.weight"  # frozen, and in Hugging Face's layout
    q = torch.from_numpy(checkpoint_weights(SILU)["q"][1]).half()
    assert torch.equal(weights_of(tmp_path / "out")[attention], q)


def test_text_of_files_and_chats(tmp_path: Path) -> None:
    writer = Writer(open_checkpoint(source(tmp_path)))
    text, chats = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("".join(chr(97 + i // 40 % 10) for i in range(4000)))
    chats.write_text('[{"role": "user", "content": "%s"}]\n' % ("0123456789" * 40))
    found = read_windows(writer, [text, chats], 20)
    assert found.train.shape[1] == found.held_out.shape[1] == 20 and len(found.held_out) == 200 // 20 + 1
    seen = {writer.tokenizer.decode(list(map(int, w))) for w in found.held_out}
    assert "0123456789" * 2 in seen
    text.write_text("short")
    with pytest.raises(SvdEngineError, match="too short"):
        read_windows(writer, [text], 20)


def test_sampled_tokens_are_as_likely_as_the_model_says(tmp_path: Path) -> None:
    model = read_decoder(open_checkpoint(source(tmp_path)))
    windows = _sample(model, [[1]] * 4000, 2, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = torch.softmax(model.head(model(torch.tensor([[1]])))[0, 0].float(), -1).numpy()
    found = np.bincount(windows[:, 1], minlength=len(expected)) / len(windows)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(windows))
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 0.04  # Kolmogorov's bound at 1e-5


def test_sampled_text_begins_with_prompts_and_is_repeatable(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(tmp_path))
    model, writer = read_decoder(checkpoint), Writer(checkpoint)
    windows = sample_windows(model, writer, 24, 5, tokens=1000)
    assert windows.shape == (42, 24) and windows.min() >= 0 and windows.max() < CONFIG.vocab_size
    prompts = [prompt[:12] for prompt in writer.prompts()]
    assert all(list(row[: len(p)]) == p for row, p in zip(windows, prompts, strict=False))
    assert np.array_equal(windows, sample_windows(model, writer, 24, 5, tokens=1000))
    assert not np.array_equal(windows, sample_windows(model, writer, 24, 6, tokens=1000))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(tmp_path)
    assert seconds("1h30m") == 5400 and seconds("90s") == 90 and seconds("0.5h") == 1800
    assert parse([str(folder), "-o", "x", "--budget", "20m", "--text", "a", "--text", "b"]).seconds == 1200
    small = ["--sample", "2048", "--window", "32", "--layer-tokens", "512", "--layer-epochs", "1", "--threads", "1"]
    main([str(folder), "-o", str(tmp_path / "out"), "--budget", "4s", *small])
    assert "stage 2, end to end" in capsys.readouterr().err
    for arguments, what in (
        ([str(folder), "-o", str(tmp_path / "out")], "exists already"),
        ([str(tmp_path / "nothing"), "-o", "x"], "no such file"),
        ([str(tmp_path / "out"), "-o", str(tmp_path / "y")], "found a llama model with fatrelu"),
    ):
        with pytest.raises(SystemExit, match=what):
            main(arguments)
    for wrong in (["--budget", "soon"], ["--sparsity", "2"], ["--rows", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), "-o", "x", *wrong])
