"""ReLU-fication: a small random SwiGLU model becomes a ReGLU one, through interruptions, and is written as it was."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_zoo import block_table, make_batch, random_tokens, relative_error
from relufy_setup import SILU, Silent, settings, source, weights_of
from small_checkpoints import CONFIG, checkpoint_weights, gguf_tensors, write_gguf

from svdengine.converters.conversion import open_checkpoint
from svdengine.errors import SvdEngineError
from svdengine.kernels.reference import ReferenceExecutor

torch = pytest.importorskip("torch")

from svdengine.tools.relufy.__main__ import main, parse, seconds  # noqa: E402
from svdengine.tools.relufy.decoder import (  # noqa: E402
    Decoder,
    make_student,
    read_decoder,
    read_student,
)
from svdengine.tools.relufy.rounding import Rounding, round_q4  # noqa: E402
from svdengine.tools.relufy.run import Interrupted, Run  # noqa: E402
from svdengine.tools.relufy.saved_run import SavedRun  # noqa: E402
from svdengine.tools.relufy.settings import Settings  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("activation", ["fatrelu", "relu"])
def test_the_student_ends_close_to_its_teacher_and_sparse(tmp_path: Path, activation: str) -> None:
    folder = source(tmp_path, ffn_scale=4.0)  # or the residual stream would hardly notice
    status = Silent()
    wanted = settings(tmp_path, steps=200, sampled_tokens=16384, sparsity=0.6, activation=activation)
    report = Run(wanted, status).run()  # type: ignore[arg-type]
    teacher = read_decoder(open_checkpoint(folder))
    student = read_decoder_of(tmp_path / "out")
    swapped = make_student(teacher, "ffn")
    assert distance(student, teacher) < 0.7 * distance(swapped, teacher)  # which has fewer zeros, 50 %
    assert report.stages[-1].zeros == pytest.approx(0.6, abs=0.05)
    assert [stage.name[:7] for stage in report.stages] == ["teacher", "ReLU in", "stage 1", "stage 2"]
    assert "stage 2, end to end" in status.said[-1] and "stage 2" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out.partial").exists()


def distance(student: Decoder, teacher: Decoder) -> float:
    """Mean divergence of next-token distributions, nats."""
    tokens = torch.tensor([random_tokens(CONFIG, 100, seed) for seed in range(8)])
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(m.head(m(tokens)), -1) for m in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


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


@pytest.mark.parametrize(("activation", "act", "stride"), [("fatrelu", stop, 7), ("relu", crash, 11)])
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, activation: str, act: Callable[[], None], stride: int
) -> None:
    """Stopped or broken off while sampling, in the middle of a layer, and in stage 2, again and again."""
    source(tmp_path)
    short: dict[str, Any] = {"steps": 12, "layer_epochs": 2, "layer_tokens": 1024, "activation": activation}
    whole = Silent()
    Run(settings(tmp_path, "whole", **short), whole).run()  # type: ignore[arg-type]
    wanted = settings(tmp_path, "interrupted", **short)
    at, count = 1, 0
    while interrupted(wanted, at, act):
        at, count = at + stride, count + 1
    assert count >= 2
    expected = weights_of(tmp_path / "whole")
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(tmp_path / "interrupted").items())


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
    text = tmp_path / "out.partial/text.npz"
    for damage in (b"damaged", b"PK\x03\x04" + bytes(99)):
        text.write_bytes(damage)
        with pytest.raises(SvdEngineError, match=r"text\.npz: cannot be read"):
            Run(settings(tmp_path), Silent()).run()  # type: ignore[arg-type]
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


def test_a_run_goes_on_from_an_earlier_one_with_rounded_weights(tmp_path: Path) -> None:
    source(tmp_path, ffn_scale=4.0)
    short = settings(tmp_path, steps=1, layer_epochs=1, layer_rate=1e-5)  # so that something is left to learn
    first = Run(short, Silent()).run()  # type: ignore[arg-type]
    again = settings(
        tmp_path, "more", student=tmp_path / "out", sampled_tokens=32768, dtype="q4", embedding_dtype="q4", steps=240
    )
    second = Run(again, Silent()).run()  # type: ignore[arg-type]
    names = [stage.name for stage in second.stages]
    assert names == ["teacher, SiLU", "student of an earlier run", "stage 2, end to end, in q4"]
    _, start, end = second.stages
    assert start.zeros == pytest.approx(first.stages[-1].zeros, abs=0.01)
    assert end.zeros == pytest.approx(0.6, abs=0.05)
    teacher = read_decoder(open_checkpoint(tmp_path / "source"))

    def stored_distance(name: str) -> float:
        student = read_student(open_checkpoint(tmp_path / name), teacher, "ffn", rounded_embedding=True)
        with Rounding(student, embedding=True).rounded():
            return distance(student, teacher)

    assert stored_distance("more") < 0.8 * stored_distance("out")
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
    for wrong in (["--budget", "soon"], ["--sparsity", "2"], ["--rows", "0"], ["--down-dtype", "q8"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), "-o", "x", *wrong])
