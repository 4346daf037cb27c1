"""The Ascend executor on an emulated NPU against the reference, which has the same float16 weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_cann import Npu
from model_zoo import block_table, make_batch, random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray
from random_predictors import make_network, make_predictor

from svdengine.errors import DeviceError
from svdengine.kernels import predictor as predictor_module
from svdengine.kernels.ascend import workspace
from svdengine.kernels.ascend.attention import FUSED
from svdengine.kernels.ascend.custom_ops import find_kernels
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.executor import AscendExecutor
from svdengine.kernels.ascend.model import device_bytes
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import BlockStore
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.kernels.predictor import Predictor, quantize_activations
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import ModelConfig, tensor_specs

ZOO = {name: config for name, config in zoo().items() if not (config.post_norms or config.sub_norms)}
SPARSE = {name: config for name, config in ZOO.items() if config.sparse_ffn}
LLAMA, RELU = ZOO["llama"], ZOO["llama_relu_tied"]
FUSABLE = replace(LLAMA, head_dim=16)  # heads that the fused attention takes
BOUND = 4e-3  # activations are float16
SOCS = ("Ascend910B3", "Ascend310P3")
SMALL = 16  # tokens in a KV block of most tests, so that short prompts fill several
SIZES = [9, 1, 5, 1, 1, 1, 7]  # of chunks that a prompt is cut into

MakeNpu = Callable[..., Npu]
Launches = dict[str, Callable[..., None]]


class SmallBlocks(AscendExecutor):
    """The executor with smaller KV blocks."""

    block_size = SMALL


@contextmanager
def executors(
    npu: Npu, config: ModelConfig, weight_format: WeightFormat = "f16", *, small: bool = True, **options: Any
) -> Iterator[tuple[AscendExecutor, ReferenceExecutor]]:
    """The executor under test, and the reference with the weights that its stored ones stand for."""
    arrays, formats, exact = stored(config, weight_format)
    ops = {"custom_ops": options.pop("custom_ops", find_kernels(npu))} if npu.launches else {}
    setup = ExecutorSetup(config, arrays, formats, **{"block_count": 8, "max_batch_rows": 40, **options})
    device = AscendDevice(npu.cann)
    try:
        ascend = (SmallBlocks if small else AscendExecutor)(setup, device=device, **ops)
        mode = "sparse" if ascend.predictor and ascend.ffn == "sparse" else "dense"
        blocks = setup.block_count
        yield ascend, ReferenceExecutor(config, exact, blocks, predictor=ascend.predictor, ffn=mode)
    finally:
        device.close()


def check(npu: Npu, config: ModelConfig, sizes: list[int] = SIZES, bound: float = BOUND, **options: Any) -> None:
    """Logits of a prompt cut into chunks agree with the reference's."""
    tokens = random_tokens(config, sum(sizes))
    with executors(npu, config, **options) as (ascend, reference):
        assert relative_error(run_in_chunks(ascend, tokens, sizes), run_in_chunks(reference, tokens, sizes)) < bound


def decode(executor: Any, prompt: list[int], count: int, forced: list[int] | None = None) -> NDArray[np.float32]:
    """Logits after a prompt and after each likeliest token, or after each of the tokens that are forced."""
    table = block_table(len(prompt) + count, size=executor.block_size)
    logits = [executor.forward(make_batch([(prompt, 0)], [table]))[-1].copy()]
    while len(logits) < count:
        token = int(logits[-1].argmax()) if forced is None else forced[len(logits) - 1]
        batch = make_batch([([token], len(prompt) + len(logits) - 1)], [table])
        logits.append(executor.forward(batch)[-1].copy())
    return np.stack(logits)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("soc", SOCS)
def test_every_family_agrees_with_the_reference(make_npu: MakeNpu, name: str, soc: str) -> None:
    # A threshold of 0.2 makes a step of the activation: a gate that is rounded over it changes more.
    check(make_npu(soc=soc), ZOO[name], bound=2e-2 if name == "prosparse" else BOUND)


