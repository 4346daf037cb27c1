"""Parts of the training: divergence, schedule, thresholds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_zoo import random_tokens, zoo
from relufy_setup import SILU, decoder, settings, source

from svdengine.converters.conversion import open_checkpoint

torch = pytest.importorskip("torch")

from svdengine.tools.relufy import distill, divergence, layerwise, precision  # noqa: E402
from svdengine.tools.relufy.decoder import (  # noqa: E402
    Ffn,
    counted_zeros,
    make_student,
    observed,
    read_decoder,
)
from svdengine.tools.relufy.distill import Distillation, drawn_gradient  # noqa: E402
from svdengine.tools.relufy.divergence import divergence_gradient, of_logits  # noqa: E402
from svdengine.tools.relufy.layerwise import LayerResult, train_layers  # noqa: E402
from svdengine.tools.relufy.schedule import Steering, learning_rate  # noqa: E402
from svdengine.tools.relufy.text import Windows  # noqa: E402
from svdengine.tools.relufy.thresholds import Thresholds, balance, fold_thresholds, layer_shares  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def random_windows(count: int, size: int) -> Windows:
    tokens = np.array([random_tokens(SILU, size, seed) for seed in range(count)], np.int32)
    given = np.zeros(tokens.shape, np.bool_)
    given[:, : size // 4] = True
    return Windows(tokens, given)


def test_the_gradient_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(4100, 8, generator=generator) for _ in range(2))  # more rows than are held at once
    head = torch.nn.Linear(8, 19, bias=False)
    leaf = found.clone().requires_grad_()
    ours, theirs = torch.log_softmax(head(leaf), -1), torch.log_softmax(head(wanted), -1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    expected.backward()
    value, gradient = divergence_gradient(found, head.requires_grad_(False), wanted, head)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(gradient, leaf.grad, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0.0, 1.0, 30.0]))
@hypothesis_settings(deadline=None)  # the first example compiles
def test_the_kernel_of_the_divergence(dtype: Any, seed: int, rows: int, vectors: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = ((spread * torch.randn(rows, 16 * vectors, generator=generator)).to(dtype) for _ in range(2))
    expected = divergence._by_tensors(theirs, ours, 0.5)
    assert dtype in divergence._KERNELS
    for found, wanted in zip(of_logits(theirs, ours, 0.5), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_the_teacher_said_is_kept_for_the_next_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = read_decoder(open_checkpoint(source(tmp_path)))
    windows = random_windows(6, 16)

    def trained(kept_bytes: int) -> tuple[int, list[Any]]:
        monkeypatch.setattr(distill, "_KEPT_BYTES", kept_bytes)
        steps = Distillation(teacher, make_student(teacher, "ffn"), settings(tmp_path, rows=4), windows)
        calls: list[int] = []
        hook = teacher.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(6):
            steps.run_step(6)
        hook.remove()
        return len(calls), steps.trained

    known, ours = trained(1 << 20)
    anew, theirs = trained(0)
    assert known < anew == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_step_counts_what_a_model_has_to_foretell(tmp_path: Path) -> None:
    teacher = read_decoder(open_checkpoint(source(tmp_path)))
    windows, changed = random_windows(2, 16), random_windows(2, 16)
    changed.given[:, 10:] = True

    def divergences(windows: Windows) -> float:
        student = make_student(teacher, "ffn")
        return Distillation(teacher, student, settings(tmp_path, rows=2), windows).run_step(1).divergence

    tokens = torch.from_numpy(windows.tokens).long()
    with torch.no_grad(), precision.mixed_precision(torch.device("cpu")):
        student = make_student(teacher, "ffn")
        theirs, ours = (torch.log_softmax(model.head(model(tokens)).float(), -1) for model in (teacher, student))
        each = (theirs.exp() * (theirs - ours)).sum(-1)
    for some, counted in ((windows, slice(3, 16)), (changed, slice(3, 9))):
        assert divergences(some) == pytest.approx(float(each[:, counted].mean()), rel=0.01)


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
    windows = random_windows(8, 32)
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


def test_layers_in_which_gates_matter_less_get_more_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = [torch.randn(100, 40, generator=generator) for _ in range(3)]
    gradients = [scale * torch.randn(100, 40, generator=generator) for scale in (3.0, 1.0, 0.01)]
    shares = layer_shares(gates, gradients, 0.8)
    assert shares[0] < shares[1] < shares[2] == 0.97  # and not all
    assert float(np.mean(shares)) == pytest.approx(0.8, abs=0.02)


def test_stage_1_leaves_each_layer_its_share_of_zeros_and_learns(tmp_path: Path) -> None:
    teacher = read_decoder(open_checkpoint(source(tmp_path, ffn_scale=4.0)))
    tokens = torch.tensor([random_tokens(SILU, 32, seed) for seed in range(64)])
    wanted = settings(tmp_path, layer_epochs=4)
    shares = [0.5 + 0.2 * i / (SILU.layer_count - 1) for i in range(SILU.layer_count)]
    student = make_student(teacher, "ffn")
    results = list(train_layers(teacher, student, tokens, wanted, 0, lambda: False, shares=shares))
    for result, share in zip(results, shares, strict=True):
        assert result.zeros == pytest.approx(share, abs=0.04)
        assert result.after < 0.8 * result.before  # which has half of them zero
    free = [r.zeros for r in train_layers(teacher, make_student(teacher, "ffn"), tokens, wanted, 0, lambda: False)]
    assert max(free) < 0.65


def test_a_layer_sees_the_embedding_of_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = read_decoder(open_checkpoint(source(tmp_path)))
    student = make_student(teacher, "ffn")
    student.embedding.weight = torch.nn.Parameter(teacher.embedding.weight * 0.5, requires_grad=False)
    tokens = torch.from_numpy(random_windows(4, 16).tokens).long()
    seen: list[Any] = []

    def record(layer: Any, index: int, middle: Any, goal: Any, *_: Any) -> LayerResult:
        seen.append((middle, goal))
        return LayerResult(index, 1.0, 1.0, 0.5)

    monkeypatch.setattr(layerwise, "_train_layer", record)
    list(train_layers(teacher, student, tokens, settings(tmp_path), 0, lambda: False))
    rope = teacher.rope(0, 16)
    with torch.no_grad(), precision.mixed_precision(tokens.device):
        entering = student.layers[0].attend(student.embedding(tokens), *rope).float().flatten(0, 1)
        leaving = teacher.layers[0](teacher.embedding(tokens), *rope).float().flatten(0, 1)
        theirs = teacher.layers[0].attend(teacher.embedding(tokens), *rope).float().flatten(0, 1)
    assert torch.allclose(seen[0][0], entering, atol=1e-2) and torch.allclose(seen[0][1], leaving, atol=1e-2)
    assert not torch.allclose(entering, theirs, atol=0.1)


def test_products_are_computed_in_the_format_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    for half, dtype in ((0.01, torch.bfloat16), (0.5, torch.float32), (0.045, torch.float32)):
        times = {torch.bfloat16: half, torch.float32: 0.05}
        monkeypatch.setattr(precision, "_product_seconds", times.__getitem__)
        precision.compute_dtype.cache_clear()
        with precision.mixed_precision(x.device):
            assert torch.nn.functional.linear(x, w).dtype == precision.compute_dtype("cpu") == dtype
    precision.compute_dtype.cache_clear()
