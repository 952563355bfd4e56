"""The sizes in a model's config.json, and a refusal of impossible ones. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief

# Keys in a config.json for the number of blocks, and for other sizes that every model has.
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS, SHARED_HEADS = ("num_attention_heads", "n_head"), "num_key_value_heads"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token")  # number of experts per token
WINDOW = "sliding_window"  # attention window in tokens; Qwen 2's files have a number and use_sliding_window: false
SIZES = (*DEPTHS, *WIDTHS, *HEADS, SHARED_HEADS, "vocab_size")
DEFAULTED = (*DEPTHS, *WIDTHS, *HEADS, "vocab_size", "intermediate_size")  # have defaults if a config.json omits them
ZERO = (*HEADS, SHARED_HEADS)  # may be 0 for a model without attention


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json about the language model."""
    own = config.get("text_config")
    return own if own and isinstance(own, dict) else config


def must_be(file: Path, key: str, what: str, value: Any, why: str = "") -> InputError:
    """The error about a key: the required value, the actual value, and optionally the reason."""
    told = brief(json.dumps(value, ensure_ascii=False), 80)
    return InputError(f"{key} in {file} must be {what}. Got {told} instead{why and f': {why}'}.")


def first_size(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int] | None:
    """The first of these keys that is an integer, with its value."""
    return next(((key, config[key]) for key in keys if type(config.get(key)) is int), None)


def may_be_size(value: Any, least: int) -> bool:
    """Whether a value may be a size of a model: null is the class's default, a list has one entry per layer."""
    return value is None or isinstance(value, (list, dict)) or (type(value) is int and value >= least)


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise InputError for an impossible size in a config.json. config: the object in the file."""
    if config.get("text_config") is not None and not isinstance(config["text_config"], dict):
        raise must_be(file, "text_config", "an object", config["text_config"])
    config = language_config(config)
    for key in SIZES:
        if not may_be_size(config.get(key), least=0 if key in ZERO else 1):
            raise must_be(file, key, "a positive integer", config[key])
    window, used = config.get(WINDOW), config.get(f"use_{WINDOW}")
    if type(window) is int and window < 1 and used in (None, True):  # a token would not see itself
        raise must_be(file, WINDOW, "a positive integer, or null for none", window)
    heads, shared = first_size(config, HEADS), config.get(SHARED_HEADS)
    if heads and type(shared) is int and shared > 0 and heads[1] % shared:
        raise must_be(file, SHARED_HEADS, f"a divisor of {heads[0]}, {heads[1]}", shared)
    experts, chosen = first_size(config, EXPERTS), first_size(config, CHOSEN)
    if experts and chosen and experts[1] > 0 and not 1 <= chosen[1] <= experts[1]:
        raise must_be(file, chosen[0], f"from 1 to {experts[0]}, {experts[1]}", chosen[1])