@pytest.mark.parametrize("name", ZOO)
def test_every_family_chooses_the_same_tokens(make_npu: MakeNpu, launches: Launches, name: str) -> None:
    config = ZOO[name]
    prompt = random_tokens(config, 7, seed=3)
    predictor = make_predictor(config, 32, 0, -0.3) if config.sparse_ffn else None
    with executors(make_npu(launches=launches), config, predictor=predictor) as (ascend, reference):
        for ascend.ffn in ("dense", "sparse") if predictor else ("dense",):
            reference.ffn = ascend.ffn
            expected = decode(reference, prompt, 20)
            tokens = expected.argmax(1)
            found = decode(ascend, prompt, 20, forced=tokens.tolist())
            # Where two tokens are as likely as float16 can tell, either may come.
            best = np.sort(expected, 1)
            close = best[:, -1] - best[:, -2] < BOUND * np.abs(expected).max()
            assert ((found.argmax(1) == tokens) | close).all() and close.sum() <= 2


@pytest.mark.parametrize("name", ["llama", "llama_relu_biases", "qwen3", "opt", "falcon_40b"])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_agrees_with_its_dequantised_weights(
    make_npu: MakeNpu, name: str, weight_format: WeightFormat
) -> None:
    check(make_npu(), ZOO[name], [9, 1, 1], weight_format=weight_format)


def test_8_bits_stay_8_bits_where_the_product_takes_them(make_npu: MakeNpu) -> None:
    npu = make_npu()
    check(npu, LLAMA, [1], weight_format="q8")
    quantised = npu.calls.count("aclnnWeightQuantBatchMatmulV2")
    assert quantised == 7 * LLAMA.layer_count + 1 and "aclnnMm" not in npu.calls
    # Rows of an FFN that can be skipped are float16, and a tied embedding is looked up in float16.
    relu = make_npu()
    check(relu, RELU, [1], weight_format="q8")
    assert relu.calls.count("aclnnWeightQuantBatchMatmulV2") == 4 * RELU.layer_count
    assert relu.calls.count("aclnnMm") == 2 * RELU.layer_count + 1  # gate and up are one product


@pytest.mark.parametrize("weight_format", ["q6", "q4", "ternary"])
def test_fewer_bits_become_float16(make_npu: MakeNpu, weight_format: WeightFormat) -> None:
    npu = make_npu()
    check(npu, RELU, [1], weight_format=weight_format)
    assert npu.calls.count("aclnnMm") == 4 * RELU.layer_count + 1  # q, k and v are one product
    matrices = [spec.name for spec in tensor_specs(RELU) if spec.matrix]
    small, half = (device_bytes(RELU, dict.fromkeys(matrices, name)) for name in (weight_format, "f16"))
    assert small == half


def test_decoding_attends_in_one_operator(make_npu: MakeNpu) -> None:
    npu = make_npu()
    check(npu, FUSABLE, [5, 1, 1])
    assert npu.calls.count(FUSED) == 2 * FUSABLE.layer_count + 1  # once to try it
    assert npu.calls.count("aclnnSoftmax") == FUSABLE.layer_count  # of the prompt
    without = make_npu(missing=frozenset([FUSED, FUSED + "GetWorkspaceSize"]))
    check(without, FUSABLE, [5, 1, 1])
    assert without.calls.count("aclnnSoftmax") == 3 * FUSABLE.layer_count


def test_rows_that_are_decoded_beside_a_prompt_attend_in_one_operator(make_npu: MakeNpu) -> None:
    npu = make_npu()
    with executors(npu, FUSABLE) as (ascend, _):
        ascend.forward(make_batch([([1, 2], 0), ([3, 4], 0)], [[0], [1]]))
        before = len(npu.calls)
        ascend.forward(make_batch([([5], 2), ([6, 7, 8], 0), ([9], 2)], [[0], [2], [1]]))
        calls = npu.calls[before:]
    assert calls.count(FUSED) == FUSABLE.layer_count and calls.count("aclnnSoftmax") == FUSABLE.layer_count


def test_a_window_is_seen_by_the_layers_that_have_one(make_npu: MakeNpu) -> None:
    npu = make_npu()
    config = replace(FUSABLE, sliding_window=7, sliding_window_layers=(1,))
    check(npu, config, [5, 1, 1, 1, 1, 12, 1])
    # Up to 7 tokens the layer with the window sees all, and fuses too: the first two of 5 decode steps.
    assert npu.calls.count(FUSED) == 5 + 2 + 1  # once to try it


