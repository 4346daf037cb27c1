"""The CUDA executor against the reference: on the GPU, or in the simulator with models as small as they get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_zoo import MIXED, block_table, make_batch, random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray
from random_predictors import make_predictor

from svdengine.errors import DeviceError
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cuda import (
    attention,
    attention_rows,
    elementwise,
    embedding,
    executor,
    gemm,
    norm,
    rope,
    sample_survey,
    sample_weights,
    sample_whole,
    sampling,
    single_row,
    sparse,
    workspace,
)
from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.executor import Choice
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.kernels.predictor import Predictor
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import ModelConfig
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation
from svdengine.scheduling.sampler import candidates
from svdengine.scheduling.sampling import SamplingParams

gpu = [pytest.mark.gpu, pytest.mark.skipif(SIMULATED, reason="needs an NVIDIA GPU: too slow in the simulator")]
# Together these use every field of ModelConfig; rope's tables come from the host.
QUICK = (
    "mistral",
    "bamboo",
    "qwen3",
    "minicpm",
    "opt",
    "falcon_7b",
    "falcon_40b",
    "nemotron",
    "gemma3",
    "bitnet",
    "bitnet_silu",
)
BOUND = 2e-5
INTEGER_BOUND = 5e-4  # with activations of 16 bits in groups of 32


def small(config: ModelConfig) -> ModelConfig:
    """The same kind of model with a few dozen weights a matrix."""
    kv_heads = 3 if config.kv_head_count == config.head_count else 1
    config = replace(config, vocab_size=13, hidden_size=12, head_count=3, kv_head_count=kv_heads, head_dim=4)
    config = replace(config, ffn_size=18, max_position=48)
    if config.rope is not None and config.rope.rotated:
        config = replace(config, rope=replace(config.rope, rotated=2))
    windowed = (1,) if config.sliding_window else ()
    layers = 2 if windowed else 1
    return replace(config, layer_count=layers, sliding_window=3 if windowed else 0, sliding_window_layers=windowed)


ZOO = zoo()
MODELS = {name: small(config) if SIMULATED else config for name, config in ZOO.items()}
LLAMA, RELU = MODELS["llama"], MODELS["llama_relu_tied"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the simulator idle threads cost as much as others. Kernels that any number of threads can run get few."""
    if SIMULATED:
        monkeypatch.setattr(single_row, "HEAD_THREADS", 32)
        for module in (norm, elementwise, embedding, single_row):
            monkeypatch.setattr(module, "THREADS", 32)
        monkeypatch.setattr(sparse, "COMPACT_THREADS", 64)
        few_sampling_threads(monkeypatch)
        for module in (attention_rows, rope):
            monkeypatch.setattr(module, "THREADS", 64)
            monkeypatch.setattr(module, "_WARPS", 2)


def few_sampling_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (sampling, "SAMPLE_THREADS", 32),
        (sample_survey, "SURVEY_THREADS", 32),
        (sample_whole, "DIGIT", 7),
    ):
        monkeypatch.setattr(module, name, value)
    for module in (workspace, sample_survey, sampling):
        for name, value in (("SLICES", 2), ("BINS", 32), ("MOST_LISTED", 32)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sample_survey, "_STEP", np.float32(32 / sample_weights.LOWEST))


