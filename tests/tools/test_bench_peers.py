"""The comparison with other engines: its table, its turns, its programs, and one small run of svdengine."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from svdengine.errors import SvdEngineError
from svdengine.tools import bench_peers, peer_engines, peer_parts
from svdengine.tools.bench_peers import main
from svdengine.tools.busy_cores import busy
from svdengine.tools.peer_compare import compare, in_turn
from svdengine.tools.peer_engines import Engine, llama_engines, run_llama_bench
from svdengine.tools.peer_models import MODELS, Pair, Shelf, prepare
from svdengine.tools.peer_run import Figure, SpeedTest, measure
from svdengine.tools.peer_start import measure_start
from svdengine.tools.peer_table import Row, Side, as_dicts, from_dicts, markdown
from svdengine.tools.random_gguf import write_gguf
from svdengine.tools.random_model import SHAPES, RandomWeights, write_svdp

ROWS = [
    Row(
        "7B, decode 32",
        {
            "svdengine": Side((16.0, 16.0, 20.0), 1_000_000_000, "dense"),
            "llama.cpp": Side((8.0, 16.0, 10.0), 2_000_000_000),
            "ik_llama.cpp": Side((20.0,), 2_000_000_000, "-rtr 1"),
        },
        bandwidth=40.0,
    ),
    Row("start", {"svdengine": Side((0.5,))}, "s", failures={"llama.cpp": "it fell over"}),
]
TINY = replace(SHAPES["smollm2-135m"], layer_count=1, vocab_size=512)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    write_gguf(folder / "m.gguf", TINY, "q8_0", RandomWeights(TINY).tensor)
    write_svdp(folder / "m.svdp", TINY, "q8")
    return Pair("tiny", folder / "m.gguf", folder / "m.svdp", decode=16, depth=32, prefill=24)


def fake_program(folder: Path, body: str) -> Path:
    """A program of Python, which has its arguments in sys.argv."""
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def engine(name: str, way: str, speeds: list[float]) -> Engine:
    left = iter(speeds)
    return Engine(name, way, lambda pair, test, threads: Figure(next(left), 1e9))


def failing(pair: Pair, test: SpeedTest, threads: int) -> Figure:
    raise SvdEngineError("it fell over")


def test_the_table_has_medians_deviations_ratios_and_the_bandwidth() -> None:
    lines = markdown(ROWS, ["some processor"]).splitlines()
    assert lines[2] == (
        "| 7B, decode 32 | tokens/s | 16.00 ± 2.31 | 10.00 ± 4.16 | 1.60 | 20.00 (-rtr 1) | 0.80 | 16.0 | 40.0 |"
    )
    assert lines[3] == "| start | s | 0.50 | failed |  |  |  |  |  |"
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-2:] == ["start: it fell over.", "some processor"]


def test_rows_become_json_and_come_back() -> None:
    dicts = json.loads(json.dumps(as_dicts(ROWS)))
    assert dicts[0]["ratios"] == {"llama.cpp": 1.6, "ik_llama.cpp": 0.8}
    assert dicts[0]["sides"]["svdengine"]["gb_per_second"] == 16.0
    assert from_dicts(dicts) == ROWS


def test_what_fails_is_told_and_the_rest_takes_turns() -> None:
    calls: list[str] = []
    reports: list[str] = []

    def call(name: str, fails_at: int) -> Callable[[], int]:
        def run() -> int:
            calls.append(name)
            if calls.count(name) == fails_at:
                raise SvdEngineError("it fell over")
            return calls.count(name)

        return run

    results = in_turn([("a", call("a", 0)), ("b", call("b", 2))], 3, reports.append)
    assert calls == ["a", "b", "a", "b", "a"]
    assert dict(results.found) == {"a": [1, 2, 3]} and results.failures == {"b": "it fell over"}
    assert "error: it fell over" in reports


def test_of_a_peer_the_fastest_way_goes_on_and_each_path_of_ours_has_a_row(pair: Pair) -> None:
    engines = [
        engine("svdengine", "dense", [4.0, 4.0]),
        engine("svdengine", "sparse", [8.0, 8.0]),
        engine("ik_llama.cpp", "", [1.0]),  # a second call would have nothing to give
        engine("ik_llama.cpp", "-rtr 1", [2.0, 2.0]),
        Engine("llama.cpp", "", failing),
    ]
    rows = compare(pair, SpeedTest("decode", 16), engines, 1, 2, lambda _: None)
    assert [row.work for row in rows] == ["tiny, decode 16, dense", "tiny, decode 16, sparse"]
    assert [row.ratio("ik_llama.cpp") for row in rows] == [2.0, 4.0]
    assert rows[0].sides["ik_llama.cpp"] == Side((2.0, 2.0), 1e9, "-rtr 1")
    assert rows[0].failures == {"llama.cpp": "it fell over"}


def test_our_own_failure_leaves_the_peers_in_the_table(pair: Pair) -> None:
    (row,) = compare(
        pair,
        SpeedTest("prefill", 8),
        [Engine("svdengine", "dense", failing), engine("llama.cpp", "", [2.0])],
        1,
        1,
        lambda _: None,
    )
    assert row.failures == {"svdengine": "it fell over"} and row.ratio("llama.cpp") is None
    assert "| failed | 2.00 |" in markdown([row], [])


@pytest.mark.parametrize(
    ("test", "help", "expected"),
    [
        (SpeedTest("prefill", 24), "-d", "-p 24 -n 0"),
        (SpeedTest("decode", 16), "-d", "-p 0 -n 16"),
        (SpeedTest("decode", 16, 32), "-d, --n-depth <n>  -ngl, --n-gpu-layers <n>", "-p 0 -n 16 -d 32"),
        (SpeedTest("decode", 16, 32), "-gp <pp,tg>", "-p 0 -n 0 -gp 32,16"),  # as ik_llama.cpp has it
    ],
)
def test_llama_bench_is_asked_for_one_test(
    pair: Pair, tmp_path: Path, test: SpeedTest, help: str, expected: str
) -> None:
    program = fake_program(
        tmp_path,
        f"if '--help' in sys.argv: print({help!r})\n"
        f"else:\n  open({str(tmp_path / 'said')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        "  print('loading'); print('[{\"avg_ts\": 7.5}]')",
    )
    figure = run_llama_bench(program, ("-rtr", "1"), pair, test, 2)
    assert figure.tokens_per_second == 7.5
    assert (figure.bytes_per_token is None) == (test.kind == "prefill")
    said = (tmp_path / "said").read_text()
    assert said == f"-m {pair.gguf} -t 2 -r 1 -o json -rtr 1 {expected}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('a table')", "expected a list of one row with avg_ts, found 'a table"),
        ("sys.exit('cannot load')", "llama-bench failed on m.gguf: cannot load"),
    ],
)
def test_llama_bench_that_fails_is_explained(pair: Pair, tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(SvdEngineError, match=message):
        run_llama_bench(fake_program(tmp_path, body), (), pair, SpeedTest("decode", 4), 1)


def test_a_program_that_is_not_there_is_explained(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SvdEngineError, match="No such file"):
        run_llama_bench(tmp_path / "missing", (), pair, SpeedTest("decode", 4), 1)


def test_engines_are_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_engines, "find_spec", lambda name: None)
    assert llama_engines(None, None) == []
    assert [str(found) for found in llama_engines(Path("a"), Path("b"))] == [
        "llama.cpp",
        "ik_llama.cpp",
        "ik_llama.cpp -rtr 1",
    ]


def test_svdengine_is_measured_in_a_process_of_its_own(pair: Pair) -> None:
    for test in (pair.test("decode"), pair.test("depth"), pair.test("prefill")):
        figure = measure("svdengine", 1, pair.svdp, test)
        assert figure.tokens_per_second > 0
        assert (figure.bytes_per_token is None) == (test.kind == "prefill")
    assert measure("svdengine", 1, pair.svdp, pair.test("decode"), "speculative").tokens_per_second > 0


def test_a_failing_measurement_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SvdEngineError, match=r"svdengine failed on .*missing"):
        measure("svdengine", 1, tmp_path / "missing.svdp", SpeedTest("decode", 1))


def test_llama_cpp_python_runs_the_same_work(pair: Pair) -> None:
    pytest.importorskip("llama_cpp")
    figure = measure("llama-cpp-python", 1, pair.gguf, pair.test("depth"))
    assert figure.tokens_per_second > 0


def test_a_start_is_the_time_to_the_first_output(tmp_path: Path) -> None:
    code = "import time; time.sleep(0.1); print(flush=True); print('a', flush=True); time.sleep(2); print('b')"
    began = time.perf_counter()
    start = measure_start([sys.executable, "-c", code], "python failed")
    assert 0.1 <= start.seconds < time.perf_counter() - began - 0.5
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    assert 2 < start.mebibytes < 200 + own
    for command, message in (
        ([sys.executable, "-c", "print()"], "python failed: it ended with code 0"),
        ([sys.executable, "-c", "print('a'); exit(3)"], "python failed: it ended with code 3"),
        ([str(tmp_path / "missing")], "python failed: No such file"),
    ):
        with pytest.raises(SvdEngineError, match=message):
            measure_start(command, "python failed")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot put a program on one core")
def test_a_busy_core_has_a_program_on_it_until_the_end() -> None:
    core = min(os.sched_getaffinity(0))
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    with busy([core]):
        (child,) = set(children.read_text().split()) - before
        assert os.sched_getaffinity(int(child)) == {core}
    assert set(children.read_text().split()) == before
    with pytest.raises(SvdEngineError, match="did not start"), busy([1 << 19]):
        pass


def test_neighbours_are_told_as_shares_of_the_speed_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_parts, "usable_cores", lambda: [])
    monkeypatch.setattr(peer_parts, "svdengine", lambda path: engine("svdengine", "dense", [10.0, 5.0, 4.0]))
    peers = [engine("llama.cpp", "", [8.0, 6.0, 2.0]), engine("ik_llama.cpp", "-rtr 1", [])]
    rows = peer_parts.neighbour_rows(pair, peers, 1, 1, lambda _: None)
    assert [row.unit for row in rows] == ["tokens/s"] * 3 + ["of alone"] * 2
    assert [row.sides["svdengine"].values for row in rows[3:]] == [(0.5,), (0.4,)]
    assert [row.sides["llama.cpp"].values for row in rows[3:]] == [(0.75,), (0.25,)]


def test_a_comparison_keeps_its_rows_and_goes_on(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    def compared(pair: Pair, test: SpeedTest, engines: list[Engine], *rest: object) -> list[Row]:
        asked.append((pair.name, str(test)))
        return [Row(f"{pair.name}, {test}", {"svdengine": Side((2.0,)), "llama.cpp": Side((1.0,))})]

    def prepared(model: str, bits: int, shelf: Shelf) -> Pair:
        if bits == 4:
            raise SvdEngineError("no four bits")
        return pair

    monkeypatch.setattr(bench_peers, "compare", compared)
    monkeypatch.setattr(bench_peers, "prepare", prepared)
    monkeypatch.setattr(bench_peers, "measure_bandwidth", lambda threads: 30.0)
    common = ["--threads", "1", "--save", str(tmp_path / "kept.json"), "--models", str(tmp_path)]
    main(["smollm2/decode", "--quick", *common])
    assert asked == [("tiny", "decode 4")]
    output = capsys.readouterr()
    assert "| tiny, decode 4 | tokens/s | 2.00 | 1.00 | 2.00 |  | 30.0 |" in output.out
    assert "smollm2/decode, 4 bits failed: no four bits." in output.out

    main(["smollm2", "--bits", "8", "--json", *common])
    assert asked[1:] == [("tiny", "prefill 24"), ("tiny", "decode 16 at 32")]  # what was there is not measured again
    rows = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in rows] == ["tiny, decode 4", "tiny, prefill 24", "tiny, decode 16 at 32"]

    (tmp_path / "kept.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"^error: .*kept.json is no file that --save wrote"):
        main(["smollm2", *common])


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["smollm3"], ["--threads", "0"], ["--bits", "5"]):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
    assert "there is no part 'smollm3'; there are smollm2" in capsys.readouterr().err


def test_models_are_made_once_and_again_when_they_cannot_be_read(tmp_path: Path) -> None:
    written: list[Path] = []

    def write(path: Path) -> None:
        written.append(path)
        write_svdp(path, replace(TINY, vocab_size=64), "q8")

    path, reports = tmp_path / "m.svdp", []
    path.write_bytes(b"of another version")
    shelf = Shelf(tmp_path, reports.append)
    for _ in range(2):
        assert shelf.file("m.svdp", 3, write) == path
    assert len(written) == 1
    assert reports == [f"writing {path} (3 MB)"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_relu_model_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SvdEngineError, match="give its GGUF file with --relu"):
        prepare("relu", 8, Shelf(tmp_path, lambda _: None))
    assert MODELS["relu"].tests == ("decode",)
