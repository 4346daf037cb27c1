"""Sampling: each filter against its definition, and the same seed gives the same tokens."""

import dataclasses
import math
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdengine.errors import RequestError, SvdEngineError
from svdengine.scheduling.sampler import Sampler, candidates, token_logprobs
from svdengine.scheduling.sampling import SamplingFields, SamplingParams, merge_params, params_from_generation

_logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@settings(deadline=None)
@given(
    _logits,
    st.integers(0, 45),
    st.floats(0.01, 0.999) | st.just(1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 5.0),
)
def test_filters_follow_their_definition(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = np.round(logits, 3)  # closer ones may have the same probability
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, weights = candidates(logits, params)
    probabilities = softmax(logits, temperature)
    assert len(set(tokens.tolist())) == len(tokens) >= 1
    assert np.allclose(weights / weights.sum(), probabilities[tokens] / probabilities[tokens].sum())

    # One after the other, on the whole sorted vocabulary.
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        order = order[:top_k]
    kept = probabilities[order] / probabilities[order].sum()
    if top_p < 1.0:
        order = order[: int((np.cumsum(kept) < top_p - 1e-12).sum()) + 1]
    likely = probabilities[order] >= min_p * probabilities[order].max()
    # Where rounding decides, the borderline token may be on either side.
    assert abs(int(likely.sum()) - len(tokens)) <= 1
    assert set(tokens.tolist()) <= set(order[likely].tolist()) or set(tokens.tolist()) >= set(order[likely].tolist())


@given(_logits, st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_set_with_that_mass(logits: np.ndarray, top_p: float) -> None:
    tokens, _ = candidates(logits, SamplingParams(top_p=top_p))
    mass = softmax(logits, 1.0)[tokens]
    assert mass.sum() >= top_p - 1e-9
    assert mass[:-1].sum() < top_p + 1e-9


def test_top_p_widens_its_search_over_a_large_vocabulary() -> None:
    logits = np.zeros(5000, np.float32)
    tokens, _ = candidates(logits, SamplingParams(top_p=0.9))
    assert len(tokens) in (4500, 4501)
    assert tokens.tolist() == list(range(len(tokens)))


def test_equal_logits_are_taken_in_order() -> None:
    tokens, _ = candidates(np.array([1, 2, 2, 2, 0], np.float32), SamplingParams(top_k=2))
    assert tokens.tolist() == [1, 2]


@given(_logits, st.integers(0, 2**64 - 1))
def test_the_same_seed_gives_the_same_tokens(logits: np.ndarray, seed: int) -> None:
    def draw(disturbed: bool) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, top_p=0.9), len(logits))
        other = Sampler(SamplingParams(seed=1), len(logits))
        tokens = []
        for _ in range(10):
            tokens.append(sampler.sample(logits))
            if disturbed:
                other.sample(logits)
                np.random.random()
        return tokens

    assert draw(False) == draw(True)


def test_frequencies_are_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for params in (SamplingParams(seed=0), SamplingParams(seed=0, top_k=3), SamplingParams(seed=0, temperature=2.0)):
        sampler = Sampler(params, 4)
        counts = np.bincount([sampler.sample(logits) for _ in range(20000)], minlength=4) / 20000
        expected = softmax(logits, params.temperature)
        expected[params.top_k or 4 :] = 0
        assert np.abs(counts - expected / expected.sum()).max() < 0.015


@pytest.mark.parametrize("forbidden", [-1e39, -(10**400)])
def test_a_forbidden_token_never_comes_and_logits_stay_finite(forbidden: float) -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    params = SamplingParams(logit_bias={0: forbidden, 2: forbidden}, seed=1, temperature=100.0)
    assert {Sampler(params, 3).sample(logits) for _ in range(20)} == {1}
    every = SamplingParams(logit_bias=dict.fromkeys(range(3), forbidden), temperature=0.0)
    assert Sampler(every, 3).sample(logits) in range(3)


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_means_another_one_each_time(seed: int | None) -> None:
    logits = np.zeros(1000, np.float32)
    assert len({Sampler(SamplingParams(seed=seed), 1000).sample(logits) for _ in range(5)}) > 1


def test_greedy_takes_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, top_k=3, seed=3), 4)
    assert [sampler.sample(np.array([0, 3, 3, 1], np.float32)) for _ in range(3)] == [1, 1, 1]


