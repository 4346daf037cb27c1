"""How tokens are chosen, from the body of a request."""

from __future__ import annotations

from typing import Any

from svdengine.errors import RequestError
from svdengine.scheduling.sampling import RANDOM_SEED, SamplingParams, merge_params
from svdengine.server.api_error import ApiError
from svdengine.server.body import Body

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20

_ID_DIGITS = 10  # of a token id

# Those of OpenAI first; then those that other servers have as well.
_FIELDS: tuple[str, ...] = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop")
_FIELDS += ("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "sparsity_bias", "ffn")
_FIELDS += ("typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "repeat_last_n", "dry_multiplier")
_FIELDS += ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers")


_NEUTRAL: dict[str, Any] = {
    "min_tokens": 0,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}


def take_sampling(body: Body, base: SamplingParams) -> SamplingParams:
    """`base` with what the body says. Raises ApiError, which names the field that is unusable."""
    fields = {name: body.take_any(name) for name in _FIELDS}
    fields |= _plain_meaning(fields)
    fields["seed"] = _seed(body.take("seed", int))
    fields["logit_bias"] = _logit_bias(body.take("logit_bias", dict))
    params = base
    for name, value in fields.items():
        if value is not None:
            params = changed(params, name, value)
    return params


def take_neutral(body: Body) -> None:
    """Fields of other servers that we have not, with the value that changes nothing: programs send them all."""
    for name, value in _NEUTRAL.items():
        body.only(name, value)


def take_length(params: SamplingParams, value: Any, field: str = "max_tokens") -> SamplingParams:
    """`params` with the length limit of a body. None, and -1: as many tokens as the context has room for."""
    return changed(params, "max_tokens", None if _is(value, -1) else value, field)


def changed(params: SamplingParams, name: str, value: Any, field: str | None = None) -> SamplingParams:
    """`params` with one value changed; `field`: what the body calls it."""
    try:
        return merge_params(params, {name: value})
    except RequestError as error:
        raise ApiError(400, str(error), field or name, "invalid_value") from error


def take_choices(body: Body) -> int:
    """How many completions of a prompt are wanted."""
    choices = body.take("n", int, 1)
    if not 1 <= choices <= MAX_CHOICES:
        raise ApiError(400, f"n must lie between 1 and {MAX_CHOICES}, found {choices}", "n", "invalid_value")
    return choices


def choice_params(params: SamplingParams, choice: int) -> SamplingParams:
    """Parameters of one of several choices: with a seed, each has its own, so that they differ and repeat."""
    if params.seed is None or choice == 0:
        return params
    return merge_params(params, {"seed": (params.seed + choice) % (1 << 64)})


def _plain_meaning(fields: dict[str, Any]) -> dict[str, Any]:
    """Values that other servers take too, as what they say: top_k -1 is all tokens, top_p 0 is the likeliest only."""
    said: dict[str, Any] = {}
    if _is(fields["top_k"], -1):
        said["top_k"] = 0
    if _is(fields["top_p"], 0):
        said |= {"top_p": None, "top_k": 1}
    return said


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == number


def _seed(seed: int | None) -> int | None:
    return seed if seed in (None, RANDOM_SEED) else seed % (1 << 64)  # clients send signed numbers


def _logit_bias(bias: dict[str, Any] | None) -> dict[int, Any] | None:
    if bias is None:
        return None
    if not all(token.isascii() and token.isdecimal() and len(token) <= _ID_DIGITS for token in bias):
        raise ApiError(400, "logit_bias must map token ids to numbers", "logit_bias", "invalid_value")
    return {int(token): value for token, value in bias.items()}
