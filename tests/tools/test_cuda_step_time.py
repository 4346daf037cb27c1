"""The model of a decode step on an NVIDIA GPU: what it counts is what a step launches and reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'svdengine[test]'")

from svdengine.models import tensor_specs
from svdengine.tools import cuda_step_time, machine_code
from svdengine.tools.cuda_step_time import CARDS, Work, prefill_time, step_times, weight_share
from svdengine.tools.random_model import shape_config

CONFIG = replace(
    shape_config("smollm2-135m", 3, "relu"), vocab_size=320, hidden_size=192, ffn_size=448, head_count=6,
    kv_head_count=2, head_dim=32, max_position=128, tied_embeddings=False,
)  # fmt: skip
SASS = """
\t.section\t.text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x10] ;
        /*0040*/                   HADD2.F32 R0, -RZ, R8.H0_H0 ;
        /*0050*/                   FFMA R16, R0, R12, R16 ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_loops_are_found_in_machine_code() -> None:
    code = machine_code.parse(SASS)
    found = [[one.name for one in loop] for loop in machine_code.loops(*code)]
    assert [len(loop) for loop in found] == [5, 2] and found[0][-1] == "BRA"
    assert machine_code.bytes_per_instruction(code) == 2 * 512 / 5
    moved = SASS.replace(".L_x_3:", "        /*0098*/              @!P2 BRA `(.L_x_1) ;\n.L_x_3:")
    assert machine_code.bytes_per_instruction(machine_code.parse(moved)) == 2 * 512 / 5  # what goes back is no loop
    assert machine_code.bytes_per_instruction(machine_code.parse("")) == 0


def test_weights_are_told_from_activations() -> None:
    assert weight_share("gemv_f16_4x1") == pytest.approx(4 * 16 / (4 * 16 + 32))
    assert weight_share("gemv_f16_1x1") == pytest.approx(1 / 3)
    assert weight_share("gemv_q8_1x1") == pytest.approx(1 / (1 + 2.25))  # activations are rounded to 16 bits
    assert weight_share("heads_f16_f32") == weight_share("normed_f16") == weight_share("activated_f16")
    assert weight_share("heads_f16_f32") == weight_share("predicted_q8_2_f16_split") == pytest.approx(1 / 3)
    assert weight_share("down_f16") == 1 and weight_share("survey") is None and weight_share("up_front") is None


def times_of(path: Any, rates: dict[str, float] | None = None, **options: Any) -> dict[str, Any]:
    work = Work(CONFIG, "f16", 64, path, rank=64, **options)
    return {one.name: one for one in step_times(work, CARDS["H200"], rates or {})}


def test_a_dense_step_reads_every_weight_once() -> None:
    times = times_of("dense")
    specs = [spec for spec in tensor_specs(CONFIG) if spec.matrix and spec.name != "embedding"]
    stored = sum(2 * (spec.shape[0] if spec.stacked else 1) * spec.shape[-2] * spec.shape[-1] for spec in specs)
    products = ("gemv", "heads", "normed", "activated")
    read = sum(one.bytes for name, one in times.items() if name.startswith(products))
    assert stored < read < 1.02 * stored  # and parts that the format lacks, which are one zero
    cached = sum(one.bytes for name, one in times.items() if name.startswith("attention"))
    assert cached == 3 * 2 * 2 * 64 * 2 * 32
    assert times["heads_f16_f16"].launches == CONFIG.layer_count


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_of_experts_those_are_read_that_a_token_has(activation: str) -> None:
    config = replace(shape_config("smallthinker-4b", 2), vocab_size=320, hidden_size=192, activation=activation)
    for path in ("dense", "predict") if activation == "relu" else ("dense",):
        times = step_times(Work(config, "q8", 64, path, rank=32, predicted=1.0, active=1.0), CARDS["H200"], {})  # type: ignore[arg-type]
        own = {one.name: one for one in times if one.name.endswith("_experts")}
        stored = 2 * 4 * 3 * 768 * 192  # layers, experts of a token, matrices
        scores = 2 * 4 * (768 * 64 + 32 * 192) if path == "predict" else 0
        scales = 1 + 2 / 32
        assert sum(one.bytes for one in own.values()) == pytest.approx(scales * (stored + scores))
        assert all(weight_share(name) for name in own if not name.startswith("project"))


def test_a_sparse_step_reads_shares() -> None:
    half, all_of_it = (times_of("predict", predicted=share, active=share / 2) for share in (0.5, 1.0))
    assert half["down_f16"].bytes == all_of_it["down_f16"].bytes / 2 > 0
    own, none = all_of_it["predicted_q8_0_f16"].bytes, times_of("predict", predicted=0, active=0)
    scores = none["predicted_q8_0_f16"].bytes
    assert half["predicted_q8_0_f16"].bytes - scores == (own - scores) / 2 > 0 < scores
    assert half["predicted_q8_0_f16"].launches == CONFIG.layer_count


def test_the_slower_of_bytes_and_instructions_counts() -> None:
    few, many = (times_of("dense", {"normed_f16": rate})["normed_f16"] for rate in (1e9, 1e-3))
    gaps = few.launches * cuda_step_time._GAP
    assert few.seconds == pytest.approx(few.reading + gaps) and few.issuing < few.reading
    assert many.seconds == pytest.approx(many.issuing + gaps) and many.issuing > many.reading


def test_the_command_says_that_it_is_a_model(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cuda_step_time, "shape_config", lambda shape, activation: CONFIG)
    cuda_step_time.main(["--bytes-only", "--card", "Orin", "--rank", "64"])
    out = capsys.readouterr().out
    assert out.startswith("A model, not a measurement: Orin") and "| predicted_q8_0_f16 | 3 |" in out
    assert "the sparse step is" in out


def test_prefill_is_held_against_the_library(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    card = CARDS["H200"]
    found = prefill_time(CONFIG, 8192, card, 8.0)
    assert found.library == pytest.approx(2 * 8192**2 * 6 * 32 * 3 / (0.75 * card.tensor))
    assert prefill_time(CONFIG, 8192, card, 0.1).seconds == found.library  # no faster than the library
    assert found.issuing == pytest.approx(2 * 8192**2 * 6 * 32 * 3 / 512 / (2.5 * card.multiprocessors * card.clock))
    assert prefill_time(CONFIG, 16384, card, 8.0).seconds == pytest.approx(4 * found.seconds)
    monkeypatch.setattr(cuda_step_time, "instructions_an_mma", lambda config, card: 7.6)
    cuda_step_time.main(["--prefill", "8192"])
    out = capsys.readouterr().out
    assert out.startswith("A model, not a measurement: H200, llama2-7b, attention of a prompt of 8192 tokens")
