"""Tiny GGUF files, written as llama.cpp's converter does, and an own reader of their types as the truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, HEADS, SHARED, WIDE, BLOCKS, CONTEXT = 64, 4, 2, 96, 2, 128
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # of a byte-level vocabulary
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "Ġt h", "Ġ Ġ", "ĠĠ ĠĠ", "1 9", "19 0", "Ġ 1", "Â ²"]  # digits that one way of cutting keeps apart
TOKENS = [*SPECIAL, *LETTERS, *("".join(merge.split()) for merge in MERGES)]
KINDS = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_0")}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": CONTEXT,
    "llama.block_count": BLOCKS,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": SHARED,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e4,
    "llama.rope.dimension_count": HIDDEN // HEADS,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
}
NAMES = {"self_attn.": "attn_", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
NAMES |= {"mlp.": "ffn_", "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "model.layers": "blk"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
OUTSIDE |= {"lm_head.weight": "output.weight"}


def model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """A llama of two blocks whose heads share keys and values, with weights that float16 holds and norms unlike one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    own = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, value in own.named_parameters():
        value.copy_((torch.randn_like(value) * 0.2 + ("norm" in name)).half().float())
    return own


def name_in_file(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight is blk.0.attn_q.weight."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def turned(name: str, weight: np.ndarray) -> np.ndarray:
    """The rows of queries and keys as llama.cpp has them: the two halves of a head, which rotate together, in turns."""
    heads = HEADS if "q_proj" in name else SHARED
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path, kind: str = "Q8_0", tied: bool = False, seed: int = 0, changes: Mapping[str, Any] | None = None
) -> LlamaForCausalLM:
    """Write a model, its matrices as `kind`, and return it. changes: of the metadata, None takes a key out."""
    own = model(tied, seed)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for name, value in own.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors[name_in_file(name)] = (turned(name, value.numpy()), kind if value.ndim == 2 else "F32")
    write_file(path, tensors, {**METADATA, **(changes or {})})
    return own


def write_file(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]], metadata: Mapping[str, Any]) -> None:
    """tensors: name -> (values, type)."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add(writer, key, value)
    for name, (values, kind) in tensors.items():
        data = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), KINDS[kind])
        writer.add_tensor(name, data, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key with a value of the type that its Python type says."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def dequantised(values: np.ndarray, kind: str) -> np.ndarray:
    """What a matrix [out, in] holds once it is stored as `kind`, read from the bytes block by block, in float64."""
    data = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), KINDS[kind])
    if kind in ("F32", "F16"):
        return (
            np.frombuffer(data.tobytes(), {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float64).reshape(values.shape)
        )
    rows = []
    width = {"Q8_0": 34, "Q4_1": 20, "Q4_0": 18}[kind]
    raw = data.tobytes()
    for start in range(0, len(raw), width):
        block = raw[start : start + width]
        scale = float(np.frombuffer(block[:2], "<f2")[0])
        if kind == "Q8_0":
            rows.append([scale * (byte - 256 if byte > 127 else byte) for byte in block[2:]])
            continue
        least = float(np.frombuffer(block[2:4], "<f2")[0]) if kind == "Q4_1" else -8 * scale
        codes = block[4:] if kind == "Q4_1" else block[2:]
        rows.append([scale * code + least for code in (*(byte & 15 for byte in codes), *(byte >> 4 for byte in codes))])
    return np.array(rows).reshape(values.shape)


def expected(own: LlamaForCausalLM, kind: str) -> LlamaForCausalLM:
    """The model that a file of it holds: its matrices rounded to `kind`."""
    for value in own.parameters():
        if value.ndim == 2:
            value.copy_(torch.from_numpy(dequantised(value.numpy(), kind)).float())
    return own


def entry(path: Path) -> dict[str, Any]:
    """A config's entry of a file."""
    return {"name": "tiny", "gguf": str(path), "dtype": "float32"}
