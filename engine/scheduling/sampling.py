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


class SamplingFields(TypedDict, total=False):
    """The fields of `SamplingParams` as they may be given, to it or to a method of `LLM`; all may be left out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
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

    The logits of a step are changed in this order, which is that of Hugging Face: repetition penalty, presence and
    frequency penalties, logit bias, temperature, top-k, top-p, min-p.

    temperature: divides the logits. 0: the likeliest token is taken (greedy), and top_k, top_p and min_p do nothing.
    top_k: keep the k likeliest tokens; 0: all.
    top_p: keep the likeliest tokens up to and with the one that brings their sum to top_p, above 0; 1: all.
    min_p: drop tokens less likely than min_p times the likeliest; 0: none.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen, prompt included; 1: none.
    presence_penalty: subtracted once from the logits of tokens that were generated.
    frequency_penalty: subtracted from a token's logit for every time that it was generated.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "response_format", read_response_format(self.response_format))
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_integer("top_k", self.top_k, 0, 1 << 24)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        check_number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        check_sparsity_bias(self.sparsity_bias)
        if self.ffn is not None and self.ffn not in get_args(FfnMode):
            raise RequestError(f"ffn must be one of {', '.join(get_args(FfnMode))}, found {shown(self.ffn)}")
        check_integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.top_p == 0.0:
            raise RequestError("top_p must be above 0; use temperature 0 for greedy decoding")
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


def params_from_generation(generation: Mapping[str, Any]) -> SamplingParams:
    """The defaults that a model's generation_config.json states; entries that are unknown or unusable are left out.

    A model that says nothing of sampling gets `UNSTATED`: small models ramble when they sample freely.
    """
    if generation.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    if not any(generation.get(name) is not None for name in ("temperature", "top_k", "top_p", "min_p")):
        generation = {**UNSTATED, **generation}
    params = SamplingParams()
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
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


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if any(not isinstance(s, str) or not s for s in strings):
        raise RequestError(f"stop must be strings that are not empty, found {shown(stop)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings can be given, found {len(strings)}")
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
