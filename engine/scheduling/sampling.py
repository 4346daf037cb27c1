"""Sampling parameters: what a request may ask for, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_args

from svdengine.errors import RequestError, shown
from svdengine.kernels.executor import FfnMode
from svdengine.scheduling.numbers import check_integer, check_number
from svdengine.text.grammar import Grammar, read_response_format

MAX_LOGPROBS = 100
MAX_STOP_STRINGS = 64
MAX_PRIORITY = 1 << 31
MAX_SPARSITY_BIAS = 100.0  # in standard deviations of a neuron's gate
MAX_LOGIT_BIAS = 1e30  # float32 ends soon after; its negative forbids a token, and so does minus infinity
RANDOM_SEED = -1  # as llama.cpp and its clients write "no seed"
DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's

_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (0.0, 1000.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 100.0),
}


class SamplingFields(TypedDict, total=False):
    """The fields of `SamplingParams` as they may be given, to it or to a method of `LLM`; all may be left out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: str | Iterable[str]
    logit_bias: Mapping[int, float]
    seed: int | None
    max_tokens: int | None
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    logprobs: int | None
    ignore_eos: bool
    response_format: Grammar | Mapping[str, Any] | None
    sparsity_bias: float
    ffn: FfnMode | None
    priority: int


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, when generation ends, and who waits. Raises RequestError on a field that is out of range.

    The logits of a step are changed in this order, in the manner of Hugging Face: repetition penalty, presence and
    frequency penalties, DRY, logit bias, top-n-sigma, temperature, top-k, typical, top-p, min-p, XTC.

    temperature: divides the logits. 0: the likeliest token is taken (greedy), and what follows it above does nothing.
    top_k: keep the k likeliest tokens; 0: all.
    top_p: keep the likeliest tokens up to and with the one that brings their sum to top_p, above 0; 1: all.
    min_p: drop tokens less likely than min_p times the likeliest; 0: none.
    typical_p: keep the tokens whose surprise is nearest to the mean, up to this sum of probabilities; 1: all.
    top_n_sigma: keep tokens whose logit is within so many standard deviations of the largest; 0: all.
    xtc_probability: how often all but the least likely of the tokens above xtc_threshold are dropped; 0: never.
    xtc_threshold: probability from which a token counts as a top choice; above 0.5 nothing is ever dropped.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen, prompt included; 1: none.
    repeat_last_n: tokens that the three penalties look back on; -1: all; 0: none, which switches them off.
    presence_penalty: subtracted once from the logits of tokens that were generated.
    frequency_penalty: subtracted from a token's logit for every time that it was generated.
    dry_multiplier: subtracted from the logit of a token that would go on with a repetition (dry.py); 0: nothing is.
    dry_base: what that is multiplied by for each further token of the repetition.
    dry_allowed_length: tokens that may be repeated for nothing.
    dry_penalty_last_n: tokens that it looks back on, prompt included; -1: all.
    dry_sequence_breakers: texts whose tokens end a repetition.
    logit_bias: token id to what is added to its logit.
    seed: the same one gives the same tokens. None, or -1: another one for each request.
    max_tokens: most tokens to generate. None: as many as the context has room for.
    stop: generation ends before the first of these texts. A single string is taken too.
    stop_token_ids: tokens that end generation, like the model's own end tokens.
    logprobs: give log-probabilities of the chosen and of this many likeliest tokens, 0 to 100. None: give none.
    ignore_eos: the model's end tokens do not end generation.
    response_format: what the text must keep to: JSON, or a JSON schema, as OpenAI's API has it ({"type":
        "json_object"}), or a Grammar. None, or {"type": "text"}: any text.
    sparsity_bias: shifts the sparsity predictor's thresholds, in standard deviations of a neuron's gate; above 0:
        fewer neurons are computed.
    ffn: how the FFNs of this request run: "dense", "exact", "sparse" or "auto". None: as those of the model do.
    priority: requests that wait for each other go lower numbers first, equal ones in order of arrival.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0
    repeat_last_n: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = DRY_BREAKERS
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # a dict, which has no hash
    seed: int | None = None
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    response_format: Grammar | None = None
    sparsity_bias: float = 0.0
    ffn: FfnMode | None = None
    priority: int = 0

    if TYPE_CHECKING:  # more can be given than the fields hold: __post_init__ converts it

        def __init__(self, **fields: Unpack[SamplingFields]) -> None: ...

    def __post_init__(self) -> None:
        if type(self.seed) is int and self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "response_format", read_response_format(self.response_format))
        check_integer("top_k", self.top_k, 0, 1 << 24)
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high)
        for name in ("repeat_last_n", "dry_penalty_last_n"):
            check_integer(name, getattr(self, name), -1, 1 << 31)
        check_integer("dry_allowed_length", self.dry_allowed_length, 1, 1 << 16)
        object.__setattr__(self, "dry_sequence_breakers", _strings("dry_sequence_breakers", self.dry_sequence_breakers))
        check_sparsity_bias(self.sparsity_bias)
        if self.ffn is not None and self.ffn not in get_args(FfnMode):
            raise RequestError(f"ffn must be one of {', '.join(get_args(FfnMode))}, found {shown(self.ffn)}")
        check_integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0.0:
                raise RequestError(f"{name} must be above 0; use temperature 0 for greedy decoding")
        if self.seed is not None:
            check_integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, 1 << 31)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be true or false, found {shown(self.ignore_eos)}")

    @property
    def grammar(self) -> Grammar | None:
        """What the text must keep to."""
        return self.response_format

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def merge_params(base: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    """`base` with the named fields changed. Raises RequestError on a name that is no sampling parameter."""
    known = {f.name for f in fields(SamplingParams)}
    for name in changes:
        if name not in known:
            raise RequestError(f"{name!r} is not a sampling parameter; there are {', '.join(sorted(known))}")
    return replace(base, **changes) if changes else base


# What llama.cpp samples with when it is not told.
UNSTATED: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


_OF_A_FILE: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_OF_A_FILE += ("repeat_last_n", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n")


def params_from_generation(generation: Mapping[str, Any]) -> SamplingParams:
    """The defaults that a model's generation_config.json states; entries that are unknown or unusable are left out.

    A model that says nothing of sampling gets `UNSTATED`: small models ramble when they sample freely.
    """
    if generation.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    if not any(generation.get(name) is not None for name in ("temperature", "top_k", "top_p", "min_p")):
        generation = {**UNSTATED, **generation}
    params = SamplingParams()
    for name in _OF_A_FILE:
        if generation.get(name) is None:
            continue
        try:
            params = replace(params, **{name: generation[name]})
        except RequestError:
            continue
    return params


def check_sparsity_bias(value: Any) -> None:
    """Raise RequestError unless it is a number that a threshold can be shifted by."""
    check_number("sparsity_bias", value, -MAX_SPARSITY_BIAS, MAX_SPARSITY_BIAS)


def _strings(name: str, given: Any) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if any(not isinstance(s, str) or not s for s in strings):
        raise RequestError(f"{name} must be strings that are not empty, found {shown(given)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings can be given as {name}, found {len(strings)}")
    return strings


def _token_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise RequestError(f"stop_token_ids must be token ids, found {shown(ids)}")
    values = tuple(ids)
    for value in values:
        check_integer("stop_token_ids", value, 0, 1 << 31)
    return values


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, found {shown(bias)}")
    for token, value in bias.items():
        check_integer("a token id of logit_bias", token, 0, 1 << 31)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MAX_LOGIT_BIAS:  # False of NaN
            raise RequestError(
                f"logit_bias of token {token} must be a number of at most {MAX_LOGIT_BIAS:g}, found {shown(value)}"
            )
    return {token: float(v if v == -math.inf else max(v, -MAX_LOGIT_BIAS)) for token, v in bias.items()}
