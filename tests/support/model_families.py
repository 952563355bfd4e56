"""Tiny random models of every family that the tests cover, built from their configs: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerwise.models.loading import EXPERTS

VOCABULARY = 96
HIDDEN = 32
EXPERT = 24  # intermediate size of an expert: twice as many are not HIDDEN, so that no weight is square
LENGTH = 24  # tokens per sequence; longer than Gemma 3's sliding window

LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA_TAPS = ("q_proj,k_proj,v_proj", "o_proj", "gate_proj,up_proj", "down_proj")
MOE: dict[str, Any] = {
    **LLAMA,
    "moe_intermediate_size": EXPERT,
    "num_experts": 4,
    "num_experts_per_tok": 3,
}
MOE_TAPS = (*LLAMA_TAPS[:2], *(f"mlp.experts.{i}.{name}" for i in range(4) for name in ("gate_up_proj", "down_proj")))
FUSED_TAPS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any]
    taps: tuple[str, ...]  # of every block, in the order of their inputs


FAMILIES = {
    "llama": Family("llama", LLAMA, LLAMA_TAPS),
    "mistral": Family("mistral", {**LLAMA, "sliding_window": 8}, LLAMA_TAPS),
    "qwen2": Family("qwen2", LLAMA, LLAMA_TAPS),
    "qwen3": Family("qwen3", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}, LLAMA_TAPS),
    "gemma3": Family(
        "gemma3_text",
        {
            **LLAMA,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        LLAMA_TAPS,
    ),
    "opt": Family(
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": 16,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
        ("q_proj,k_proj,v_proj", "out_proj", "fc1", "fc2"),
    ),
    "gpt2": Family(  # both of a block's output layers are called c_proj
        "gpt2",
        {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Family(  # parallel residual, but each branch has its own norm
        "gpt_neox",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        FUSED_TAPS,
    ),
    "phi": Family(  # attention and MLP see the same normed input
        "phi",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        ("q_proj,k_proj,v_proj,fc1", "dense", "fc2"),
    ),
    "falcon": Family(  # likewise
        "falcon",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4},
        ("query_key_value,dense_h_to_4h", "dense", "dense_4h_to_h"),
    ),
    "falcon_alibi": Family(
        "falcon",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "parallel_attn": False,
            "multi_query": False,
        },
        FUSED_TAPS,
    ),
    "bloom": Family("bloom", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}, FUSED_TAPS),
    "phi3": Family("phi3", {**LLAMA, "sliding_window": 8}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gemma2": Family(  # sliding windows in every other block, capped attention and logits
        "gemma2",
        {
            **LLAMA,
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        LLAMA_TAPS,
    ),
    "olmo2": Family("olmo2", LLAMA, LLAMA_TAPS),  # norms after attention and MLP, not before
    "stablelm": Family(  # attention and MLP see the same normed input
        "stablelm",
        {**LLAMA, "use_parallel_residual": True, "use_qkv_bias": True},
        ("q_proj,k_proj,v_proj,gate_proj,up_proj", "o_proj", "down_proj"),
    ),
    "starcoder2": Family("starcoder2", LLAMA, ("q_proj,k_proj,v_proj", "o_proj", "c_fc", "c_proj")),
    "gptj": Family(
        "gptj",
        {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        ("q_proj,k_proj,v_proj,fc_in", "out_proj", "fc_out"),
    ),
    "mpt": Family(
        "mpt", {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4}, ("Wqkv", "out_proj", "up_proj", "down_proj")
    ),
    "mixtral": Family("mixtral", {**MOE, "num_local_experts": 4, "intermediate_size": EXPERT}, MOE_TAPS),
    "qwen3_moe": Family("qwen3_moe", {**MOE, "head_dim": 16}, MOE_TAPS),
    "qwen2_moe": Family(  # an expert that every token passes
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 24, "initializer_range": 0.2},  # as for gpt_oss below
        (*MOE_TAPS[:2], *LLAMA_TAPS[2:], *MOE_TAPS[2:]),
    ),
    "gpt_oss": Family(  # experts stored as [in, out], with biases
        "gpt_oss",
        {
            **MOE,
            "num_local_experts": 4,
            "intermediate_size": EXPERT,
            "initializer_range": 0.2,  # with less, an expert is routed hardly a token
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        MOE_TAPS,
    ),
    "deepseek_v3": Family(  # queries, keys and values of low rank
        "deepseek_v3",
        {
            **MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        ("q_a_proj,kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", *LLAMA_TAPS[1:], *MOE_TAPS[2:]),
    ),
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family, in eval mode, with biases and norms that are not the identity."""
    config = AutoConfig.for_model(
        FAMILIES[family].model_type,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[family].config,
    )
    config._experts_implementation = EXPERTS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tokens(sequences: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Random tokens [sequences, length], int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
