"""Typical sampling, top-n-sigma, XTC, DRY and the range of the penalties, each against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_tokenizer, write_tiny_model

from svdengine import load
from svdengine.errors import RequestError
from svdengine.scheduling.dry import dry_penalties
from svdengine.scheduling.filters import locally_typical, within_sigmas, without_top_choices
from svdengine.scheduling.sampler import Sampler, candidates
from svdengine.scheduling.sampling import SamplingParams

_weights = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30).map(lambda x: np.array(x, np.float64))
_tokens = st.lists(st.integers(0, 4), max_size=40)


@given(_weights, st.floats(0.01, 0.99))
def test_typical_keeps_those_of_the_most_usual_surprise(weights: np.ndarray, mass: float) -> None:
    ids = np.arange(len(weights)) + 100
    kept, of_kept = locally_typical(ids, weights, mass)
    p = weights / weights.sum()
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
    assert kept.tolist() == sorted(kept.tolist()) and np.array_equal(of_kept, weights[kept - 100])
    out = np.setdiff1d(np.arange(len(weights)), kept - 100)
    assert p[kept - 100].sum() >= mass - 1e-9
    assert not out.size or distance[out].min() >= distance[kept - 100].max() - 1e-9
    far = kept[np.argmax(distance[kept - 100])] - 100
    assert p[kept - 100].sum() - p[far] < mass + 1e-9  # not one token too many


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40), st.floats(0.1, 5))
def test_top_n_sigma(values: list[float], sigmas: float) -> None:
    logits = np.array(values, np.float32)
    kept = within_sigmas(logits, sigmas)
    bound = float(logits.max()) - sigmas * float(logits.astype(np.float64).std())
    assert int(logits.argmax()) in kept and np.array_equal(kept, np.flatnonzero(logits >= bound))
    hot, cold = (candidates(logits, SamplingParams(top_n_sigma=sigmas, temperature=t))[0].tolist() for t in (0.1, 4.0))
    assert hot == cold == kept.tolist()


def test_top_n_sigma_with_forbidden_tokens() -> None:
    logits = np.array([-np.inf, 3.0, 2.9, -5.0, -np.inf], np.float32)
    assert within_sigmas(logits, 1.0).tolist() == [1, 2]
    assert candidates(logits, SamplingParams(top_n_sigma=1.0, top_k=1))[0].tolist() == [1]


@given(_weights, st.floats(0.0, 1.0))
def test_xtc_leaves_the_least_of_the_top_choices(weights: np.ndarray, threshold: float) -> None:
    ids = np.arange(len(weights))
    p = weights / weights.sum()
    kept, of_kept = without_top_choices(ids, weights, threshold)
    above = np.flatnonzero(p >= threshold)
    assert np.array_equal(of_kept, weights[kept]) and len(kept) == len(ids) - max(len(above) - 1, 0)
    if len(above) > 1:
        assert p[np.intersect1d(kept, above)].tolist() == [p[above].min()]


def test_xtc_is_drawn_for() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    drawn = {
        chance: {
            Sampler(SamplingParams(xtc_probability=chance, xtc_threshold=0.05, seed=s), 3).sample(logits)
            for s in range(60)
        }
        for chance in (0.0, 1.0)
    }
    assert drawn == {0.0: {0, 1, 2}, 1.0: {2}}


def longest_repetition(tokens: list[int], follower: int, breakers: frozenset[int]) -> int:
    """How many of the last tokens stand somewhere before `follower`, by trying all."""
    best = 0
    for i in range(1, len(tokens)):
        if tokens[i] != follower:
            continue
        n = 0
        while n < i and tokens[i - 1 - n] == tokens[-1 - n] and tokens[-1 - n] not in breakers:
            n += 1
        best = max(best, n)
    return best


@given(_tokens, st.frozensets(st.integers(0, 4), max_size=2), st.integers(1, 4))
def test_dry_follows_its_definition(tokens: list[int], breakers: frozenset[int], allowed: int) -> None:
    found = dry_penalties(tokens, breakers, multiplier=0.5, base=2.0, allowed_length=allowed)
    expected = {}
    for token in set(tokens) - breakers:
        length = longest_repetition(tokens, token, breakers)
        if length >= allowed:
            expected[token] = 0.5 * 2.0 ** (length - allowed)
    assert found == expected


def test_dry_of_one_token_over_and_over_is_bounded() -> None:
    found = dry_penalties([7] * 5000, frozenset(), multiplier=1.0, base=1.75, allowed_length=2)
    assert list(found) == [7] and found[7] == 1.75**62 and np.isfinite(np.float32(found[7]))
    assert dry_penalties([], frozenset(), multiplier=1.0, base=2.0, allowed_length=2) == {}


def test_dry_ends_a_loop(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "tiny.svdp"), device="reference") as llm:

        def said(**fields: Any) -> list[int]:
            [done] = llm.generate("hello hello hello", temperature=0.0, max_tokens=60, ignore_eos=True, **fields)
            return done.token_ids

        def most(tokens: list[int]) -> int:
            triples = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
            return max(map(triples.count, triples))

        assert most(said()) > 3 and most(said(dry_multiplier=10.0, dry_sequence_breakers=())) <= 3
        assert said(dry_multiplier=10.0, dry_penalty_last_n=0) == said()


def test_breakers_are_tokens_with_their_text() -> None:
    tokenizer = make_tokenizer("byte_level")
    found = tokenizer.tokens_with(["\n", ":"])
    assert {tokenizer.encode("\n")[-1], tokenizer.encode("a:")[-1]} <= found
    assert tokenizer.encode("hello")[0] not in found and tokenizer.tokens_with([]) == frozenset()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=12), st.integers(-1, 15))
def test_penalties_look_back_on_the_last_tokens(prompt: list[int], said: list[int], last: int) -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, repeat_last_n=last, temperature=0.0
    )
    sampler = Sampler(params, 10, prompt)
    for token in said:  # each is made the likeliest
        assert sampler.sample(np.where(np.arange(10) == token, 1e6, 1.0).astype(np.float32)) == token
    logits = np.ones(10, np.float32)
    found = sampler._adjust(logits) if last else logits
    everything = prompt + said
    window = everything if last < 0 else everything[len(everything) - min(last, len(everything)) :]
    of_answer = said if last < 0 else said[len(said) - min(last, len(said)) :]
    for token in range(10):
        value = 0.5 if token in window else 1.0
        count = of_answer.count(token)
        assert found[token] == pytest.approx(value - 0.5 * (count > 0) - 0.25 * count)


@pytest.mark.parametrize(
    "fields",
    [
        *({"typical_p": 0.0}, {"typical_p": 1.5}, {"top_n_sigma": -1}, {"xtc_probability": 2}, {"xtc_threshold": -0.1}),
        *({"repeat_last_n": -2}, {"repeat_last_n": 1.5}, {"dry_multiplier": -1}, {"dry_base": 0.5}, {"dry_base": None}),
        *({"dry_allowed_length": 0}, {"dry_penalty_last_n": -2}, {"dry_sequence_breakers": [""]}),
        {"dry_sequence_breakers": 3},
    ],
)
def test_what_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "fields", [{"typical_p": 0.9}, {"top_n_sigma": 1.0}, {"xtc_probability": 0.5}, {"dry_multiplier": 0.8}]
)
def test_a_device_leaves_them_to_the_host(fields: dict[str, Any]) -> None:
    assert Sampler(SamplingParams(), 10).choice() is not None
    assert Sampler(SamplingParams(**fields), 10).choice() is None
