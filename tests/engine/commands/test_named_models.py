"""Models by name: from nothing to an answer, converted once, listed, renewed and removed; against a loopback hub."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from loopback_hub import Hub, LoopbackHub, environment_of, use_hub
from small_checkpoints import checkpoint_weights, gguf_tensors, hf_tensors, write_gguf, write_hf

import svdengine
from svdengine.cli import main
from svdengine.commands import conversion
from svdengine.commands.options import model_label
from svdengine.converters import calibration_text
from svdengine.errors import ConversionError, ModelFileError
from svdengine.files.hub_name import parse_model
from svdengine.files.model_file import read_model_file
from svdengine.files.models_folder import kept_models

GREEDY = ("--temperature", "0", "-n", "6", "--ignore-eos")
DENSE, RELU = "tiny-org/tiny-silu", "tiny-org/tiny-relu"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a sparse checkpoint, and a GGUF file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_hf(folder / "dense", hidden_act="silu")
    write_hf(folder / "relu")
    write_gguf(folder / "tiny.gguf", gguf_tensors(checkpoint_weights()), **{"llama.hidden_act": "silu"})
    return folder


@pytest.fixture
def hub(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with LoopbackHub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
        monkeypatch.setattr(calibration_text, "WINDOW", 64)
        monkeypatch.setattr(calibration_text, "TOKENS", 640)  # enough for windows that are held out
        hub.add_folder(DENSE, folders / "dense")
        hub.add_folder(RELU, folders / "relu")
        yield hub


def run(*arguments: str, text: str = "") -> Result:
    return CliRunner(env={"SVDENGINE_DEVICE": "reference"}).invoke(main, list(arguments), input=text)


def done(*arguments: str, text: str = "") -> Result:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result


def error_of(*arguments: str) -> str:
    """The last line, which alone is the error."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ") and result.stderr.count("error: ") == 1
    return lines[-1].removeprefix("error: ")


def listed() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(done("list", "--json").stdout)
    return records


def test_from_an_empty_cache_to_an_answer(hub: Hub, folders: Path, tmp_path: Path) -> None:
    first = done("chat", RELU, *GREEDY, text="hello\n")
    told = first.stderr.splitlines()
    size = sum(p.stat().st_size for p in (folders / "relu").iterdir() if p.name == "model.safetensors")
    commit = hub.repos[RELU].refs["main"]
    assert told[0].startswith(f"{RELU} at {commit[:7]}: {size / 1e3:.3g} kB to download from {hub.url} into {tmp_path}")
    assert "GB are free" in told[0]
    assert told[1].startswith("llama, ") and "in q8 a file of" in told[1] and "of memory to run" in told[1]
    assert told[2] == "runs sparse: its FFNs have the activation relu"
    assert told[3].startswith("calibrating its predictor takes about ")
    assert len(first.stdout) > 1 and "6 tokens" in told[-1]
    (kept,) = listed()
    assert (kept["name"], kept["commit"], kept["dtype"], kept["predictor"]) == (RELU, commit, "q8", "lowbit")
    assert Path(kept["file"]).name == f"tiny-org--tiny-relu--{commit[:12]}--q8-lowbit.svdp"
    hub.asked.clear()
    second = done("chat", RELU, *GREEDY, text="hello\n")
    assert second.stdout == first.stdout and len(second.stderr.splitlines()) == 1
    assert hub.asked == []
    record = json.loads(done("generate", f"hf://{RELU}", "--ffn", "sparse", "-p", "hello", *GREEDY, "--json").stdout)
    assert record["stats"]["generated_tokens"] == 6