@pytest.mark.parametrize("config", [LLAMA, FUSABLE, replace(FUSABLE, sliding_window=100, sliding_window_layers=(1,))])
def test_blocks_hold_128_tokens(make_npu: MakeNpu, config: ModelConfig) -> None:
    config = replace(config, max_position=400)
    sizes = [100, 27, 1, 1, 5, 1, 130, 1]  # over the borders of the first and of the second block
    check(make_npu(), config, sizes, small=False, block_count=64, max_batch_rows=130)
    with executors(make_npu(), config, small=False, block_count=64, context=130, sequences=3) as (ascend, _):
        assert (ascend.block_size, ascend.block_count) == (128, 8)
        assert ascend.read_blocks([5, 7]).shape == (2, 2, 2, 128, 3, config.head_dim)
    # Where whole sequences are asked for, there are as many blocks as they take: two each.
    with executors(make_npu(), config, small=False, block_count=27, context=130, sequences=3) as (ascend, _):
        assert ascend.block_count == 6


def test_sequences_of_blocks_of_128_do_not_see_each_other(make_npu: MakeNpu) -> None:
    config = replace(FUSABLE, max_position=400)
    a, b = random_tokens(config, 140, seed=1), random_tokens(config, 132, seed=2)
    with executors(make_npu(), config, small=False, block_count=64, max_batch_rows=280) as (ascend, reference):
        results = []
        for executor in (ascend, reference):
            reach = -(-140 // executor.block_size)
            tables = [list(range(reach, 2 * reach))[::-1], list(range(reach))]
            prompts = executor.forward(make_batch([(a[:139], 0), (b[:131], 0)], tables)).copy()
            step = executor.forward(make_batch([(a[139:], 139), (b[131:], 131)], tables))
            results.append(np.concatenate([prompts, step]))
        assert relative_error(*results) < BOUND


def test_scores_that_do_not_fit_come_in_parts(make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_SCORES", 1)
    npu = make_npu()
    check(npu, LLAMA, [30, 5], context=40)
    assert npu.calls.count("aclnnSoftmax") > 2 * LLAMA.layer_count


def test_sequences_in_one_batch_do_not_see_each_other(make_npu: MakeNpu) -> None:
    for config in (LLAMA, FUSABLE):
        a, b = random_tokens(config, 18, seed=1), random_tokens(config, 4, seed=2)
        with executors(make_npu(), config) as (ascend, reference):
            expected = [run_in_chunks(reference, tokens, [len(tokens)]) for tokens in (a, b)]
            tables = [block_table(18, first=5, step=-2), [4]]
            for executor in (ascend, reference):
                executor.forward(make_batch([(a[:16], 0)], tables[:1]))
            # A prompt before a row that is decoded, and only some logits, in another order.
            tables = tables[::-1]
            batch = make_batch([(b[:3], 0), (a[16:17], 16)], tables)
            mixed = ascend.forward(replace(batch, logit_rows=np.array([3, 0, 2], np.int32)))
            wanted = np.stack([expected[0][16], expected[1][0], expected[1][2]])
            assert relative_error(mixed, wanted) < BOUND
            inputs = reference.ffn_inputs(batch)
            assert relative_error(ascend.ffn_inputs(batch), inputs) < BOUND
            tables = tables[::-1]
            both = ascend.forward(make_batch([(a[17:], 17), (b[3:], 3)], tables))
            assert relative_error(both, np.concatenate([expected[0][17:], expected[1][3:]])) < BOUND


def test_only_wanted_rows_have_logits(make_npu: MakeNpu) -> None:
    tokens = random_tokens(LLAMA, 3)
    with executors(make_npu(), LLAMA) as (ascend, _):
        batch = make_batch([(tokens, 0)], [[0]])
        every = ascend.forward(batch)
        for wanted in ([2], [2, 0], []):
            some = ascend.forward(replace(batch, logit_rows=np.array(wanted, np.int32)))
            np.testing.assert_array_equal(some, every[wanted])


def as_on_ascend(x: NDArray[np.float32], bits: int = 16) -> NDArray[np.float32]:
    """What a predictor reads on Ascend: a low-bit part is multiplied by x in float16, and not by x in 8 bits."""
    return quantize_activations(x, bits) if bits == 16 else x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("network", "rank", "bits"), [(False, 24, 0), (True, 40, 0), (False, 24, 2), (False, 0, 1)])
def test_predicted_neurons_are_those_of_the_reference(
    make_npu: MakeNpu,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    network: bool,
    rank: int,
    bits: int,
) -> None:
    config = SPARSE[name]
    monkeypatch.setattr(predictor_module, "quantize_activations", as_on_ascend)
    predictor = make_network(config, rank, -0.1) if network else make_predictor(config, rank, bits, -0.05)
    tokens = random_tokens(config, 12)
    with executors(make_npu(launches=launches), config, predictor=predictor, ffn="sparse") as (ascend, reference):
        found, expected = (run_in_chunks(e, tokens, [6, 1, 1, 4]) for e in (ascend, reference))
        # Factors are float16: a score near zero may fall on either side, which changes what it stands for.
        assert relative_error(found, expected) < 8e-2
        assert np.median(np.abs(found - expected)) < BOUND * expected.std()
        counts, wanted = ascend.neuron_counts(), reference.neuron_counts()
        assert counts.total == wanted.total and 0 < counts.predicted < counts.total
        assert abs(counts.predicted - wanted.predicted) <= 5 and abs(counts.active - wanted.active) <= 5
        ascend.reset_neuron_counts()
        assert ascend.neuron_counts().total == 0


def test_the_sparsity_bias_of_each_sequence_counts(make_npu: MakeNpu, launches: Launches) -> None:
    predictor = make_predictor(RELU, 24, 0, -0.05)
    with executors(make_npu(launches=launches), RELU, predictor=predictor, ffn="sparse") as (ascend, reference):
        batch = make_batch([([1, 2], 0), ([3], 0)], [[0], [1]])
        batch = replace(batch, sparsity_bias=np.array([100.0, -100.0], np.float32))
        assert relative_error(ascend.forward(batch), reference.forward(batch)) < BOUND
        assert ascend.neuron_counts() == reference.neuron_counts()
        assert ascend.neuron_counts().predicted * 3 == ascend.neuron_counts().total


def test_with_every_neuron_listed_sparse_is_dense(make_npu: MakeNpu, launches: Launches) -> None:
    tokens = random_tokens(RELU, 5)
    with executors(make_npu(launches=launches), RELU, predictor=make_predictor(RELU, 8, 0, -1e4)) as (ascend, _):
        dense = run_in_chunks(ascend, tokens, [3, 1, 1])
        ascend.ffn = "sparse"
        assert relative_error(run_in_chunks(ascend, tokens, [3, 1, 1]), dense) < BOUND
        assert ascend.neuron_counts().predicted == ascend.neuron_counts().total


def test_without_a_predictor_only_zeros_are_skipped(make_npu: MakeNpu, launches: Launches) -> None:
    npu = make_npu(launches=launches)
    tokens = random_tokens(RELU, 5)
    with executors(npu, RELU, ffn="auto") as (ascend, reference):
        found, expected = (run_in_chunks(e, tokens, [4, 1]) for e in (ascend, reference))
        assert relative_error(found, expected) < BOUND
        counts = ascend.neuron_counts()  # of the step of one row
        assert counts.predicted == counts.total == RELU.layer_count * RELU.ffn_size > counts.active > 0
    assert "aclrtlaunch_svd_score" not in npu.calls


def test_auto_measures_before_it_chooses(make_npu: MakeNpu, launches: Launches) -> None:
    predictor = make_predictor(RELU, 8, 0, 0.0)
    with executors(make_npu(launches=launches), RELU, predictor=predictor, ffn="auto") as (ascend, _):
        run_in_chunks(ascend, random_tokens(RELU, 3), [2, 1])
        assert ascend.ffn_times.neurons == RELU.ffn_size and min(ascend.ffn_times.dense) > 0
        # Each step goes by what costs less; what was counted while measuring is forgotten.
        assert ascend.neuron_counts().total in [rows * RELU.layer_count * RELU.ffn_size for rows in range(4)]


def test_another_predictor_takes_the_place_of_the_first(make_npu: MakeNpu, launches: Launches) -> None:
    tokens = random_tokens(RELU, 3)
    npu = make_npu(launches=launches)
    with executors(npu, RELU, predictor=make_predictor(RELU, 8, 0, -1e4), ffn="sparse") as (ascend, _):
        run_in_chunks(ascend, tokens, [1, 1, 1])
        used = npu.memory.used
        ascend.predictor = make_predictor(RELU, 8, 0, 1e4)
        assert npu.memory.used == used
        ascend.reset_neuron_counts()
        run_in_chunks(ascend, tokens, [1, 1, 1])
        assert ascend.neuron_counts().predicted == 0


@pytest.mark.parametrize(
    ("predictor", "custom_ops", "reason"),
    [
        (make_predictor(RELU, 8, 0, 0.0), "they were not built", "they were not built"),
    ],
)
def test_what_cannot_run_sparse_runs_dense_and_says_so_once(
    make_npu: MakeNpu, launches: Launches, capsys: Any, predictor: Predictor, custom_ops: str | None, reason: str
) -> None:
    options: dict[str, Any] = {"predictor": predictor, "ffn": "sparse"}
    options |= {} if custom_ops is None else {"custom_ops": custom_ops}
    tokens = random_tokens(RELU, 4)
    with executors(make_npu(launches=launches), RELU, **options) as (ascend, reference):
        reference.ffn = "dense"
        found, expected = (run_in_chunks(e, tokens, [2, 1, 1]) for e in (ascend, reference))
        assert relative_error(found, expected) < BOUND and ascend.neuron_counts().total == 0
    said = capsys.readouterr().err
    assert said.startswith("all FFNs run dense: ") and reason in said and said.count("\n") == 1


def test_a_cann_whose_plans_run_once_gives_the_same(make_npu: MakeNpu) -> None:
    tokens = random_tokens(FUSABLE, 8)
    found = []
    for repeatable in (True, False):
        npu = make_npu(repeatable=repeatable)
        with executors(npu, FUSABLE) as (ascend, _):
            found.append(run_in_chunks(ascend, tokens, [5, 1, 1, 1]))
            before = npu.calls.count("aclnnMmGetWorkspaceSize")
            ascend.forward(make_batch([(tokens[-1:], 7)], [block_table(8, first=1, step=2)]))
            planned = npu.calls.count("aclnnMmGetWorkspaceSize") - before
            assert planned == (0 if repeatable else 4 * FUSABLE.layer_count + 1)
    np.testing.assert_array_equal(*found)


def test_what_enters_the_ffns_is_the_references(make_npu: MakeNpu) -> None:
    config = ZOO["falcon_40b"]
    batch = make_batch([(random_tokens(config, 3), 0)], [[0]])
    with executors(make_npu(), config) as (ascend, reference):
        assert relative_error(ascend.ffn_inputs(batch), reference.ffn_inputs(batch)) < BOUND


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_ffns_alone_sum_up(make_npu: MakeNpu, launches: Launches, mode: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 2, RELU.hidden_size), np.float32)
    with executors(make_npu(launches=launches), RELU) as (ascend, reference):
        ascend.ffn = mode
        assert relative_error(ascend.run_ffns(x), reference.run_ffns(x)) < BOUND
        assert relative_error(ascend.run_ffns(x[0], layers=1), reference.run_ffns(x[0], layers=1)) < BOUND
        assert ascend.neuron_counts().total == (0 if mode == "dense" else 3 * 2 * RELU.ffn_size)


