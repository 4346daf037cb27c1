"""The commands convert and inspect."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoints import write_hf

from svdengine.commands.convert import command as convert_command
from svdengine.commands.inspect import command as inspect_command
from svdengine.errors import SvdEngineError


def test_convert_and_inspect(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    output = str(tmp_path / "m.svdp")
    done = CliRunner().invoke(convert_command, [str(tmp_path / "hf"), "-o", output, "--dtype", "q4"])
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "MB in" in done.stderr
    shown = CliRunner().invoke(inspect_command, [output])
    assert shown.exit_code == 0, shown.output
    for text in ("hidden_size", "down_T", "q4", "3 x 150 x 90", "predictor: none", "made from: hf", "parameters:"):
        assert text in shown.output
    report = json.loads(CliRunner().invoke(inspect_command, [output, "--json"]).stdout)
    assert report["totals"]["file_bytes"] == (tmp_path / "m.svdp").stat().st_size
    assert report["totals"]["parameters"] == sum(tensor["parameters"] for tensor in report["tensors"])
    assert {tensor["name"]: tensor["format"] for tensor in report["tensors"]}["embedding"] == "q8"
    assert report["config"]["layer_count"] == 3
    assert report["predictor"] is None


def test_wrong_usage_and_errors(tmp_path: Path) -> None:
    assert CliRunner().invoke(convert_command, [str(tmp_path)]).exit_code == 2
    assert CliRunner().invoke(convert_command, [str(tmp_path), "-o", "x", "--dtype", "q3"]).exit_code == 2
    with pytest.raises(SvdEngineError):
        CliRunner().invoke(convert_command, [str(tmp_path), "-o", str(tmp_path / "x")], catch_exceptions=False)
    with pytest.raises(SvdEngineError):
        CliRunner().invoke(inspect_command, [str(tmp_path / "x")], catch_exceptions=False)
