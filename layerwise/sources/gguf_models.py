"""Supported GGUF files: the metadata that transformers reads, and the splitting of texts. Does not import torch.

transformers reads a file's metadata key by key and ignores unknown keys: a scaling of the rotary frequencies, another
head length, another splitting of digits. The model is then a different one, whose numbers look right. So an ignored key
must agree with transformers' defaults, and other files are refused before any job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.sources.gguf_header import Header

SIZES = ("context_length", "block_count", "feed_forward_length", "embedding_length")
HEADS = ("attention.head_count", "attention.head_count_kv")
BASE, RMS, LAYER_NORM = "rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
ROTATED, KEY, VALUE = "rope.dimension_count", "attention.key_length", "attention.value_length"
USUAL = (*SIZES, *HEADS, BASE, RMS, "vocab_size")
EXPERTS = ("expert_count", "expert_used_count")
# Architecture (general.architecture) -> its keys that transformers reads.
TAKEN: dict[str, tuple[str, ...]] = {
    "llama": (*USUAL, ROTATED),
    "qwen2": USUAL,
    "qwen3": USUAL,
    "phi3": USUAL,
    "falcon": USUAL,
    "nemotron": USUAL,
    "qwen2moe": (*USUAL, *EXPERTS),
    "qwen3moe": (*USUAL, *EXPERTS, KEY),
    "gemma2": (*USUAL, KEY, "attention.sliding_window"),
    "gemma3": (*USUAL, KEY, "attention.sliding_window"),
    "stablelm": (*SIZES, *HEADS, LAYER_NORM, "vocab_size"),
    "starcoder2": (*SIZES, *HEADS, LAYER_NORM),
    "gpt2": (*SIZES, HEADS[0], LAYER_NORM),
    "bloom": ("block_count", "embedding_length", HEADS[0], LAYER_NORM, "vocab_size"),
}
# Architecture -> further keys that are passed to transformers' config -> their names there.
SUPPLIED: dict[str, dict[str, str]] = {
    "qwen3": {KEY: "head_dim"},
    "falcon": {LAYER_NORM: "layer_norm_epsilon"},
    "nemotron": {LAYER_NORM: "norm_eps"},
    "gpt2": {"context_length": "n_positions"},
    "stablelm": {BASE: "rope_theta"},
    "starcoder2": {BASE: "rope_theta"},
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
ROTATED_SHARE = {"stablelm": 0.25, "nemotron": 0.5}  # default share of a head
HEAD_LENGTH = {"qwen3": 128}  # default, if it is not the width divided by the number of heads
FIXED = {"gemma2": {KEY: 256}, "gemma3": {KEY: 256}}  # a scale that transformers does not read depends on this
DERIVED = {"stablelm": ("use_parallel_residual",), "falcon": ("tensor_data_layout",), "llama": ("tensor_data_layout",)}
DERIVED |= {"bloom": ("context_length", "feed_forward_length")}
LOST = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")  # prefixes of tensors that are not read
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

TOKENIZER = "tokenizer.ggml."
BYTE_LEVEL, PIECES = "gpt2", "llama"  # kinds of tokenizers in tokenizer.ggml.model
# Ways of splitting a text before merges: names in tokenizer.ggml.pre, behaviour of llama.cpp.
GPT2_SPLIT = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "exaone4", "mellum")
# followed by GPT-2's splitting
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# Split as by transformers' GGUF_PRE_TOKENIZER_SPLITS. With WHOLE_WORDS, a word that is in the vocabulary becomes one
# token, without merges.
LISTED = (*WHOLE_WORDS, "dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "llama4")
SPLITS = (*GPT2_SPLIT, *SINGLE_DIGITS, *LISTED, "stablelm2")
BEGINNING = ("bos", "eos", "unknown", "padding")  # tokens that a file gives by id


def check_read_whole(header: Header, subject: str) -> None:
    """Raise InputError, in one sentence, for a file whose model or tokenizer would be read incorrectly."""
    kind = header.architecture
    if kind not in TAKEN:
        raise InputError(
            f"{subject} must be of a decoder that transformers reads from GGUF: {', '.join(sorted(TAKEN))}. Got "
            f"{brief(repr(kind), 40)} instead."
        )
    lost = next((name for name in sorted(header.names) if name.startswith(LOST)), None)
    if lost:
        raise InputError(f"{subject} scales its rotary frequencies by {lost}, which transformers does not read.")
    for key, value in header.metadata.items():
        family, _, own = key.partition(".")
        taken = own in TAKEN[kind] or own in SUPPLIED.get(kind, {})
        fixed = FIXED.get(kind, {}).get(own, value)
        if family == kind and (value != fixed or not (taken or said_by_default(header, own, value))):
            raise InputError(
                f"{subject} must have no metadata that transformers ignores. Got {brief(key, 80)}: "
                f"{brief(str(value), 80)} instead."
            )
    for key in ("block_count", "embedding_length", HEADS[0]):
        if type(header.own(key)) is not int or header.own(key) < 1:
            raise InputError(f"{subject} must have {kind}.{key}, a positive integer. Got {header.own(key)!r} instead.")
    if EMBEDDING not in header.names:
        raise InputError(f"{subject} has no weights of a whole model: it lacks {EMBEDDING}.")
    check_tokenizer(header, subject)


def head_length(header: Header) -> int:
    """The head length of the model that transformers builds from the file."""
    kind = header.architecture
    known = (*TAKEN[kind], *SUPPLIED.get(kind, {}))
    mapped = next((header.own(key) for key in (KEY, ROTATED) if key in known and header.own(key)), None)
    return mapped or HEAD_LENGTH.get(kind) or header.own("embedding_length") // (header.own(HEADS[0]) or 1)


def said_by_default(header: Header, key: str, value: Any) -> bool:
    """Whether a key that transformers ignores agrees with the model that it builds."""
    kind = header.architecture
    if key in DERIVED.get(kind, ()):  # follows from the tensors, or describes their layout in the file
        return True
    if key in (ROTATED, KEY, VALUE):
        share = ROTATED_SHARE.get(kind, 1.0) if key == ROTATED else 1.0
        return value == int(share * head_length(header))
    if key == "attention.sliding_window":
        return value == 0 or value >= (header.own("context_length") or 0)
    plain = {"rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), BASE: (10_000.0,)}
    plain |= dict.fromkeys(EXPERTS, (0,)) | {"attention.causal": (True,), "vocab_size": (_tokens(header),)}
    if kind == "gemma2":
        plain |= {"attn_logit_softcapping": (50.0,), "final_logit_softcapping": (30.0,)}
    return value in plain.get(key, ())


def _tokens(header: Header) -> int:
    tokens = header.metadata.get(f"{TOKENIZER}tokens")
    return len(tokens) if isinstance(tokens, list) else 0


def check_tokenizer(header: Header, subject: str) -> None:
    """Raise InputError for a file without a tokenizer, or with one that would split texts differently."""
    own: Mapping[str, Any] = {key: header.metadata.get(f"{TOKENIZER}{key}") for key in ("model", "pre", "tokens")}
    tokens = own["tokens"]
    if own["model"] in (None, "none", "no_vocab") or not tokens:
        raise InputError(f"{subject} has no tokenizer: tokenizer.ggml.model and tokenizer.ggml.tokens are needed.")
    if own["model"] not in (BYTE_LEVEL, PIECES):
        raise InputError(
            f"The tokenizer of {subject} must be of the kind {BYTE_LEVEL} or {PIECES}. Got "
            f"{brief(repr(own['model']), 40)} instead."
        )
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"The tokenizer of {subject} must have tokens that are strings. Got other values instead.")
    if len(set(tokens)) < len(tokens):
        raise InputError(f"The tokenizer of {subject} must have every token once. Got one of them twice instead.")
    needed, what = ("merges", str) if own["model"] == BYTE_LEVEL else ("scores", float)
    found = header.metadata.get(f"{TOKENIZER}{needed}")
    if not isinstance(found, list) or not all(isinstance(item, what) for item in found):
        raise InputError(f"The tokenizer of {subject} must have {needed}. Got none that can be read instead.")
    if own["model"] == BYTE_LEVEL and own["pre"] not in SPLITS:
        raise InputError(
            f"The tokenizer of {subject} must split texts in a known way: {', '.join(sorted(SPLITS))}. Got "
            f"{brief(repr(own['pre']), 40)} as {TOKENIZER}pre instead."
        )
    _check_sizes(header, subject, len(tokens))


def _check_sizes(header: Header, subject: str, tokens: int) -> None:
    (rows,) = (tensor.shape[0] for tensor in header.tensors if tensor.name == EMBEDDING)
    if rows != tokens:
        raise InputError(f"{subject} must embed the tokens of its tokenizer, {tokens}. Got {rows} rows instead.")
    for key in ("scores", "token_type"):
        found = header.metadata.get(f"{TOKENIZER}{key}")
        if found is not None and (not isinstance(found, list) or len(found) != tokens):
            raise InputError(
                f"The tokenizer of {subject} must have {key} of each token, {tokens}. Got another number instead."
            )
    for key in BEGINNING:
        number = header.metadata.get(f"{TOKENIZER}{key}_token_id")
        if number is not None and not (type(number) is int and 0 <= number < tokens):
            raise InputError(
                f"The tokenizer of {subject} must have a {key}_token_id from 0 to {tokens - 1}. Got {number!r} instead."
            )


def supplied(header: Header) -> dict[str, Any]:
    """Entries of transformers' config in addition to those that transformers reads from the file."""
    keys = SUPPLIED.get(header.architecture, {})
    return {name: header.own(key) for key, name in keys.items() if header.own(key) is not None}