def test_blocks_can_be_taken_out_and_put_back_elsewhere(make_npu: MakeNpu) -> None:
    tokens = random_tokens(LLAMA, 20)
    with executors(make_npu(), LLAMA) as (ascend, reference):
        assert isinstance(ascend, BlockStore)
        expected = run_in_chunks(reference, tokens, [20])[19:]
        ascend.forward(make_batch([(tokens[:19], 0)], [[3, 1]]))
        data = ascend.read_blocks([3, 1])
        assert data.shape == (2, 2, LLAMA.layer_count, 16, LLAMA.kv_head_count, LLAMA.head_dim)
        ascend.forward(make_batch([(random_tokens(LLAMA, 19, seed=5), 0)], [[3, 1]]))
        ascend.write_blocks([6, 2], data)
        assert relative_error(ascend.forward(make_batch([(tokens[19:], 19)], [[6, 2]])), expected) < BOUND
        with pytest.raises(ValueError, match=r"expected float16 \(1, 2, 2, 16, 3, 10\)"):
            ascend.write_blocks([6], data)


def test_any_thread_may_run_a_step(make_npu: MakeNpu) -> None:
    tokens = random_tokens(LLAMA, 3)
    batch = make_batch([(tokens, 0)], [[0]])
    found: list[NDArray] = []
    with executors(make_npu(), LLAMA) as (ascend, _):
        expected = ascend.forward(batch)
        thread = threading.Thread(target=lambda: found.append(ascend.forward(batch)))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(found[0], expected)


