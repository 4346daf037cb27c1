"""The commands convert and inspect."""

import json
import random
from pathlib import Path

import pytest
from click import Command
from click.testing import CliRunner, Result
from small_checkpoints import write_hf

from svdengine.commands.convert import command as convert_command
from svdengine.commands.inspect import command as inspect_command
from svdengine.errors import ConversionError, SvdEngineError


def run(command: Command, *arguments: str) -> Result:
    environment = {"SVDENGINE_DEVICE": "reference"}
    return CliRunner(env=environment).invoke(command, list(arguments), catch_exceptions=False)


def test_convert_and_inspect(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    output = str(tmp_path / "m.svdp")
    arguments = [str(tmp_path / "hf"), "-o", output, "--dtype", "q4", "--predictor", "none"]
    done = CliRunner().invoke(convert_command, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "MB in" in done.stderr
    assert "in q4 a file of" in done.stderr and "without a predictor it computes all gates" in done.stderr
    shown = CliRunner().invoke(inspect_command, [output])
    assert shown.exit_code == 0, shown.output
    for text in ("hidden_size", "down_T", "q4", "3 x 150 x 90", "predictor: none", "made from: hf", "parameters:"):
        assert text in shown.output
    report = json.loads(CliRunner().invoke(inspect_command, [output, "--json"]).stdout)
    assert report["totals"]["file_bytes"] == (tmp_path / "m.svdp").stat().st_size
    assert report["totals"]["parameters"] == sum(tensor["parameters"] for tensor in report["tensors"])
    assert {tensor["name"]: tensor["format"] for tensor in report["tensors"]}["embedding"] == "q6"
    assert report["config"]["layer_count"] == 3
    assert report["predictor"] is None


def test_a_relu_model_gets_a_predictor(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    output, text = str(tmp_path / "m.svdp"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    arguments = [str(tmp_path / "hf"), "-o", output, "--calibration", "recall", "--text", str(text)]
    done = run(convert_command, *arguments)
    assert done.exit_code == 0, done.output
    assert "Calibrating a predictor (lowbit)" in done.stderr
    report = json.loads(run(inspect_command, output, "--json").stdout)["predictor"]
    assert (report["kind"], report["thresholds"]) == ("lowbit", "recall")
    assert [(layer["rank"], layer["bits"]) for layer in report["layers"]] == [(0, 2)] * 3
    assert "predictor: lowbit; thresholds: recall" in run(inspect_command, output).stdout
    text.write_text("short", encoding="utf-8")
    with pytest.raises(ConversionError, match="is complete, but has no predictor: the calibration text has"):
        run(convert_command, *arguments)
    assert json.loads(run(inspect_command, output, "--json").stdout)["predictor"] is None


def test_the_papers_own_predictor(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    output, text = str(tmp_path / "m.svdp"), tmp_path / "text.txt"
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=6000)  # of many kinds: all columns are in use
    text.write_text("".join(letters), encoding="utf-8")
    greedy = ["--predictor", "svd", "--calibration", "greedy", "--s", "0.5", "--rank", "8", "--text", str(text)]
    done = run(convert_command, str(tmp_path / "hf"), "-o", output, *greedy)
    assert done.exit_code == 0, done.output
    report = json.loads(run(inspect_command, output, "--json").stdout)["predictor"]
    assert (report["kind"], report["thresholds"], report["budget"]) == ("svd", "greedy", {"s": 0.5})
    assert [layer["rank"] for layer in report["layers"]] == [8] * 3
    text.write_text("a" * 3000, encoding="utf-8")  # few inputs, again and again
    with pytest.raises(ConversionError, match=r"is complete, but has no predictor: layer 0: .* no Cholesky factor"):
        run(convert_command, str(tmp_path / "hf"), "-o", output, *greedy)


def test_a_model_outside_the_relu_family_gets_none(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", hidden_act="silu")
    arguments = (str(tmp_path / "hf"), "-o", str(tmp_path / "m.svdp"))
    asked = run(convert_command, *arguments, "--predictor", "svd")
    assert asked.exit_code == 2 and "needs a ReLU-family activation" in asked.stderr
    assert not (tmp_path / "m.svdp").exists()
    done = run(convert_command, *arguments)
    assert done.exit_code == 0 and "predictor" not in done.stderr


def test_wrong_usage_and_errors(tmp_path: Path) -> None:
    assert CliRunner().invoke(convert_command, []).exit_code == 2
    assert CliRunner().invoke(convert_command, [str(tmp_path), "-o", "x", "--dtype", "q3"]).exit_code == 2
    with pytest.raises(SvdEngineError):
        CliRunner().invoke(convert_command, [str(tmp_path), "-o", str(tmp_path / "x")], catch_exceptions=False)
    with pytest.raises(SvdEngineError):
        CliRunner().invoke(inspect_command, [str(tmp_path / "x")], catch_exceptions=False)
