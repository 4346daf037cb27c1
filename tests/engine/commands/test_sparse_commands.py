"""The command line of sparse models: calibrate, inspect, eval, bench, chat and generate."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_model import tiny_config, write_tiny_model
from tiny_predictor import tiny_predictor, write_sparse_model

from svdengine import SamplingParams, load
from svdengine.cli import main
from svdengine.commands.greeting import greeting
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_predictor

TEXT = "once upon a time there was a user and a system, hello world. what is 2 + 2? the assistant says: 4. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    write_sparse_model(folder / "sparse.svdp")
    write_tiny_model(folder / "dense.svdp")
    write_tiny_model(folder / "silu.svdp", activation="silu")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text(TEXT[:300], encoding="utf-8")
    return folder


def run(*arguments: Any, text: str = "") -> Result:
    return CliRunner(env={"SVDENGINE_DEVICE": "reference"}).invoke(main, list(map(str, arguments)), input=text)


def done(*arguments: Any, text: str = "") -> Result:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result


def error_of(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_calibrate_to_its_own_file(folder: Path, tmp_path: Path) -> None:
    before = (folder / "dense.svdp").read_bytes()
    made, common = tmp_path / "p.safetensors", ("--text", folder / "text.txt", "--density", 0.6)
    table = done(
        "calibrate", folder / "dense.svdp", "-o", made, "--predictor", "svd", "--rank", 24, *common
    ).stdout.splitlines()
    assert table[0] == "predictor: svd; thresholds: error; budget: density 0.6"
    assert [line.split()[0] for line in table[-4:]] == ["layer", "0", "1", "total"]
    assert table[-3].split()[1:3] == ["24", "0"] and (folder / "dense.svdp").read_bytes() == before
    generated = done("generate", folder / "dense.svdp", "-p", "hello", "--predictor", made, "--ffn", "sparse", "--json")
    assert json.loads(generated.stdout)["stats"]["predicted_density"] == pytest.approx(0.6, abs=0.2)
    other = write_tiny_model(tmp_path / "other.svdp", tied_embeddings=False)
    assert "made for another model" in error_of("generate", other, "-p", "hello", "--predictor", made)


def test_calibrate_as_the_paper_does(folder: Path, tmp_path: Path) -> None:
    made, common = tmp_path / "p.safetensors", ("--text", folder / "text.txt", "--thresholds", "greedy")
    arguments = ("calibrate", folder / "dense.svdp", "-o", made, *common, "--s", 0.6, "--rank", 24)
    found = done(*arguments)
    table = found.stdout.splitlines()
    assert table[0] == "predictor: svd; thresholds: greedy; budget: s 0.6"
    assert "loss" not in found.stderr
    report = json.loads(done(*arguments, "--ablation", "constant", "--json").stdout)
    assert report["thresholds"] == "greedy" and report["ablation"] == "constant" and report["layers"][0]["rank"] == 24
    shared = ("calibrate", folder / "dense.svdp", "--text", folder / "text.txt")
    assert "belong to greedy thresholds" in error_of(*shared, "--s", 0.6)
    assert "meet no budget but their own" in error_of(*shared, "--thresholds", "greedy", "--density", 0.4)


def test_calibrate_in_place_and_to_a_copy(folder: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.svdp")
    chats = tmp_path / "chats.jsonl"
    turn = {"role": "user", "content": TEXT[:400]}
    chats.write_text("\n".join(json.dumps([turn, {**turn, "role": "assistant"}]) for _ in range(8)), encoding="utf-8")
    arguments = ("calibrate", model, "--text", chats, "--predictor", "lowbit", "--bits", 1, "--max-error", 0.01)
    report = json.loads(done(*arguments, "--json", "-o", tmp_path / "copy.svdp").stdout)
    assert report["kind"] == "lowbit" and report["budget"] == {"max_error": 0.01} and len(report["layers"]) == 2
    assert report["totals"]["bytes"] == sum(layer["bytes"] for layer in report["layers"])
    assert json.loads(done("inspect", model, "--json").stdout)["predictor"] is None
    done(*arguments)
    assert model.read_bytes() == (tmp_path / "copy.svdp").read_bytes()
    shown = done("inspect", model).stdout
    assert "predictor: lowbit; thresholds: error; budget: max_error 0.01" in shown and "AUROC" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "copy.svdp", "m.svdp"]


def test_what_each_kind_of_held_out_text_costs_is_told_and_kept(folder: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.svdp")
    (tmp_path / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    files = ("--text", folder / "text.txt", "--text", tmp_path / "other.txt")
    told = done("calibrate", model, *files, "--predictor", "svd", "--rank", 24, "--max-loss", 0.05).stdout
    shown = done("inspect", model).stdout
    for lines in (told.splitlines(), shown.splitlines()):
        start = next(i for i, line in enumerate(lines) if line.startswith("held out"))
        assert lines[start].split()[2:] == ["tokens", "perplexity", "rise", "KL,", "nats", "same"]
        assert {line.split()[0] for line in lines[start + 1 : start + 3]} == {"text.txt", "other.txt"}


def write_networks(path: Path, layers: int = 2, rank: int = 100) -> Path:
    """Trained predictors that know nothing, for the tiny model."""
    import gguf
    import numpy as np

    random, config = np.random.default_rng(0), tiny_config()
    writer = gguf.GGUFWriter(path, "llama")
    for layer in range(layers):
        for name, shape in (("fc1", (rank, config.hidden_size)), ("fc2", (config.ffn_size, rank))):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal(shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_calibrate_with_trained_predictors(folder: Path, tmp_path: Path) -> None:
    source, model = write_networks(tmp_path / "p.gguf"), write_tiny_model(tmp_path / "m.svdp")
    common = ("calibrate", model, "--predictor", "powerinfer", "--from", source, "--text", folder / "text.txt")
    lines = done(*common, "--thresholds", "trained").stdout.splitlines()
    assert lines[0] == "predictor: powerinfer; thresholds: trained; budget: none"
    assert [line.split()[1] for line in lines[-3:-1]] == ["100", "100"]
    shown = json.loads(done("inspect", model, "--json").stdout)["predictor"]
    assert shown["kind"] == "powerinfer" and all(layer["relu"] for layer in shown["layers"])
    short = ("--perplexity", folder / "short.txt", "--window", 40, "--json")
    trained = json.loads(done("eval", model, "--ffn", "both", *short).stdout)
    sparser = json.loads(done("eval", model, "--ffn", "both", "--sparsity-bias", 1, *short).stdout)
    assert 0.1 < sparser["predicted_density"] < trained["predicted_density"] < 0.9
    made = tmp_path / "p.safetensors"
    report = json.loads(done(*common, "-o", made, "--density", 0.7, "--json").stdout)
    assert report["thresholds"] == "error" and report["totals"]["predicted_density"] == pytest.approx(0.7, abs=0.1)
    html = tmp_path / "report.html"
    own = ("eval", model, "--perplexity", folder / "text.txt", "--window", 64, "--predictor", made, "--report", html)
    assert json.loads(done(*own, "--json").stdout)["predictors"]["mean"]["svd, rank 90"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predictor", "powerinfer"), "is read from a GGUF file or a folder (--from)"),
        (("--from", "p.gguf"), "is read from a GGUF file or a folder (--from)"),
        (("--predictor", "powerinfer", "--from", "missing.gguf"), "missing.gguf: No such file"),
        (("--predictor", "powerinfer", "--from", "dense.svdp"), "neither a folder nor a GGUF file"),
        (("--predictor", "powerinfer", "--from", "one.gguf"), "has predictors for 1 layers"),
        (("--predictor", "powerinfer", "--from", "p.gguf", "--rank", "8"), "leave --rank out"),
        (("--thresholds", "trained"), "trained thresholds are those of a powerinfer predictor"),
    ],
)
def test_what_is_no_trained_predictor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    write_networks(folder / "one.gguf", layers=1)
    assert message in error_of("calibrate", "dense.svdp", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("silu.svdp",), "needs a ReLU-family activation"),
        (("missing.svdp",), "missing.svdp: there is no such file"),
        (("dense.svdp", "--text", "none.txt"), "none.txt: cannot be read"),
        (("dense.svdp", "--text", "short.txt"), "the calibration text has"),
        (("dense.svdp", "-o", "nowhere/p.safetensors"), "there is no folder nowhere"),
        (("dense.svdp", "--max-loss", "2"), "a budget is a share between 0 and 1"),
        (("dense.svdp", "--predictor", "lowbit", "--rank", "64"), "a lowbit predictor has no rank"),
        (("dense.svdp", "--predictor", "svd", "--rank", "91"), "rank"),
    ],
)
def test_what_cannot_be_calibrated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in error_of("calibrate", *arguments)


@pytest.mark.parametrize(
    "arguments", [("--max-loss", "0.01", "--density", "0.2"), ("--rank", "0"), ("--rank", "x"), ("--bits", "3")]
)
def test_calibrate_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    assert run("calibrate", folder / "dense.svdp", *arguments).exit_code == 2


def test_eval_of_both_paths(folder: Path) -> None:
    arguments = ("eval", folder / "sparse.svdp", "--perplexity", folder / "short.txt", "--window", 40)
    both = json.loads(done(*arguments, "--ffn", "both", "--json").stdout)
    dense = json.loads(done(*arguments, "--ffn", "dense", "--json").stdout)
    sparse = json.loads(done(*arguments, "--ffn", "sparse", "--json").stdout)
    assert both["dense"]["perplexity"] == pytest.approx(dense["perplexity"])
    assert both["perplexity"] == pytest.approx(sparse["perplexity"]) and both["tokens"] == dense["tokens"]
    assert both["agreement"] > 0.9 and 0 <= both["mean_kl"] < 1e-3
    assert 0.4 < both["active_density"] < both["predicted_density"] < 0.7
    sparser = json.loads(done(*arguments, "--ffn", "both", "--sparsity-bias", 1, "--json").stdout)
    assert sparser["mean_kl"] > both["mean_kl"] and sparser["bytes_per_token"] < both["bytes_per_token"]
    text = done(*arguments, "--ffn", "both").stdout
    assert "sparse against dense: perplexity" in text and "% predicted" in text
    for wrong in (("--ffn", "both"), ("--ffn", "sparse")):
        failed = error_of("eval", folder / "dense.svdp", "--perplexity", folder / "short.txt", *wrong)
        assert "svdengine calibrate" in failed
    assert run("eval", folder / "sparse.svdp", "--predictors").exit_code == 2


def test_eval_of_tasks(folder: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "hello", "choices": [" world", " user"], "answer": 0}\n' * 2, encoding="utf-8")
    common = ("eval", folder / "sparse.svdp", "--tasks", tasks)
    record = json.loads(done(*common, "--ffn", "both", "--json").stdout)
    assert [(score["ffn"], score["count"]) for score in record["tasks"]] == [("dense", 2), ("sparse", 2)]
    lines = done(*common, "--ffn", "both").stdout.splitlines()
    assert lines[0].startswith("choice, dense: ") and "right in both" in lines[2] and "McNemar p = " in lines[2]
    assert json.loads(done(*common, "--json").stdout)["paired"] == []
    tasks.write_text('{"prompt": "hello"}\n', encoding="utf-8")
    assert "tasks.jsonl, line 1: expected either" in error_of(*common)


class Report(HTMLParser):
    """Checks that tags are closed, and collects what the report would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_report(path: Path) -> Report:
    report = Report()
    text = path.read_text(encoding="utf-8")
    report.feed(text)
    assert report.open == [] and report.fetched == [] and "url(" not in text and "<script" not in text
    assert "nan" not in text.split("</style>")[1].lower().replace("nanomet", "")
    return report


