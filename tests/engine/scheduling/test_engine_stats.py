"""The engine's counters, against what its executor saw."""

import pytest
from tiny_model import FakeExecutor

from svdengine.kernels.executor import FfnMode
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation, Scoring
from svdengine.scheduling.sampling import SamplingParams


def request(prompt: list[int], max_tokens: int, priority: int = 0, ffn: FfnMode | None = None) -> Generation:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, priority=priority, ffn=ffn)
    return Generation(prompt, params, vocab_size=50, end_tokens=frozenset(), limit=ContextLimit(128), decoder=None)


def test_counters() -> None:
    executor = FakeExecutor(8, 64)
    engine = Engine(executor)
    first, second = request([1] * 40, 10), request([2] * 20, 5)
    for one in (first, second):
        engine.add(one)
    assert engine.stats().waiting == 2
    engine.step()
    now = engine.stats()
    assert (now.waiting, now.running, now.blocks_used, now.blocks_cached, now.blocks_free) == (0, 2, 5, 0, 3)
    assert (now.steps, now.rows, now.prompt_tokens, now.generated_tokens) == ({"dense": 1}, {"dense": 60}, 60, 2)
    while not first.done:
        engine.step()
    now = engine.stats()
    assert (now.running, now.blocks_used, now.blocks_cached, now.blocks_free) == (0, 0, 4 + 2, 2)
    assert now.generated_tokens == 15 and now.prompt_tokens == 60 and now.preemptions == 0
    assert now.rows["dense"] == executor.rows == 60 + 9 + 4

    engine.set_ffn("sparse")
    assert engine.stats().blocks_cached == 0
    for _ in range(2):
        engine.add(again := request([1] * 40, 1))
        while not again.done:
            engine.step()
    engine.add(scoring := Scoring([3] * 5, 50, 128))
    engine.step()
    assert scoring.done
    now = engine.stats()
    assert now.prefix_hit_tokens == 39
    assert now.steps == {"dense": executor.steps - 3, "predict": 3}
    assert now.rows["predict"] == 40 + 1 + 5
    assert now.generated_tokens == 17


def test_preemptions_are_counted() -> None:
    engine = Engine(FakeExecutor(4, 64))
    requests = [request([1] * 40, 64), request([2] * 40, 64, priority=-1)]
    for one in requests:
        engine.add(one)
        engine.step()
    while not all(one.done for one in requests):
        engine.step()
    assert engine.stats().preemptions == 1


def test_requests_that_choose_a_path_take_turns_and_share_nothing_computed_by_another() -> None:
    """The executor itself checks that what a step reads was computed by the step's path."""
    executor = FakeExecutor(32, 64)
    engine = Engine(executor)
    paths: list[FfnMode | None] = [None, "sparse", "dense", "sparse"]
    requests = [request([1] * 40, 10, ffn=ffn) for ffn in paths]
    for one in requests:
        engine.add(one)
    while not all(one.done for one in requests):
        engine.step()
        assert executor.ffn == "dense"
    assert len({tuple(one.token_ids) for one in requests}) == 1
    assert {path: rows > 40 for path, rows in engine.stats().rows.items()} == {"dense": True, "predict": True}
    assert [one.completion().stats.active_density for one in requests] == [None, 0.2, None, 0.2]


def test_a_failing_step_leaves_the_path_as_it_was() -> None:
    executor = FakeExecutor(8, 64)
    engine = Engine(executor)
    engine.add(request([1] * 4, 4, ffn="sparse"))
    executor.fail = True
    with pytest.raises(RuntimeError, match="on fire"):
        engine.step()
    assert executor.ffn == "dense"


def test_neurons_by_layer_come_with_each_token_where_they_are_wanted() -> None:
    engine = Engine(FakeExecutor(8, 64))
    wanted, other, dense = request([1] * 20, 3, ffn="sparse"), request([2] * 9, 3, ffn="sparse"), request([3] * 5, 3)
    wanted.by_layer = dense.by_layer = True
    for one in (wanted, other, dense):
        engine.add(one)
    while not all(one.done for one in (wanted, other, dense)):
        engine.step()
    assert [layers is not None and layers.tolist() for layers in wanted.layers] == [
        [[87, 58, 290]],  # the prompts of both
        [[6, 4, 20]],
        [[6, 4, 20]],
    ]
    assert list(other.layers) == [] and list(dense.layers) == [None, None, None]
