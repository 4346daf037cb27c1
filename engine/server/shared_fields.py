"""Schemas of fields that all interfaces take, and that pass to the chat job as they are."""

from __future__ import annotations

from collections.abc import Mapping

from svdengine.server.body_schema import Schema, choice, either, flag, listing, mapping, number, text, whole

TEMPERATURE = number(0, 100)
TOP_P = number(0, 1)
TOP_K = whole(-1, 1 << 24)
SEED = whole(-(1 << 63), (1 << 64) - 1)
STOP = either(text(1), listing(text(1), longest=64))
PENALTY = number(-100, 100)
LENGTH = whole(1, 1 << 31)
SCHEMA = mapping()  # a JSON schema, which the grammar's compiler checks

# What no interface but our own has. They are taken by all.
OWN_FIELDS: Mapping[str, Schema] = {
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "top_n_sigma": number(0, 1000),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
    "repetition_penalty": number(0.01, 100),
    "repeat_last_n": whole(-1, 1 << 31),
    "dry_multiplier": number(0, 100),
    "dry_base": number(1, 100),
    "dry_allowed_length": whole(1, 1 << 16),
    "dry_penalty_last_n": whole(-1, 1 << 31),
    "dry_sequence_breakers": listing(text(1), longest=64),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "logit_bias": mapping(number(-100, 100)),
    "seed": SEED,
    "stop_token_ids": listing(whole(0, 1 << 31)),
    "ignore_eos": flag(),
    "sparsity_bias": number(-100, 100),
    "ffn": choice("dense", "exact", "sparse", "auto"),
    "context_shift": flag(),
    "chat_template_kwargs": mapping(),
}
