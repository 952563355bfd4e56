"""Tiny GGUF files of random weights, of every architecture that is read: llama.cpp's logits beside this project's.

    python -m tests.support.llama_cpp_families [ARCHITECTURE ...]

llama-cpp-python must be installed; the project does not depend on it.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from layerwise.models.loading import load
from layerwise.sources import gguf_conversion, gguf_models
from layerwise.sources.gguf_header import Header
from tests.support import gguf_files as made

USUAL = {"context_length": 128, "block_count": 2, "embedding_length": 64, "feed_forward_length": 96}
USUAL |= {"attention.head_count": 4, "attention.head_count_kv": 2}
MHA: dict[str, Any] = {"attention.head_count_kv": None, "feed_forward_length": 256}  # heads that share nothing
GEMMA = {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 16}
EXPERTS = {"rope.freq_base": 1e6, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
# Architecture -> what its metadata says besides; a value like no default shows that it is read.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": 16, "rope.freq_base": 5e4},
    "qwen2": {"rope.freq_base": 1e6},
    "qwen3": {"rope.freq_base": 1e6, "attention.key_length": 32, "attention.value_length": 32},
    "qwen2moe": {**EXPERTS, "expert_shared_feed_forward_length": 96},
    "qwen3moe": {**EXPERTS, "attention.key_length": 16, "attention.value_length": 16},
    "phi3": {"rope.dimension_count": 16, "rope.freq_base": 1e4},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {**GEMMA, "rope.freq_base": 1e6, "block_count": 26},  # by which llama.cpp knows its scales
    "gpt2": MHA,
    "bloom": MHA,
    "falcon": {"attention.head_count_kv": 1, "feed_forward_length": 256},
    "stablelm": {"rope.dimension_count": 4, "use_parallel_residual": False, "rope.freq_base": 5e4},
    "starcoder2": {"rope.freq_base": 1e5},
    "nemotron": {"rope.dimension_count": 8, "rope.freq_base": 1e4},
}
TIED = ("gemma2", "gemma3", "gpt2", "bloom", "falcon")
LAYER_NORM = ("gpt2", "bloom", "falcon", "stablelm", "starcoder2", "nemotron")
NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}  # as transformers' mapping has them
TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # gpt2 stores [in, out]


def metadata(kind: str) -> dict[str, Any]:
    epsilon = "layer_norm_epsilon" if kind in LAYER_NORM else "layer_norm_rms_epsilon"
    own = {**USUAL, f"attention.{epsilon}": 1e-5, **CASES[kind]}
    shared = {key: value for key, value in made.METADATA.items() if key.startswith("tokenizer.")}
    shared |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.padding_token_id": 0, "general.architecture": kind}
    return {**shared, **{f"{kind}.{key}": value for key, value in own.items() if value is not None}}


def config_of(kind: str, header: Header) -> PreTrainedConfig:
    """The config that the architecture's metadata describes."""
    mapped = GGUF_CONFIG_MAPPING[NAMES.get(kind, kind)]
    said = {name: header.own(key) for key, name in mapped.items() if name and header.own(key) is not None}
    said |= {"vocab_size": len(made.TOKENS), "pad_token_id": 0, **gguf_models.supplied(header)}
    kinds = {"gemma3": "gemma3_text"} | NAMES
    config = AutoConfig.for_model(**said | {"model_type": kinds.get(kind, kind)})
    config.tie_word_embeddings = kind in TIED
    if kind == "stablelm":
        config.use_qkv_bias = True
    return config


def write(kind: str, path: Path) -> None:
    """A file of an architecture, every tensor that its model has drawn at random."""
    about, draw = metadata(kind), np.random.default_rng(0)
    config = config_of(kind, Header(about, ()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=config.to_dict())
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for name, own in get_gguf_hf_weights_map(model, processor).items():
        if name == gguf_models.OUTPUT and config.tie_word_embeddings:
            continue
        shape = shapes[own] if own in shapes else next(shapes[key] for key in shapes if key.endswith(own))
        if kind == "gpt2" and name.endswith(TURNED):
            shape = shape[::-1]
        if "ffn_gate_exps" in name or "ffn_up_exps" in name:  # the model has both in one
            shape = [shape[0], shape[1] // 2, shape[2]]
        if "ffn_gate_inp_shexp" in name:
            shape = shape[1:]
        value = draw.normal(size=shape) * {1: 0.1, 2: 0.2, 3: 0.1}[len(shape)]
        value += "norm" in name and name.endswith("weight")
        name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        tensors[name] = (value.astype(np.float32), "F32")
    made.write_file(path, tensors, about)


def main(kinds: list[str]) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")

    for kind in kinds or list(CASES):
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["LAYERWISE_CACHE"] = scratch
            path = Path(scratch) / f"{kind}.gguf"
            write(kind, path)
            tokens = np.random.default_rng(1).integers(3, len(made.TOKENS), size=48).tolist()
            folder = gguf_conversion.converted(made.entry(path))
            with torch.no_grad():
                found = load({"path": str(folder)})(torch.tensor([tokens])).logits[0].double().numpy()
            asked = {"n_ctx": 64, "n_batch": 64, "logits_all": True, "verbose": False, "flash_attn": False}
            llama = llama_cpp.Llama(str(path), type_k=0, type_v=0, **asked)  # 0: float32
            llama.eval(tokens)
            expected = np.array(llama.scores[: len(tokens)], dtype=np.float64)
            llama.close()
        same = float((found.argmax(1) == expected.argmax(1)).mean())
        print(f"{kind}: largest {abs(expected).max():.3g}, ", end="")
        print(f"largest difference {abs(found - expected).max():.2g}, same most likely token {same:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
