"""Numbers of any size and kind, wherever a program or a command line may give one: an error of the family, or taken."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

import svdengine
from svdengine import LLM, RequestError, SamplingFields, SamplingParams, SvdEngineError
from svdengine.cli import main
from svdengine.errors import shown
from svdengine.scheduling.numbers import check_integer, check_number

HUGE = (10**400, -(10**400), 10**5000, 1 << 63, -(1 << 63) - 1, 1 << 64, 1e300, math.nan, math.inf, -math.inf)
NUMBERS = [name for name in SamplingFields.__annotations__ if name not in ("stop", "response_format", "ignore_eos")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("numbers") / "tiny.svdp")


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return svdengine.load(path, device="reference", context=64)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(SvdEngineError) as caught:
        call()
    text = str(caught.value)
    assert 0 < len(text) < 500
    return text


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in ("stop_token_ids", "logit_bias")])
@pytest.mark.parametrize("value", HUGE, ids=lambda v: shown(v)[:20])
def test_sampling_fields(name: str, value: Any) -> None:
    if name == "seed" and value == 1 << 63:  # a seed has 64 bits
        assert SamplingParams(seed=value).seed == value
    else:
        assert name in refused(lambda: SamplingParams(**{name: value}))


@pytest.mark.parametrize("value", HUGE, ids=lambda v: shown(v)[:20])
def test_numbers_inside_of_fields(value: Any, llm: LLM) -> None:
    refused(lambda: SamplingParams(stop_token_ids=[value]))
    refused(lambda: SamplingParams(logit_bias={value: 1.0}))
    refused(lambda: SamplingParams(stop=[value]))
    refused(lambda: SamplingParams(stop=value))
    refused(lambda: SamplingParams(ignore_eos=value))
    refused(lambda: SamplingParams(response_format=value))
    refused(lambda: SamplingParams(response_format={"type": value}))
    if not value < 1e30:  # a smaller one, however small, is a token that never comes
        refused(lambda: SamplingParams(logit_bias={3: value}))


def test_the_largest_bias_decides(llm: LLM) -> None:
    (done,) = llm.generate("hello", temperature=0.0, max_tokens=2, logit_bias={70: 1e30, 71: -math.inf, 72: -1e30})
    assert done.token_ids == [70, 70]


@pytest.mark.parametrize("value", HUGE, ids=lambda v: shown(v)[:20])
def test_prompts(value: Any, llm: LLM) -> None:
    refused(lambda: llm.stream([value]))
    refused(lambda: llm.generate([[1, value]]))
    refused(lambda: llm.generate(value))
    refused(lambda: llm.stream(value))
    refused(lambda: llm.logits([1, value]))
    refused(lambda: llm.logits([1], sparsity_bias=value))
    refused(lambda: llm.generate("a", value))
    refused(lambda: llm.chat([{"role": "user", "content": value}]))
    refused(lambda: llm.chat(value))


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.float64, np.float32, np.bool_, object])
def test_prompts_as_arrays(dtype: Any, llm: LLM) -> None:
    top = 2**40 if np.dtype(dtype).kind in "iuO" else 1
    refused(lambda: llm.stream(np.array([1, top], dtype)))
    refused(lambda: llm.logits(np.array(7)))
    refused(lambda: llm.logits(np.ones((2, 2), np.int64)))


@pytest.mark.parametrize("value", HUGE, ids=lambda v: shown(v)[:20])
@pytest.mark.parametrize("name", ["threads", "context", "kv_tokens", "kv_memory", "sequences", "prefill_rows"])
def test_arguments_of_load(path: Path, name: str, value: Any) -> None:
    refused(lambda: svdengine.load(path, device="reference", **{name: value}))


@pytest.mark.parametrize("value", [0, -1, True, "2", 2.0, None])
def test_sequences_is_checked(path: Path, value: Any) -> None:
    assert "sequences" in refused(lambda: svdengine.load(path, device="reference", sequences=value))


@pytest.mark.parametrize("value", HUGE, ids=lambda v: shown(v)[:20])
def test_gpu_memory_and_names(path: Path, value: Any) -> None:
    for name in ("device", "ffn", "kv_dtype"):
        refused(lambda name=name: svdengine.load(path, **{"device": "reference", name: value}))  # type: ignore[misc]
    if not isinstance(value, int) or value < 1:
        refused(lambda: svdengine.load(path, device="reference", gpu_memory=value))


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_kv_cache_that_no_machine_holds(path: Path, device: svdengine.Device) -> None:
    for arguments in ({"kv_memory": 1 << 46}, {"sequences": 1 << 26}, {"kv_tokens": 1 << 36}):
        assert "GiB of memory" in refused(lambda a=arguments: svdengine.load(path, device=device, **a))  # type: ignore[misc]


OPTIONS = [
    "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--presence-penalty",
    "--frequency-penalty", "--seed", "--max-tokens", "--sparsity-bias", "--threads", "--context", "--kv-memory",
    "--logprobs",
]  # fmt: skip
TEXTS = ["9" * 400, "-" + "9" * 400, "9" * 5000, "nan", "1e400", "-inf", str(1 << 63), ""]


def explained(*arguments: str) -> None:
    result = CliRunner().invoke(main, arguments, env={"SVDENGINE_DEVICE": "reference"})
    assert result.exit_code in (1, 2), (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:8])
def test_options(path: Path, text: str) -> None:
    for option in OPTIONS:
        if not (option == "--seed" and text == str(1 << 63)):
            explained("generate", str(path), "-p", "a", "--json", "-n", "1", f"{option}={text}")
    for bias in (f"{text}=1", f"1={text}"):
        if not bias.endswith(("=-inf", f"={1 << 63}")) and not bias.startswith("1=-"):
            explained("generate", str(path), "-p", "a", "-n", "1", "--logit-bias", bias)
    for option in ("--max-loss", "--max-error", "--density", "--tokens", "--rank", "--threads"):
        explained("calibrate", str(path), f"{option}={text}")
    for option in ("--request-seconds", "--drain-seconds", "--max-requests", "--max-body", "--port", "--prefill-rows"):
        explained("serve", str(path), f"{option}={text}")
    for option in ("--pp", "--tg", "--parallel", "--repetitions", "--sparsity-bias"):
        explained("bench", str(path), f"{option}={text}")
    explained("eval", str(path), "--perplexity", __file__, f"--window={text}")


@pytest.mark.skipif(os.name == "nt", reason="environment")
def test_a_traceback_would_be_seen(path: Path) -> None:
    """The same from a shell: one line, and the exit code of an explained error."""
    command = [sys.executable, "-m", "svdengine.cli", "generate", str(path), "-p", "a", "--seed", "9" * 400]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SVDENGINE_DEVICE": "reference"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and len(done.stderr) < 300


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none()))
def test_numbers_are_taken_when_and_only_when_they_lie_in_range(value: Any) -> None:
    plain = type(value) in (int, float)
    _agree(plain and -5 <= value <= 5, lambda: check_number("x", value, -5, 5))
    _agree(type(value) is int and -5 <= value <= 5, lambda: check_integer("x", value, -5, 5))


def _agree(taken: bool, check: Callable[[], None]) -> None:
    try:
        check()
    except RequestError:
        assert not taken
    else:
        assert taken


def test_what_is_shown_is_short() -> None:
    assert shown(5) == "5" and shown("a") == "'a'"
    assert shown(10**5000) == "a number of 16610 bits" and shown([10**5000]) == "some list"
    assert len(shown("x" * 1000)) == 103
    assert get_args(svdengine.Device)  # the names that load takes are told to type checkers
