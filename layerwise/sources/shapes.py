"""A model's shape from its config.json and the headers of its safetensors files: no weights are read, and torch is not
imported."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import locate
from layerwise.sources import gguf_files, gguf_models
from layerwise.sources.checkpoint_files import tensors_of, weight_files
from layerwise.sources.hub import Spec, read_json
from layerwise.sources.model_config import CHOSEN, DEPTHS, EXPERTS, language_config

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
SAVED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
IN_BLOCK = re.compile(r"((?:\w*[^\W\d]\w*\.)*)(\d+)\.(.+)")  # the first numeric component is the block's number
TRANSPOSED = ("gpt2", "openai-gpt")  # model types whose linear layers store [in, out]
# models whose MLP has two layers instead of three
UNGATED = ("opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon", "phi", "starcoder2")
# Layers with their own input; other layers of a module with the same number of inputs share one.
LAST = ("o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
LAST += ("q_b_proj", "kv_b_proj")  # low-rank projections of queries, and of keys and values
NO_LINEAR = re.compile(r"norm|embed|rotary|router|(^|\.)(gate|wg)\.(\w+\.)?weight$|bias")


@dataclass(frozen=True)
class BlockShape:
    """parameters: number in the whole block. layers: (out, in, share) of its linear layers. taps: (in, share) of the
    distinct inputs. share: share of the tokens that they see; below one for an expert, which has its own inputs."""

    parameters: int
    layers: tuple[tuple[int, int, float], ...]
    taps: tuple[tuple[int, float], ...]

    @cached_property
    def gram_entries(self) -> int:
        return sum(inputs**2 for inputs, _ in self.taps)


@dataclass(frozen=True)
class ModelShape:
    """blocks: each kind of block with its count. outside: parameters outside the blocks, such as embeddings and head.

    dtype: default dtype for running. fetched: whether the weights are local; otherwise the shape comes from
    config.json.
    """

    blocks: Mapping[BlockShape, int]
    outside: int
    vocabulary: int
    hidden: int
    dtype: str
    fetched: bool

    @cached_property
    def depth(self) -> int:
        return sum(self.blocks.values())

    @cached_property
    def parameters(self) -> int:
        return self.outside + sum(block.parameters * times for block, times in self.blocks.items())

    @cached_property
    def has_experts(self) -> bool:
        """Whether some layers see only the tokens that are routed to them."""
        return any(share < 1 for block in self.blocks for _, share in block.taps)

    @cached_property
    def widest(self) -> int:
        """Largest number of inputs or outputs of a layer."""
        return max((max(out, inputs) for block in self.blocks for out, inputs, _ in block.layers), default=self.hidden)

    @cached_property
    def largest_layer(self) -> tuple[int, int]:
        """(out, in) of the largest layer."""
        found = [(out, inputs) for block in self.blocks for out, inputs, _ in block.layers]
        return max(found, key=math.prod, default=(0, 0))

    @cached_property
    def largest_gram(self) -> int:
        """Number of inputs of the largest Gram."""
        return max((inputs for block in self.blocks for inputs, _ in block.taps), default=0)

    def total(self, of: Callable[[BlockShape], float]) -> float:
        """The sum of of(block) over all blocks."""
        return sum(of(block) * times for block, times in self.blocks.items())


def shape_of(spec: Spec) -> ModelShape | None:
    """The shape of a config's model: from its files, otherwise its config.json or the header of its GGUF file; None if
    none of these is local.

    Raises InputError for files that are damaged or absent.
    """
    if "gguf" in spec:
        header = gguf_files.header_of(spec)
        if header is None:
            return None
        tensors = [(gguf_models.layer_name(name), shape, "F32") for name, shape, _ in header.tensors]
        return shape_of_tensors(tensors, gguf_models.config_of(header))
    folder = _folder(spec)
    if folder is None:
        return None
    config = language_config(read_json(folder / "config.json"))
    try:
        files = weight_files(str(spec.get("path", spec.get("hub"))), folder)
    except InputError:  # only some files of the hub model are in the cache
        if "path" in spec:
            raise
        return shape_of_config(config)
    return shape_of_tensors([item for path in files for item in tensors_of(path)], config)


def _folder(spec: Spec) -> Path | None:
    """Local folder of a model; None for a hub model whose config.json is not in the cache."""
    if "path" in spec:
        return locate(spec["path"])
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec["hub"], "config.json", None, spec["revision"], "model")
    return Path(found).parent if isinstance(found, str) else None


def shape_of_tensors(tensors: Iterable[tuple[str, tuple[int, ...], str]], config: Mapping[str, Any]) -> ModelShape:
    """tensors: (name, shape, dtype) from the files."""
    lists: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(list))
    sizes: Counter[str] = Counter()
    total, dtypes, vocabulary = 0, Counter[str](), 0
    for name, shape, dtype in tensors:
        size = math.prod(shape)
        total += size
        dtypes[dtype] += size
        found = IN_BLOCK.match(name)
        if found:
            sizes[found[1]] += size
            lists[found[1]][int(found[2])].append((found[3], shape))
        elif len(shape) == 2:
            vocabulary = max(vocabulary, shape[0])
    (blocks,) = [lists[prefix] for prefix, _ in sizes.most_common(1)] or [{}]
    own = Counter(_block(inside, config) for inside in blocks.values())
    inside = sum(block.parameters * times for block, times in own.items())
    saved = SAVED.get(dtypes.most_common(1)[0][0], "float32") if dtypes else "float32"
    hidden = _first(config, "hidden_size", "n_embd", "d_model") or 0
    vocabulary = _first(config, "vocab_size") or vocabulary
    return ModelShape(own, total - inside, vocabulary, hidden, _dtype(config, saved), True)


def _block(tensors: list[tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> BlockShape:
    layers: list[tuple[int, int, float]] = []
    taps: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    fused: Counter[tuple[str, int]] = Counter()  # outputs of an expert's gate and up, which are one layer
    share, turned = _share(config), config.get("model_type") in TRANSPOSED
    for name, shape in tensors:
        expert = ".experts." in f".{name}"
        if NO_LINEAR.search(name) or len(shape) < 2 or (len(shape) > 2 and not expert):
            continue
        if not (expert or name.endswith(".weight")):  # a module's own matrix, such as Mamba's A_log
            continue
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        count, (out, inputs) = math.prod(shape[:-2]), shape[-2:]
        if turned or (count > 1 and _stands_turned(leaf, inputs, config)):
            out, inputs = inputs, out
        if out == 1:  # a gate
            continue
        seen = share if expert else 1.0
        if expert and len(shape) == 2 and leaf not in LAST:
            fused[parent, inputs] += out
        else:
            layers += [(out, inputs, seen)] * count
        key = (parent, leaf if leaf in LAST else "", inputs)
        taps[key] = [(inputs, seen)] * count
    layers += [(out, inputs, share) for (_, inputs), out in fused.items()]
    found = tuple(sorted(tap for same in taps.values() for tap in same))
    return BlockShape(sum(math.prod(shape) for _, shape in tensors), tuple(sorted(layers)), found)


def _stands_turned(leaf: str, inputs: int, config: Mapping[str, Any]) -> bool:
    """Whether experts in one tensor are stored [experts, in, out], as some models do."""
    hidden = config.get("hidden_size")
    return (inputs == hidden) == ("down" in leaf)


def _share(config: Mapping[str, Any]) -> float:
    """Average share of the tokens that an expert sees."""
    experts = _first(config, *EXPERTS)
    chosen = _first(config, *CHOSEN)
    return chosen / experts if experts and chosen else 1.0


def shape_of_config(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape from a config.json, for a model without local weights; None if its fields do not determine it."""
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    depth = _first(config, *DEPTHS)
    heads = _first(config, "num_attention_heads", "n_head")
    vocabulary = _first(config, "vocab_size")
    if not (hidden and depth and heads and vocabulary):
        return None
    length = _first(config, "head_dim") or hidden // heads
    shared = (_first(config, "num_key_value_heads") or heads) * length
    width = _first(config, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner") or 4 * hidden
    above, experts = 1 if config.get("model_type") in UNGATED else 2, _first(config, *EXPERTS) or 0
    attention = [(heads * length, hidden, 1.0), *[(shared, hidden, 1.0)] * 2, (hidden, heads * length, 1.0)]

    def block(plain: int, experts: int = 0) -> BlockShape:
        """plain: width of an MLP that every token uses."""
        layers, taps = list(attention), [(hidden, 1.0), (heads * length, 1.0)]
        if plain:
            layers += [*[(plain, hidden, 1.0)] * above, (hidden, plain, 1.0)]
            taps += [(hidden, 1.0), (plain, 1.0)]
        own, share = _first(config, "moe_intermediate_size") or width, _share(config)
        layers += [(2 * own, hidden, share), (hidden, own, share)] * experts
        taps += [(hidden, share), (own, share)] * experts
        parameters = sum(out * inputs for out, inputs, _ in layers) + (2 + experts) * hidden  # norms and router
        return BlockShape(parameters, tuple(sorted(layers)), tuple(sorted(taps)))

    dense = min(depth, _first(config, "first_k_dense_replace") or 0) if experts else depth
    beside = (_first(config, "n_shared_experts") or 0) * (_first(config, "moe_intermediate_size") or width)
    beside = _first(config, "shared_expert_intermediate_size") or beside
    blocks = Counter({block(width): dense} if dense else {})
    blocks.update({block(beside, experts): depth - dense} if depth > dense else {})
    outside = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2) + hidden
    return ModelShape(blocks, outside, vocabulary, hidden, _dtype(config, "float32"), False)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _dtype(config: Mapping[str, Any], otherwise: str) -> str:
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in BYTES else otherwise