def test_a_model_that_does_not_fit_says_by_how_much(make_npu: MakeNpu) -> None:
    with (
        pytest.raises(DeviceError, match=r"needs 0\.5\d GiB on the NPU .* 0\.\d\d GiB more than is free"),
        executors(make_npu(memory_bytes=1 << 28), LLAMA),
    ):
        pass


def test_memory_that_runs_out_is_an_error_of_one_line(make_npu: MakeNpu) -> None:
    npu = make_npu(memory_bytes=1 << 20)
    device = AscendDevice(npu.cann)
    device.empty((1 << 19,), np.int8)
    with pytest.raises(DeviceError, match=r"acl\.rt\.malloc failed with 207001 \(out of device memory\): EZ9999"):
        device.empty((1 << 20,), np.int8)
    device.close()
    device.close()


def test_an_operator_that_cann_lacks_is_named(make_npu: MakeNpu) -> None:
    npu = make_npu(missing=frozenset(["aclnnRotaryPositionEmbeddingGetWorkspaceSize"]))
    with (
        pytest.raises(DeviceError, match=r"CANN 8\.1\.emulated has no aclnnRotaryPositionEmbedding"),
        executors(npu, LLAMA),
    ):
        pass


def test_what_float16_does_not_hold_is_refused_by_name(make_npu: MakeNpu) -> None:
    message = "models of the family gemma3 do not run on Ascend: .* use --device cpu or cuda"
    with pytest.raises(DeviceError, match=message), executors(make_npu(), zoo()["gemma3"]):
        pass
    message = "models of the family bitnet do not run on Ascend yet: .* use --device cpu"
    with pytest.raises(DeviceError, match=message), executors(make_npu(), zoo()["bitnet"]):
        pass