def test_another_process_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    environment = {**environment_of(hub, tmp_path), "SVDENGINE_MODELS": str(tmp_path / "models")}
    command = [sys.executable, "-m", "svdengine", "generate", DENSE, "-p", "hello", *GREEDY]
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "runs dense: sparse execution needs a ReLU-family activation" in first.stderr
    second = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert (second.stdout, second.stderr) == (first.stdout, "")
    other = [DENSE if part == RELU else RELU if part == DENSE else part for part in command]
    offline = subprocess.run(other, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert offline.returncode == 1 and "HF_HUB_OFFLINE forbids to look it up; unset it once" in offline.stderr


def test_every_command_takes_a_name(hub: Hub, tmp_path: Path) -> None:
    done("pull", DENSE)
    (tmp_path / "t.txt").write_text("once upon a time there was a system. " * 10)
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello", "max_tokens": 3}\n')
    assert "perplexity" in done("eval", DENSE, "--perplexity", str(tmp_path / "t.txt"), "--window", "32").stdout
    assert "tg4" in done("bench", DENSE, "-p", "0", "-n", "4", "-r", "1").stdout
    assert f"made from: {DENSE}@{hub.repos[DENSE].refs['main']} by" in done("inspect", DENSE).stdout
    output = tmp_path / "out.jsonl"
    done("batch", str(tmp_path / "in.jsonl"), DENSE, "-o", str(output))
    assert json.loads(output.read_text())["error"] is None
    assert "needs a ReLU-family activation" in error_of("calibrate", DENSE)
    with svdengine.load(DENSE, device="reference") as llm:
        assert llm.model_file.path.parent == tmp_path / "models"
    with pytest.raises(ModelFileError, match=f"no model of that name was converted here; run: svdengine pull {RELU}"):
        svdengine.load(RELU)
    assert f"run: svdengine pull {RELU}" in error_of("inspect", RELU)


def test_a_gguf_file(hub: Hub, folders: Path) -> None:
    gguf = (folders / "tiny.gguf").read_bytes()
    hub.add("tiny-org/files", {"tiny-Q8_0.gguf": gguf, "tiny-f16.gguf": gguf + b"\0" * 64, "README.md": b"x" * 999})
    told = error_of("generate", "tiny-org/files", "-p", "hello")
    assert "tiny-org/files has 2 GGUF files; name one, such as tiny-org/files:tiny-Q8_0.gguf: tiny-Q8_0" in told
    assert hub.sent == 0
    done("generate", "tiny-org/files:q8_0", "-p", "hello", *GREEDY)
    assert hub.sent == len(gguf)
    hub.asked.clear()
    assert done("generate", "tiny-org/files:tiny-Q8_0.gguf", "-p", "hello", *GREEDY).stderr == ""
    assert hub.asked == [] and [kept["name"] for kept in listed()] == ["tiny-org/files:q8_0"]
    assert "is in the models folder" not in error_of("rm", "tiny-org/files:f16")
    done("rm", "tiny-org/files")
    assert listed() == []


def test_revisions_and_newer_ones(hub: Hub, folders: Path) -> None:
    done("pull", DENSE)
    old = hub.repos[DENSE].refs["main"]
    assert f"{DENSE} is there already, at {old[:7]}" in done("pull", DENSE).stderr
    new = hub.add_folder(DENSE, folders / "dense")
    assert done("generate", DENSE, "-p", "a", *GREEDY).stderr == ""
    assert f"{DENSE} at {new[:7]}" in done("pull", DENSE).stderr
    assert [kept["commit"] for kept in listed()] == [new, old]
    assert svdengine.load(DENSE, device="reference").model_file.path.name.split("--")[2] == new[:12]
    assert f"{DENSE}@{old[:8]}" not in done("generate", f"{DENSE}@{old[:8]}", "-p", "a", *GREEDY).stderr
    assert "has no revision 'v9'" in error_of("generate", f"{DENSE}@v9", "-p", "a")
    done("rm", f"{DENSE}@{old}")
    assert [kept["commit"] for kept in listed()] == [new]
    hub.repos[DENSE].refs["v2"], hub.sent = new, 0
    done("rm", DENSE, "--downloads")
    assert "is there already" in done("generate", f"{DENSE}@v2", "-p", "a", *GREEDY).stderr and hub.sent == 0


def test_what_cannot_run_is_refused_before_its_weights_come(hub: Hub, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "dense", tmp_path / "odd")
    settings = json.loads((tmp_path / "odd" / "config.json").read_text())
    for change, message in (
        ({"architectures": ["OddForCausalLM"], "model_type": "odd"}, "is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ):
        (tmp_path / "odd" / "config.json").write_text(json.dumps({**settings, **change}))
        hub.add_folder("tiny-org/odd", tmp_path / "odd")
        hub.sent = 0
        assert message in error_of("chat", "tiny-org/odd")
        assert hub.sent < 20_000


def test_there_must_be_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=400_000))
    told = error_of("pull", DENSE)
    assert "no room for it on the disk of " in told and "400 kB are free" in told
    assert hub.sent < 50_000 and listed() == []


def test_an_interrupted_conversion_begins_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("svdengine.converters.conversion.build_tensor", interrupt)
        assert run("pull", RELU).exit_code == 130
    assert listed() == []
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "calibrate_file", interrupt)
        assert run("pull", RELU).exit_code == 130
    assert [kept["finished"] for kept in listed()] == [False]
    assert "unfinished" in done("list").stdout and f"svdengine pull {RELU}" in error_of("inspect", RELU)
    hub.sent = 0
    told = done("pull", RELU).stderr
    assert "downloaded before" in told and "Converting" not in told and hub.sent == 0
    assert [(kept["finished"], kept["predictor"]) for kept in listed()] == [(True, "lowbit")]


