"""A tiny random model of every causal family of the installed transformers, made from its config class alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 120
SPECIAL_TOKENS = 10  # the first ones, which no text has
EXPERTS = 4
NOISE = 0.2  # added to every parameter; with half of it a block left out moves some perplexities by 0.01 % alone
LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
]
MOST_LAYERS = 4

# What a config is given, if it has a key of this name.
VALUES: tuple[tuple[int, str], ...] = (
    # widths
    (VOCABULARY, "vocab_size n_words vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"),
    (32, "hidden_size d_model n_embd emb_dim embedding_dim hidden_size_global lru_width conv_dim"),
    (32, "adapter_in_dim adapter_out_dim adapter_input_size"),
    (16, "embedding_size input_embedding_size output_embedding_size word_embed_proj_dim router_hidden_size"),
    (48, "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size feed_forward_size d_inner"),
    (48, "ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff n_inner"),
    (24, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
    (24, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    (8, "hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim ple_embed_dim hc_lowrank"),
    (
        8,
        "block_multiple_of",
    ),
    # heads and ranks
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups index_n_heads"),
    (8, "head_dim swa_head_dim d_head dim_head kv_channels attention_head_size index_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim v_head_dim"),
    (16, "qk_head_dim q_lora_rank kv_lora_rank"),
    (8, "o_lora_rank"),
    (4, "rotary_dim laurel_rank adapter_rank gated_norm_rank d_rel"),
    (2, "o_groups"),
    # lengths
    (128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions"),
    (64, "keep_window_size"),
    (32, "rel_extent"),
    (16, "attention_chunk_size local_attention block_size index_topk max_source_positions"),
    (8, "sliding_window sliding_window_size attention_window_size window_size index_block_size"),
    (4, "index_topk_blocks"),
    # experts
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num n_group num_expert_group"),
    (1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    (0, "num_nextn_predict_layers"),
    # layers with a state
    (
        8,
        "state_size ssm_state_size mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim",
    ),
    (8, "mamba_headdim mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (4, "mamba_dt_rank time_step_rank linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads n_mamba_heads n_groups"),
    (64, "mamba_d_ssm"),
    # what is beside the text
    (2, "encoder_layers num_encoder_layers type_vocab_size num_codebooks"),
    (16, "image_size output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels mlp_dim"),
    (8, "patch_size num_mel_bins"),
    (50, "encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    (4, "make_ngram_vocab_size_divisible_by split_ngram_parts"),
    # tokens
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id start_token_id forced_bos_token_id"),
    (2, "eos_token_id eod_token_id forced_eos_token_id"),
    (3, "sep_token_id cls_token_id mask_token_id unk_index"),
)
SMALL = {key: value for value, keys in VALUES for key in keys.split()}

# What a config of this model_type needs besides, or instead.
SLIDING_AND_FULL = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
    },
    "dots3_note_text": {
        **{f"swa_{key}": SMALL[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_v_head_dim": 8},
        **{"head_dim": 16, "swa_head_dim": 16},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {**SLIDING_AND_FULL, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0] * 2},
    "gemma4_text": {**SLIDING_AND_FULL, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma4_unified_text": {**SLIDING_AND_FULL, "global_head_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0},
        **{"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24]},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
}

# Name -> model_type, and what its config says differently: architectures that a default config hides.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "doge (experts)": ("doge", {"is_moe": True}),
    "gemma4_text (experts)": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
}
FAMILIES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS)


def known_keys(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Key -> value of a config class's own defaults."""
    names = [field.name for field in fields(kind)]
    try:
        own = vars(kind())  # (not getattr, which keys that differ from layer to layer refuse)
    except StrictDataclassError:  # defaults that contradict each other
        own = {}
    return {name: own.get(name, getattr(kind, name, None)) for name in names}


def per_layer(known: dict[str, Any]) -> dict[str, list[Any]]:
    """Keys of which the value is a list with an entry for each layer."""
    count = next((known[key] for key in LAYERS if isinstance(known.get(key), int)), 0)
    lists = {key: list(value) for key, value in known.items() if isinstance(value, (list, tuple)) and key not in SMALL}
    return {key: value for key, value in lists.items() if len(value) == count > 2}


def chosen_layers(known: dict[str, Any]) -> list[int]:
    """Of the layers of the default config the first of each kind, as far as lists with an entry per layer tell."""
    kinds = [tuple(map(str, kind)) for kind in zip(*per_layer(known).values(), strict=True)]
    first = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:MOST_LAYERS]
    return first if len(first) > 1 else [0, 1]


def tiny_config(kind: type[PreTrainedConfig], **besides: Any) -> PreTrainedConfig:
    """A config of this class, with small values for the well-known keys that it has; composite ones of tiny parts."""
    known = known_keys(kind)
    layers = chosen_layers(known)
    # A token of its own is none where the default config has none.
    given: dict[str, Any] = {
        key: value for key, value in SMALL.items() if key in known and not (key.endswith("_id") and known[key] is None)
    }
    given |= {key: len(layers) for key in LAYERS if key in known}
    given |= {key: [value[i] for i in layers] for key, value in per_layer(known).items()}
    if "kv_lora_rank" in known:  # each head has keys and values of its own, which share their low rank
        given["num_key_value_heads"] = SMALL["num_attention_heads"]
    parts: Any = kind.sub_configs
    for key in parts:
        if isinstance(known.get(key), PreTrainedConfig):
            given[key] = tiny_config(type(known[key])).to_dict()
    return kind(**{**given, **SPECIAL.get(kind.model_type, {}), **besides})


def family_config(family: str) -> PreTrainedConfig:
    """The tiny config of a family. Raises what the library does."""
    kind, besides = VARIANTS.get(family, (family, {}))
    return tiny_config(CONFIG_MAPPING[kind], **besides)


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32, in eval mode, of which no parameter is trivial. Raises what the library does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tokens(windows: int, length: int) -> Tensor:
    """Random tokens [windows, length], int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SPECIAL_TOKENS, VOCABULARY, (windows, length), generator=generator)