def use_the_library_from(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library multiply steps of so many rows."""
    for name in ("LIBRARY_ROWS", "TRANSPOSED_LIBRARY_ROWS"):
        monkeypatch.setattr(gemm, name, {})
    for name in ("_OTHERS", "_TRANSPOSED_OTHERS"):
        monkeypatch.setattr(gemm, name, rows)


@contextmanager
def executors(
    device: Any, config: ModelConfig, weight_format: WeightFormat = "f32", **options: Any
) -> Iterator[tuple[CudaExecutor, ReferenceExecutor]]:
    """The executor under test, and the reference with the weights that its stored ones stand for."""
    arrays, formats, exact = stored(config, weight_format, others=options.pop("others", None))
    memory = {name: options.pop(name) for name in ("gpu_memory", "host_memory") if name in options}
    options = {"kv_dtype": "f32", "block_count": 8, "max_batch_rows": 40, **options}
    cuda = CudaExecutor(ExecutorSetup(config, arrays, formats, **options), device=device, **memory)
    try:
        yield cuda, ReferenceExecutor(config, exact, 8, predictor=cuda.predictor, ffn=cuda.ffn)
    finally:
        cuda.close()


def check(device: Any, config: ModelConfig, sizes: list[int], bound: float = BOUND, **options: Any) -> None:
    """Logits of a prompt cut into chunks agree with the reference's."""
    tokens = random_tokens(config, sum(sizes))
    with executors(device, config, **options) as (cuda, reference):
        assert relative_error(run_in_chunks(cuda, tokens, sizes), run_in_chunks(reference, tokens, sizes)) < bound


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else gpu) for n in MODELS])
def test_float32_agrees_with_the_reference(device: Any, name: str) -> None:
    # A step of one row is launched first, recorded and replayed the second time, and from then on replayed.
    check(device, MODELS[name], [2, 1, 1, 1])


@pytest.mark.parametrize("name", ["llama", "llama_relu_tied"])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_agrees_with_its_dequantised_weights(device: Any, name: str, weight_format: WeightFormat) -> None:
    bound = BOUND if weight_format == "f32" else INTEGER_BOUND  # of two rows
    check(device, MODELS[name], [2, 1], bound, weight_format=weight_format)


@pytest.mark.parametrize("name", ["llama", "llama_relu_tied"])
def test_matrices_that_read_the_same_may_have_several_formats(device: Any, name: str) -> None:
    check(device, MODELS[name], [2, 1], INTEGER_BOUND, weight_format="q4", others=MIXED)


