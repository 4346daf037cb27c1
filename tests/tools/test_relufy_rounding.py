"""Weights are rounded in training as a file rounds them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import zoo
from relufy_setup import decoder

from svdengine.kernels.formats import dequantize, quantize

torch = pytest.importorskip("torch")

from svdengine.tools.relufy.decoder import (  # noqa: E402
    make_student,
)
from svdengine.tools.relufy.rounding import Rounding, round_q4, round_q4_with_feedback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(deadline=None)  # the first example compiles
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
    with Rounding(student, embedding=True, down=False).rounded():
        assert torch.equal(layer.ffn.gate.weight, rounded(before["layers.0.ffn.gate.weight"]))
        assert torch.equal(layer.ffn.down.weight, before["layers.0.ffn.down.weight"])