def test_a_model_whose_predictor_fails_runs_dense(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConversionError("too little text")

    monkeypatch.setattr(conversion, "calibrate_file", fail)
    assert "warning: it has no predictor and runs dense: too little text" in done("pull", RELU).stderr
    assert [(kept["finished"], kept["predictor"]) for kept in listed()] == [(True, None)]
    assert done("generate", RELU, "-p", "a", *GREEDY).stderr == ""
    assert "is complete, but has no predictor: too little" in error_of("convert", RELU, "--predictor", "svd")


def test_convert_names_its_output(hub: Hub, folders: Path, tmp_path: Path) -> None:
    done("convert", DENSE, "--dtype", "q4", "--down-dtype", "q8")
    (kept,) = listed()
    assert kept["file"].endswith("--q4-down-q8.svdp") and kept["dtype"] == "q4"
    assert done("convert", DENSE, "-o", str(tmp_path / "own.svdp")).stderr.count("runs dense") == 1
    with read_model_file(tmp_path / "own.svdp") as file:
        assert json.loads(file.metadata["provenance"])["hub"]["repository"] == DENSE
    shutil.copytree(folders / "dense", tmp_path / "local")
    shutil.copy(folders / "tiny.gguf", tmp_path / "tiny.v1.gguf")
    for source, output in (("local", "local-q8.svdp"), ("tiny.v1.gguf", "tiny.v1-q8.svdp")):
        assert f"{tmp_path / output}: " in done("convert", str(tmp_path / source)).stderr
        assert f"{output} is there already; name it with -o" in error_of("convert", str(tmp_path / source))
    assert len(kept_models()) == 1


def test_list_and_rm(hub: Hub, tmp_path: Path) -> None:
    assert done("list").stdout == "" and f"0 files, 0.00 GB in {tmp_path / 'models'}" in done("list").stderr
    done("pull", DENSE)
    shutil.copy(listed()[0]["file"], tmp_path / "models" / "renamed.svdp")
    (tmp_path / "models" / "noise.svdp").write_bytes(b"noise")
    lines = done("list").stdout.splitlines()
    assert lines[0].split() == ["name", "commit", "format", "predictor", "GB", "made"]
    assert len(lines) == 3 and all(line.startswith(DENSE) for line in lines[1:])
    assert "tiny-org/none is not in the models folder; svdengine list shows what is" in error_of("rm", "tiny-org/none")
    assert "is not the name of a model on a hub" in error_of("rm", "noise.svdp")
    assert done("rm", DENSE).stderr.count("removed ") == 2
    assert listed() == [] and list(Path(constants.HF_HUB_CACHE).glob("models--*"))
    assert "from " in done("rm", DENSE, "--downloads").stderr
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))
    assert f"nothing of {DENSE} is in" in error_of("rm", DENSE, "--downloads")


def test_shards_and_what_the_index_names(hub: Hub, folders: Path) -> None:
    from safetensors.numpy import save

    tensors = hf_tensors(checkpoint_weights())
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    files: dict[str, Path | bytes] = {
        p.name: p.read_bytes() for p in (folders / "dense").iterdir() if p.suffix == ".json"
    }
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard, part in zip(shards, parts, strict=True):
        files[shard] = save({name: tensors[name] for name in part})
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["pytorch_model.bin"] = files["tf_model.h5"] = b"x" * 100_000
    hub.add("tiny-org/shards", files)
    done("pull", "tiny-org/shards")
    asked = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert asked == files.keys() - {"pytorch_model.bin", "tf_model.h5"}


def test_files_here_come_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-org" / "tiny-silu").mkdir(parents=True)
    assert error_of("generate", DENSE, "-p", "a").startswith(f"{DENSE}: ")
    assert hub.asked == []


def test_a_models_folder_that_cannot_be(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SVDENGINE_MODELS", str(tmp_path / "file" / "models"))
    assert "cannot make the models folder" in error_of("pull", DENSE)


def test_what_a_served_model_is_called() -> None:
    assert model_label({"model": parse_model("hf://org/Some-Model.v1")}) == "Some-Model.v1"
    assert model_label({"model": parse_model("folder/some.svdp")}) == "some"
    assert model_label({"model": None}) == "smollm2"