def config_of(header: Header) -> dict[str, Any]:
    """The sizes of the model under config.json's names, as far as the header has them."""
    found = {
        "hidden_size": header.own("embedding_length"),
        "intermediate_size": header.own("feed_forward_length"),
        "num_hidden_layers": header.own("block_count"),
        "num_attention_heads": header.own(HEADS[0]),
        "num_key_value_heads": header.own(HEADS[1]),
        "max_position_embeddings": header.own("context_length"),
        "num_experts": header.own("expert_count"),
        "num_experts_per_tok": header.own("expert_used_count"),
        "moe_intermediate_size": header.own("expert_feed_forward_length"),
        "head_dim": head_length(header),
        "vocab_size": _tokens(header),
    }
    sizes = {key: value for key, value in found.items() if type(value) is int and value > 0}
    return {**sizes, "tie_word_embeddings": OUTPUT not in header.names, "dtype": "float32"}


# The names of layers in shapes.py, by module and name, which determine shared inputs and linear layers.
LAYERS = {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")}
LAYERS |= {"attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.router"}
LAYERS |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
LAYERS |= {f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")}
LAYERS |= {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}


def layer_name(name: str) -> str:
    """A tensor's name in the form of shapes.py: blk.0.ffn_up.weight becomes blk.0.mlp.up_proj.weight."""
    return ".".join(LAYERS.get(part, part) for part in name.split("."))