def test_a_prompt_is_read_in_tiles(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_FEW_ROWS", 1)
    check(device, MODELS["mistral"], [2, 7])


@pytest.mark.parametrize(("name", "weight_format"), [("llama", "q6"), ("minicpm", "f16"), ("llama_relu_tied", "f32")])
def test_the_library_multiplies_many_rows(
    device: Any, monkeypatch: pytest.MonkeyPatch, name: str, weight_format: WeightFormat
) -> None:
    use_the_library_from(2, monkeypatch)
    device = SimulatedDevice(has_blas=True) if SIMULATED else device
    # Activations are rounded to float16, unless the weights are float32.
    check(device, MODELS[name], [3, 1], BOUND if weight_format == "f32" else 3e-3, weight_format=weight_format)


def test_the_context_is_split_over_blocks(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST_BLOCKS", 1)
    check(device, replace(LLAMA, max_position=48), [17, 1])


def test_half_precision_cache_stays_close(device: Any) -> None:
    tokens = random_tokens(LLAMA, 4)
    with executors(device, LLAMA, kv_dtype="f16") as (cuda, reference):
        error = relative_error(run_in_chunks(cuda, tokens, [3, 1]), run_in_chunks(reference, tokens, [4]))
    assert 0 < error < 2e-3


def test_an_eight_bit_cache_is_refused(device: Any) -> None:
    with (
        pytest.raises(
            DeviceError, match="on a GPU is f16 or f32, found --kv-dtype q8; use one of these, or --device cpu"
        ),
        executors(device, LLAMA, kv_dtype="q8"),
    ):
        pass


def test_sequences_in_one_batch_do_not_see_each_other(device: Any) -> None:
    a, b = random_tokens(LLAMA, 18, seed=1), random_tokens(LLAMA, 3, seed=2)
    with executors(device, LLAMA) as (cuda, reference):
        expected = [run_in_chunks(reference, tokens, [len(tokens)]) for tokens in (a, b)]
        tables = [block_table(18, first=5, step=-2), [4]]
        cuda.forward(make_batch([(a[:17], 0)], tables[:1]))
        mixed = cuda.forward(make_batch([(a[17:], 17), (b, 0)], tables))
        assert relative_error(mixed, np.concatenate([expected[0][17:], expected[1]])) < BOUND


def test_hidden_states_are_those_of_the_latest_step(device: Any) -> None:
    config = MODELS["falcon_7b"]
    tokens = random_tokens(config, 6)
    with executors(device, config) as (cuda, reference):
        for start, size in ((0, 3), (3, 1), (4, 1), (5, 1)):  # launched, launched, recorded, replayed
            batch = make_batch([(tokens[start : start + size], start)], [[2]])
            cuda.forward(batch)
            reference.forward(batch)
            assert relative_error(cuda.hidden_states(), reference.hidden_states()) < BOUND


def test_only_wanted_rows_have_logits(device: Any) -> None:
    tokens = random_tokens(LLAMA, 3)
    with executors(device, LLAMA) as (cuda, _):
        batch = make_batch([(tokens, 0)], [[0]])
        every = cuda.forward(batch)
        for wanted in ([2], [2, 0], []):
            some = cuda.forward(replace(batch, logit_rows=np.array(wanted, np.int32)))
            np.testing.assert_allclose(some, every[wanted], rtol=1e-4, atol=1e-5)


def test_stale_cache_and_activations_do_not_leak_into_a_new_sequence(device: Any) -> None:
    config = MODELS["llama_relu_biases"]
    tokens = random_tokens(config, 3)
    with executors(device, config) as (cuda, _):
        fresh = cuda.forward(make_batch([(tokens, 0)], [[1]])).copy()
        cuda.forward(make_batch([(random_tokens(config, 6, seed=5), 0)], [[1]]))
        np.testing.assert_array_equal(cuda.forward(make_batch([(tokens, 0)], [[1]])), fresh)


def test_what_enters_the_ffns_is_the_references(device: Any) -> None:
    config = MODELS["falcon_40b"]
    batch = make_batch([(random_tokens(config, 3), 0)], [[0]])
    with executors(device, config) as (cuda, reference):
        assert relative_error(cuda.ffn_inputs(batch), reference.ffn_inputs(batch)) < BOUND


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_ffns_alone_sum_up(device: Any, mode: Any) -> None:
    config = replace(RELU, layer_count=2)
    x = np.random.default_rng(0).standard_normal((2, 2, config.hidden_size), np.float32)
    with executors(device, config) as (cuda, reference):
        cuda.ffn = mode
        assert relative_error(cuda.run_ffns(x), reference.run_ffns(x)) < BOUND
        assert relative_error(cuda.run_ffns(x[0], layers=1), reference.run_ffns(x[0], layers=1)) < BOUND


def test_predicted_neurons_are_those_of_the_reference(device: Any) -> None:
    config = replace(RELU, layer_count=2)
    predictor = make_predictor(config, 8, 2, threshold=-0.05)
    tokens = random_tokens(config, 5)
    with executors(device, config, predictor=predictor, ffn="sparse") as (cuda, reference):
        expected = run_in_chunks(reference, tokens, [2, 1, 1, 1])
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1, 1, 1]), expected) < BOUND
        assert cuda.neuron_counts() == reference.neuron_counts()
        np.testing.assert_array_equal(cuda.layer_counts(), reference.layer_counts())
        assert 0 < cuda.neuron_counts().predicted < cuda.neuron_counts().total
        cuda.reset_neuron_counts()
        assert cuda.neuron_counts().total == 0


def test_thresholds_at_minus_infinity_make_sparse_equal_dense(device: Any) -> None:
    predictor = make_predictor(RELU, 8, 0, threshold=-1e9)
    tokens = random_tokens(RELU, 3)
    with executors(device, RELU, predictor=predictor) as (cuda, _):
        dense = run_in_chunks(cuda, tokens, [2, 1])
        cuda.ffn = "sparse"
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1]), dense) < BOUND
        assert cuda.neuron_counts().predicted == cuda.neuron_counts().total


def test_another_predictor_is_not_run_from_old_graphs(device: Any) -> None:
    tokens = random_tokens(RELU, 3)
    with executors(device, RELU, predictor=make_predictor(RELU, 8, 0, -1e9), ffn="sparse") as (cuda, _):
        run_in_chunks(cuda, tokens, [1, 1, 1])
        cuda.predictor = make_predictor(RELU, 8, 0, 1e9)
        cuda.reset_neuron_counts()
        run_in_chunks(cuda, tokens, [1, 1, 1])
        assert cuda.neuron_counts().predicted == 0