def test_penalties() -> None:
    logits = np.array([2.0, -2.0, 1.9, 0.0], np.float32)

    def second(**fields: Any) -> int:
        sampler = Sampler(SamplingParams(temperature=0.0, **fields), 4, prompt=fields.pop("prompt", ()))
        sampler.sample(logits)
        return sampler.sample(logits)

    assert second() == 0
    assert second(presence_penalty=0.2) == 2
    assert second(frequency_penalty=0.2) == 2
    assert second(repetition_penalty=1.5) == 2
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=1.5), 4, prompt=[0, 1])
    assert sampler.sample(logits) == 2
    assert logits.tolist() == pytest.approx([2.0, -2.0, 1.9, 0.0])


def test_frequency_penalty_grows_and_presence_does_not() -> None:
    logits = np.array([3.0, 0.0], np.float32)
    frequency = Sampler(SamplingParams(temperature=0.0, frequency_penalty=1.0), 2)
    assert [frequency.sample(logits) for _ in range(5)] == [0, 0, 0, 0, 1]
    presence = Sampler(SamplingParams(temperature=0.0, presence_penalty=1.0), 2)
    assert [presence.sample(logits) for _ in range(5)] == [0] * 5


def test_logit_bias() -> None:
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={2: 5.0}), 3).sample(logits) == 2
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={0: -math.inf}), 3).sample(logits) == 1
    with pytest.raises(RequestError, match="names token 3, but the vocabulary has 3"):
        Sampler(SamplingParams(logit_bias={3: 1.0}), 3)
    everything = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(3), -math.inf))
    with pytest.raises(SvdEngineError, match="not finite"):
        Sampler(everything, 3).sample(logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(SvdEngineError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), 3).sample(logits)


@given(_logits, st.integers(0, 20))
def test_logprobs(logits: np.ndarray, top: int) -> None:
    found = token_logprobs(logits, 0, top)
    expected = np.log(softmax(logits, 1.0))
    assert found.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [t for t, _ in found.top] == np.argsort(-logits, kind="stable")[:top].tolist()
    assert [p for _, p in found.top] == pytest.approx(expected[[t for t, _ in found.top]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must lie between 0 and 100"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -2}, "seed"),
        ({"seed": 10**400}, "seed must lie between"),
        ({"temperature": 10**400}, "temperature must lie between"),
        ({"top_k": -(10**5000)}, "top_k must lie between"),
        ({"max_tokens": 10**5000}, "a number of 16610 bits"),
        ({"stop_token_ids": [10**400]}, "stop_token_ids must lie"),
        ({"stop": [10**5000]}, "stop must be strings"),
        ({"logit_bias": {10**400: 1}}, "a token id of logit_bias"),
        ({"logit_bias": {1: 10**400}}, "logit_bias of token 1"),
        ({"logit_bias": {1: 1e39}}, "logit_bias of token 1"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1"),
        ({"priority": 0.5}, "priority must be a whole number"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": "ab"}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": 101}, "logprobs"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
    ],
)
def test_unusable_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_parameters_are_made_uniform() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
    assert merge_params(params, {"top_k": 3}).top_k == 3
    with pytest.raises(RequestError, match="'topk' is not a sampling parameter"):
        merge_params(params, {"topk": 3})


def test_equal_parameters_have_equal_hashes() -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    given: list[SamplingFields] = [
        {},
        {"temperature": 0, "seed": 3, "stop": ["a", "b"], "stop_token_ids": [1], "logprobs": 2, "ignore_eos": True},
        {"logit_bias": {2: 1.0, 1: -1.0}},
        {"response_format": schema},
    ]
    once, again = [SamplingParams(**f) for f in given], [SamplingParams(**f) for f in given]
    again[2] = SamplingParams(logit_bias={1: -1, 2: 1})
    assert once == again and [hash(p) for p in once] == [hash(p) for p in again]
    assert len({*once, *again}) == len(given)


def test_what_may_be_given_is_the_fields() -> None:
    """For type checkers SamplingFields has the types of SamplingParams, but for those that are converted."""
    given, held = get_type_hints(SamplingFields), get_type_hints(SamplingParams)
    assert list(given) == [f.name for f in dataclasses.fields(SamplingParams)]
    converted = {name for name in given if given[name] != held[name]}
    assert converted == {"stop", "stop_token_ids", "response_format", "dry_sequence_breakers"}


def test_generation_defaults() -> None:
    assert params_from_generation({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}).top_p == 0.9
    assert params_from_generation({"do_sample": False, "temperature": 0.6}).greedy
    assert params_from_generation({"temperature": "x", "top_k": -5, "top_p": None}) == SamplingParams()
    unstated = params_from_generation({"repetition_penalty": 1.1})
    assert (unstated.temperature, unstated.top_k, unstated.repetition_penalty) == (0.8, 40, 1.1)