def test_the_report(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[: len(TEXT) // 3], encoding="utf-8")
    common = ("eval", folder / "sparse.svdp", "--perplexity", tmp_path / "text.txt", "--window", 64, "--json")
    record = json.loads(done(*common, "--report", tmp_path / "report.html").stdout)
    assert record["predictors"]["mean"]["oracle"] == 1.0 and record["perplexity"] > 1
    assert next(iter(record["predictors"]["mean"])) == "this model's"
    report = read_report(tmp_path / "report.html")
    assert report.count["svg"] == 6 and report.count["table"] == 4  # nothing is missed: there is no error to draw
    for name in ("speed", "ranking", "neuron", "density", "recall", "bytes"):
        rows = list(csv.reader((tmp_path / f"report.{name}.csv").read_text(encoding="utf-8").splitlines()))
        assert len(rows) > 2 and len(set(map(len, rows))) == 1
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert numbers["measured"]["comparison"]["dense_tokens_per_second"] > 0
    assert "SHA-256" in numbers["facts"]["text"] and "svdengine 0.1.0" in numbers["facts"]["made"]
    arguments = (
        "eval",
        folder / "dense.svdp",
        "--perplexity",
        tmp_path / "text.txt",
        "--report",
        tmp_path / "two.html",
    )
    lines = done(*arguments).stdout.splitlines()
    assert lines[0].startswith("perplexity") and lines[-1].startswith("mean")
    assert read_report(tmp_path / "two.html").count["svg"] == 2
    assert "no folder" in error_of(*common, "--report", tmp_path / "no" / "report.html")
    assert "ReLU-family" in error_of(
        "eval", folder / "silu.svdp", "--perplexity", folder / "text.txt", "--window", 64, "--predictors"
    )


def test_a_report_of_two_predictors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[: len(TEXT) // 3], encoding="utf-8")
    with read_model_file(folder / "sparse.svdp") as file:
        fingerprint = model_fingerprint(file)
    for name, offset in (("all", 100.0), ("few", -0.5)):
        write_predictor(tmp_path / f"{name}.safetensors", tiny_predictor(tiny_config(), offset, fingerprint))
    given = [word for name in ("all", "few") for word in ("--predictor", tmp_path / f"{name}.safetensors")]
    common = ("eval", folder / "sparse.svdp", "--perplexity", tmp_path / "text.txt", *given)
    done(*common, "--report", tmp_path / "both.html")
    report = read_report(tmp_path / "both.html")
    assert report.count["svg"] == 7 and report.count["table"] == 4
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "predictor all" in page and "predictor few" in page and page.count(">+0.4<") == 4
    with (tmp_path / "both.error.csv").open(encoding="utf-8") as lines:
        errors = {(row["layer"], row["predictor"]): float(row["relative error"]) for row in csv.DictReader(lines)}
    layers = {layer for layer, _ in errors}
    assert all(errors[layer, "all"] == 0 < errors[layer, "few"] for layer in layers)
    numbers = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))["measured"]["comparisons"]
    assert numbers["all"]["dense"] == numbers["few"]["dense"]
    assert numbers["few"]["sparse"][1]["mean_kl"] > numbers["all"]["sparse"][1]["mean_kl"]
    assert run(*common).exit_code == 2  # without a report, one is measured


def test_bench_of_both_paths(folder: Path) -> None:
    common = ("bench", folder / "sparse.svdp", "--pp", 0, "--tg", 4, "-r", 1, "--ffn", "both")
    dense, sparse = json.loads(done(*common, "--json").stdout)
    assert (dense["ffn"], sparse["ffn"]) == ("dense", "sparse") and dense["faults_per_token"] is None
    assert dense["predicted_density"] is None and 0.4 < sparse["predicted_density"] < 0.7
    table = done(*common, "--faults").stdout
    assert "predicted %" in table and "faults/token" in table
    assert "predicted %" not in done(*common[:-1], "dense").stdout


def test_a_chat_begins_with_what_runs_and_what_prediction_brings(folder: Path) -> None:
    with load(folder / "sparse.svdp", device="reference", ffn="sparse") as llm:
        first, memory, sparsity, rates, _ = greeting(llm).splitlines()
        assert llm.ffn == "sparse"
        [answer] = llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True))
        assert answer.stats.generated_tokens == 3
        llm.ffn = "dense"
        assert "not used with --ffn dense" in greeting(llm)
    assert re.fullmatch(r"sparse\.svdp: \d+ M parameters in f32, on reference", first)
    assert re.fullmatch(r"context 512 tokens; memory \d+ MB of weights, \d+ MB of KV cache", memory)
    shares = re.search(r"(\d+) % of FFN neurons predicted, (\d+) % computed", sparsity)
    assert shares is not None and 10 < int(shares[2]) <= int(shares[1]) < 80
    speed = re.fullmatch(r"(\d+) tokens/s, dense (\d+): ([\d.]+) times as fast", rates)
    assert speed is not None and float(speed[3]) == pytest.approx(int(speed[1]) / int(speed[2]), rel=0.1)
    with load(folder / "silu.svdp", device="reference") as llm:
        assert "dense: sparse execution needs a ReLU-family activation" in greeting(llm)


def test_answers_say_what_was_computed(folder: Path) -> None:
    greedy = ("--temperature", 0, "-n", 4, "--ignore-eos")
    sparse = done("chat", folder / "sparse.svdp", "--ffn", "sparse", *greedy, text="hello\n").stderr
    assert re.search(r"% of FFN neurons predicted, \d+ % computed(; the length limit was reached)?\]", sparse)
    assert "predicted" not in done("chat", folder / "sparse.svdp", "--ffn", "dense", *greedy, text="hello\n").stderr
    none = ("generate", folder / "sparse.svdp", "--ffn", "sparse", "-p", "hello", "--json", "--sparsity-bias", 50)
    assert json.loads(done(*none, *greedy).stdout)["stats"]["predicted_density"] == 0
    assert "--sparsity-bias must lie between" in error_of(*none[:-1], 1000)