def test_a_replayed_step_launches_what_the_first_did(device: Any) -> None:
    if not isinstance(device, SimulatedDevice):
        pytest.skip("only the simulator counts launches")
    with executors(device, LLAMA) as (cuda, _):
        counts = []
        for position in range(3):
            before = device.launches
            cuda.forward(make_batch([([1], position)], [[0]]))
            counts.append(device.launches - before)
        assert counts[0] == counts[1] == counts[2]
        assert len(cuda._graphs) == 1


class EarlyDevice(SimulatedDevice):
    """A device that can let kernels start early, and notes which graphs it ran; `trouble`: what happens then."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.launches_early, self.trouble, self.ran = True, trouble, list[bool]()

    def record(self, step: Any, *, early: bool = False) -> Any:
        if early and self.trouble == "refused":
            raise DeviceError("the GPU refused an early launch: CUDA_ERROR_NOT_SUPPORTED")
        return early, super().record(step)

    def replay(self, graph: Any) -> None:
        early, launches = graph
        self.ran.append(early)
        # A kernel that does not wait for the one before it, say.
        super().replay(launches[:-1] if early and self.trouble == "wrong" else launches)

    def prepare(self, steps: Any) -> None:
        """Nothing is compiled."""


@pytest.mark.skipif(not SIMULATED, reason="a GPU may start kernels early or not")
@pytest.mark.parametrize("trouble", ["", "wrong", "refused"])
def test_kernels_start_early_where_a_trial_gives_the_same_bits(device: Any, trouble: str) -> None:
    one = EarlyDevice(trouble)
    predictor = make_predictor(RELU, 8, 0, threshold=-0.05)
    tokens = random_tokens(RELU, 5)
    with executors(one, RELU, predictor=predictor, ffn="sparse") as (cuda, reference):
        expected = run_in_chunks(reference, tokens, [2, 1, 1, 1])
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1, 1, 1]), expected) < BOUND
        assert cuda.neuron_counts() == reference.neuron_counts()  # what was tried is not counted
    # The second step is recorded, tried, and where the trial failed run again; the third is replayed.
    ran = {"": [False, True, True], "wrong": [False, True, False, False], "refused": [False, False, False]}
    assert one.ran == ran[trouble] and one.launches_early == (not trouble)


def test_tokens_are_chosen_in_the_recorded_step(device: Any) -> None:
    with executors(device, LLAMA) as (cuda, _):
        for position in range(3):  # launched, recorded and replayed, replayed
            batch = make_batch([([position], position), ([5], position)], [[0], [1]])
            logits = cuda.forward(batch).copy()
            sampled, greedy = Choice(1.3, 5, 0.9, 0.01, draw=0.37 + 0.2 * position), Choice(temperature=0.0)
            both, none = cuda.forward_and_sample(batch, [sampled, greedy])
            assert none.shape == (0, LLAMA.vocab_size)
            params = SamplingParams(temperature=1.3, top_k=5, top_p=0.9, min_p=0.01)
            assert both.tolist() == [drawn(logits[0], params, sampled.draw), logits[1].argmax()]
        assert {shape.sample for shape in cuda._graphs} == {"drawn", ""}
        mixed, rest = cuda.forward_and_sample(batch, [None, greedy])
        assert mixed[1] == both[1]
        np.testing.assert_array_equal(rest, logits[:1])
        with pytest.raises(ValueError, match="1 choices for 2 rows"):
            cuda.forward_and_sample(batch, [greedy])


def drawn(logits: NDArray[np.float32], params: SamplingParams, draw: float) -> int:
    """The token that engine/scheduling/sampler.py takes for this random number."""
    tokens, weights = candidates(logits, params)
    return int(tokens[np.searchsorted(np.cumsum(weights), draw * weights.sum(), side="right")])


class LogitsOnly:
    """An executor that leaves sampling to the host."""

    def __init__(self, inner: CudaExecutor) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "forward_and_sample":
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_the_engine_gets_the_same_tokens_from_the_device_as_from_the_host(device: Any) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 3, "top_p": 0.9},
        {"temperature": 1.0, "seed": 4, "logprobs": 1},
        {"temperature": 0.8, "seed": 5, "top_k": 3, "repetition_penalty": 1.2},
    ]
    found = []
    with executors(device, LLAMA) as (cuda, _):
        for executor in (cuda, LogitsOnly(cuda)):
            engine = Engine(executor)  # type: ignore[arg-type]
            limit = ContextLimit(16)
            requests = [
                Generation([1, 2, n], SamplingParams(max_tokens=2, **f), vocab_size=LLAMA.vocab_size,
                           end_tokens=frozenset(), limit=limit, decoder=None)
                for n, f in enumerate(fields)
            ]  # fmt: skip
            for request in requests:
                engine.add(request)
            while not all(request.done for request in requests):
                engine.step()
            assert not any(request.error for request in requests)
            found.append([request.token_ids for request in requests])
    assert found[0] == found[1]


def test_neurons_are_fetched_only_when_they_were_counted(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with executors(device, RELU, predictor=make_predictor(RELU, 8, 0, -1e9), ffn="sparse") as (cuda, _):
        cuda.forward(make_batch([([1], 0)], [[0]]))
        counted = cuda.neuron_counts()
        assert counted.total > 0
        monkeypatch.setattr(device, "download", lambda array: pytest.fail("fetched"))
        assert cuda.neuron_counts() is counted


def test_a_model_that_does_not_fit_says_by_how_much() -> None:
    if not SIMULATED:
        pytest.skip("the simulator's memory is set here")
    arrays, formats, _ = stored(LLAMA, "f32")
    with pytest.raises(DeviceError, match=r"needs 0\.\d\d GiB on the GPU .* 0\.\d\d GiB more than it may take"):
        CudaExecutor(ExecutorSetup(LLAMA, arrays, formats, block_count=8), device=SimulatedDevice(memory=1 << 20))


def test_a_vocabulary_that_sums_cannot_hold_is_refused(device: Any) -> None:
    with pytest.raises(DeviceError, match="at most 524288"):
        CudaExecutor(ExecutorSetup(replace(LLAMA, vocab_size=524289), {}, {}, block_count=8), device=device)


def test_a_batch_that_breaks_the_rules_is_refused(device: Any) -> None:
    with executors(device, LLAMA) as (cuda, _):
        good = vars(make_batch([([1, 2], 0)], [[0]]))
        for field, value in (
            ("tokens", [1, LLAMA.vocab_size]),
            ("positions", [0, 16]),
            ("sequences", [0, 1]),
            ("block_tables", [[8]]),
            ("logit_rows", [2]),
            ("tokens", [1]),
        ):
            broken: dict[str, NDArray] = {**good, field: np.array(value, np.int32)}
            with pytest.raises(ValueError):
                cuda.forward(type(make_batch([([1], 0)], [[0]]))(**broken))


def test_a_matrix_of_the_wrong_shape_never_reaches_a_kernel(device: Any) -> None:
    arrays, formats, _ = stored(LLAMA, "q8")
    arrays["gate"] = arrays["gate"][:, :-1]
    with pytest.raises(ValueError, match="gate"):
        CudaExecutor(ExecutorSetup(LLAMA, arrays, formats, block_count=4), device=device)


def test_a_predictor_for_another_shape_is_refused(device: Any) -> None:
    other: Predictor = make_predictor(replace(RELU, ffn_size=RELU.ffn_size - 2), 8, 0, 0.0)
    with (
        pytest.raises(ValueError, match=f"{RELU.ffn_size} neurons"),
        executors(device, RELU, "q8", predictor=other),
    ):
        pass


def test_a_closed_executor_says_so(device: Any) -> None:
    with executors(device, LLAMA) as (cuda, _):
        cuda.close()
        with pytest.raises(ValueError, match="closed"):
            cuda.forward(make_batch([([1], 0)], [[0]]))