@pytest.mark.parametrize("kv_dtype", ["f32", "q8"])
def test_another_cache_than_float16_is_refused(make_npu: MakeNpu, kv_dtype: str) -> None:
    message = f"the KV cache on Ascend is f16, found --kv-dtype {kv_dtype}"
    with pytest.raises(DeviceError, match=message), executors(make_npu(), LLAMA, kv_dtype=kv_dtype):
        pass


def test_a_weight_too_large_for_float16_is_refused(make_npu: MakeNpu) -> None:
    arrays, formats, _ = stored(LLAMA, "f32")
    arrays["up"][1, 3, 5] = 1e6
    device = AscendDevice(make_npu().cann)
    with pytest.raises(DeviceError, match="up holds a weight of 1e\\+06, too large for float16"):
        AscendExecutor(ExecutorSetup(LLAMA, arrays, formats, block_count=8), device=device)
    device.close()


def test_a_matrix_of_the_wrong_shape_never_reaches_an_operator(make_npu: MakeNpu) -> None:
    arrays, formats, _ = stored(LLAMA, "q8")
    arrays["gate"] = arrays["gate"][:, :-1]
    device = AscendDevice(make_npu().cann)
    with pytest.raises(ValueError, match="gate"):
        AscendExecutor(ExecutorSetup(LLAMA, arrays, formats, block_count=4), device=device)
    device.close()


def test_a_predictor_for_another_shape_is_refused(make_npu: MakeNpu, launches: Launches) -> None:
    other = make_predictor(replace(RELU, ffn_size=RELU.ffn_size - 2), 8, 0, 0.0)
    with (
        pytest.raises(ValueError, match=f"{RELU.ffn_size} neurons"),
        executors(make_npu(launches=launches), RELU, predictor=other),
    ):
        pass


def test_a_batch_that_breaks_the_rules_is_refused(make_npu: MakeNpu) -> None:
    npu = make_npu()
    with executors(npu, LLAMA) as (ascend, _):
        calls = len(npu.calls)
        good = vars(make_batch([([1, 2], 0)], [[0]]))
        for field, value in (
            ("tokens", [1, LLAMA.vocab_size]),
            ("positions", [0, 16]),
            ("sequences", [0, 1]),
            ("block_tables", [[8]]),
            ("logit_rows", [2]),
            ("tokens", [1]),
        ):
            with pytest.raises(ValueError):
                ascend.forward(Batch(**{**good, field: np.array(value, np.int32)}))
        assert len(npu.calls) == calls


def test_a_closed_executor_says_so(make_npu: MakeNpu) -> None:
    with executors(make_npu(), LLAMA) as (ascend, _):
        ascend.close()
        ascend.close()
        with pytest.raises(ValueError, match="closed"):
            ascend.forward(make_batch([([1], 0)], [[0]]))
