"""Options on how tokens are sampled, and what an answer must keep to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svdengine.commands.arguments import Number, check_extra
from svdengine.commands.help_pages import SAMPLING, option
from svdengine.commands.options import SPARSITY_BIAS, Decorator, apply, read_text

OWN = "[default: the model's own, else"
_REAL = Number()


def _sampling(names: str, kind: Any, metavar: str, text: str, others: str = "", **more: Any) -> Decorator:
    """An option that takes a value. Names are separated by spaces; `others` are those of other programs."""
    more |= {"type": kind, "metavar": metavar, "help": text}
    return option(*names.split(), other_names=tuple(others.split()), group=SAMPLING, **more)


def _sampling_flag(name: str, text: str) -> Decorator:
    return option(name, group=SAMPLING, is_flag=True, help=text)


_SAMPLING_OPTIONS: tuple[Decorator, ...] = (
    _sampling(
        *("-n --max-tokens", int, "N", "Most tokens to generate.  [default: 256; in a chat, what the context holds]"),
        "--n-predict --max-new-tokens",
    ),
    _sampling("--temperature", _REAL, "T", f"0 takes the likeliest token.  {OWN} 0.8]", "--temp"),
    _sampling("--top-k", int, "K", f"Sample among the K likeliest tokens; 0: among all.  {OWN} 40]"),
    _sampling("--top-p", _REAL, "P", f"Sample among the likeliest tokens that make up P.  {OWN} 0.95]"),
    _sampling("--min-p", _REAL, "P", f"Drop tokens less likely than P times the likeliest.  {OWN} 0.05]"),
    _sampling(
        *("--typical-p", _REAL, "P"),
        "Sample among the tokens of the most usual surprise that make up P.  [default: 1, off]",
        "--typical",
    ),
    _sampling(
        *("--top-n-sigma", _REAL, "N"),
        "Keep logits within N standard deviations of the largest.  [default: 0, off]",
        "--top-nsigma",
    ),
    _sampling(
        *("--xtc-probability", _REAL, "P"),
        "How often to drop all but the last of the tokens above --xtc-threshold.  [default: 0, off]",
    ),
    _sampling("--xtc-threshold", _REAL, "P", "Probability from which a token counts for it.  [default: 0.1]"),
    _sampling(
        *("--repetition-penalty", _REAL, "R"),
        f"Above 1: tokens seen become less likely.  {OWN} 1]",
        "--repeat-penalty",
    ),
    _sampling("--repeat-last-n", int, "N", "Tokens that penalties look back on; -1: all.  [default: -1]"),
    _sampling("--presence-penalty", _REAL, "X", "Taken once from logits of generated tokens.  [default: 0]"),
    _sampling("--frequency-penalty", _REAL, "X", "Taken for every time that a token came.  [default: 0]"),
    _sampling(
        *("--dry-multiplier", _REAL, "X"),
        "Penalty on tokens that would go on with a repetition of several tokens.  [default: 0, off]",
    ),
    _sampling("--dry-base", _REAL, "X", "How it grows with each token of the repetition.  [default: 1.75]"),
    _sampling("--dry-allowed-length", int, "N", "Tokens that may be repeated without it.  [default: 2]"),
    _sampling("--dry-penalty-last-n", int, "N", "Tokens that it looks back on; -1: all.  [default: -1]"),
    _sampling(
        *("--dry-sequence-breaker", str, "TEXT"),
        "Text that ends a repetition. Repeatable; none: nothing does.  [default: line break, colon, quote, star]",
        multiple=True,
    ),
    _sampling("--logit-bias", str, "ID=X", "Add X to the logit of a token. Repeatable.", multiple=True),
    _sampling("-s --seed", int, "N", "The same seed gives the same text.  [default: another each time]"),
    _sampling("--stop", str, "TEXT", "End before this text. Repeatable.", multiple=True),
    _sampling_flag("--ignore-eos", "Go on after the model's end token."),
    SPARSITY_BIAS,
)

_FIELDS: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma")
_FIELDS += ("xtc_probability", "xtc_threshold", "repetition_penalty", "repeat_last_n")
_FIELDS += ("presence_penalty", "frequency_penalty", "seed", "max_tokens", "sparsity_bias")
_FIELDS += ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n")


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `sampling_fields`."""
    return apply(_SAMPLING_OPTIONS, function)


def context_shift_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --context-shift."""
    return _sampling_flag("--context-shift", "Forget the oldest half of a full context, instead of ending.")(function)


def grammar_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what an answer must keep to, which `sampling_fields` reads."""
    options: tuple[Decorator, ...] = (
        _sampling("-j --json-schema", str, "JSON", "Answer in JSON of this schema: JSON, or @FILE; {}: any."),
        _sampling("--grammar", str, "TEXT", "Answer as this grammar says, in llguidance's Lark, or @FILE."),
    )
    return apply(options, function)


def sampling_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams that were given on the command line; the others stay the model's own."""
    fields = {name: options[name] for name in _FIELDS if options[name] is not None}
    if options["stop"]:
        fields["stop"] = options["stop"]
    if options["logit_bias"]:
        fields["logit_bias"] = dict(_bias(text) for text in options["logit_bias"])
    if options["ignore_eos"]:
        fields["ignore_eos"] = True
    if options["dry_sequence_breaker"]:
        fields["dry_sequence_breakers"] = [text for text in options["dry_sequence_breaker"] if text != "none"]
    grammar = _grammar(options.get("json_schema"), options.get("grammar"))
    if grammar is not None:
        fields["response_format"] = grammar
    return fields


def _grammar(schema: str | None, grammar: str | None) -> Any:
    """What --json-schema or --grammar asks for. Raises SvdEngineError where llguidance is missing."""
    if schema is None and grammar is None:
        return None
    if schema is not None and grammar is not None:
        raise click.UsageError("--json-schema and --grammar say different things of the answer; give one of them")
    check_extra("grammar", "llguidance")
    from svdengine.text.grammar import Grammar, json_grammar

    if grammar is not None:
        return Grammar("lark", _text_or_file(grammar))
    try:
        value = json.loads(_text_or_file(schema or ""))
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is no JSON: {error}", param_hint="--json-schema") from None
    if not isinstance(value, dict):
        raise click.BadParameter("a schema is a JSON object, such as {}", param_hint="--json-schema")
    return json_grammar(value)


def _text_or_file(value: str) -> str:
    return read_text(Path(value[1:])) if value.startswith("@") else value


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise click.BadParameter(f"expected ID=X, such as 42=-5, found {text!r}", param_hint="--logit-bias") from None
