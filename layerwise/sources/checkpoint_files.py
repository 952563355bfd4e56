"""Check the files of a model's folder by name and header before any job runs. Does not import torch."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import locate
from layerwise.runtime.sentences import brief
from layerwise.sources import gguf_conversion, gguf_files, gguf_models
from layerwise.sources.hub import (
    Spec,
    check_hub,
    fetch_model,
    optional_json,
    read_json,
    readable,
)
from layerwise.sources.model_config import DEPTHS, check_config, language_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PIPELINE = "tokenizer.json"  # a complete tokenizer: the splitting of texts and the tokens
VOCABULARIES = (PIPELINE, "tekken.json", "vocab.json", "vocab.txt")  # a folder needs one of these files
MODEL_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")  # binary
TOKENIZER_CONFIG, MERGES = "tokenizer_config.json", "merges.txt"
TOKENIZER_FILES = (
    *(*VOCABULARIES, *MODEL_VOCABULARIES, MERGES),
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
)
# Keys in a config.json for the inputs of layers: the width of the model and of its MLP.
LAYER_INPUTS = (
    "hidden_size",
    "n_embd",
    "n_embed",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "moe_intermediate_size",
)
Header = tuple[str, tuple[int, ...], str]  # name, shape and dtype of a tensor
FLOATING = ("F64", "F32", "F16", "BF16")  # prefixes of dtypes; eight-bit formats have other prefixes
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "qmodel_config.json")
CODES = ("I8", "U8", "F8", "F6", "F4")  # prefixes of the dtypes of codes, for any tensor name
RECOMPUTED = (".masked_bias", ".inv_freq", ".position_ids", ".cos_cached", ".sin_cached")  # suffixes of buffers' names
ADAPTER = "adapter_config.json"  # peft's file next to weights that are not a whole model
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6}  # further dtypes of the safetensors format
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # loading a pickle can run its author's code


def model_files(spec: Spec) -> list[Path]:
    """Files of a local model folder on which a job depends, sorted; none for a hub model, which its revision fixes.

    For a GGUF file it is the file itself, which the job converts to a folder. A file in a wheel is fixed by the wheel's
    hash.
    """
    if "gguf" in spec:
        own = gguf_files.local_file(spec)
        return [own] if own else []
    if "path" not in spec:
        return []
    folder = locate(spec["path"])
    named = [folder / name for name in ("config.json", INDEX, *TOKENIZER_FILES)]
    return sorted({path for path in named if path.is_file()} | {*folder.glob("*.safetensors"), *folder.glob("*.py")})


def check_checkpoint(name: str, spec: Spec) -> None:
    """Raise InputError, in one sentence, when the model `name` cannot be loaded, as far as this can be seen now.

    A local folder must hold config.json, a tokenizer and complete safetensors files. A hub model must name its revision
    and be in the cache when fetching is forbidden. A GGUF file must be complete, hold a decoder with supported types,
    and have a tokenizer.
    """
    if "gguf" in spec:
        with readable(f"The model {name!r}"):
            gguf_files.check_file(spec)
        return
    if "path" not in spec:
        check_hub(f"The model {name!r}", spec, ["config.json"], repo_type="model")
        return
    with readable(f"The model {name!r}"):
        _check_folder(name, locate(spec["path"]))


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"The folder {folder} of the model {name!r} does not exist.")
    if not (folder / "config.json").is_file():
        raise InputError(f"The folder {folder} of the model {name!r} has no config.json.")
    check_vocabulary(f"The folder {folder} of the model {name!r}", folder)
    check_weight_files(name, folder)


def check_vocabulary(subject: str, folder: Path) -> None:
    """Raise InputError, in one sentence, when a folder has no file from which its tokenizer can be loaded.

    SentencePiece and tiktoken files are refused, because transformers converts them to tokenizers with other ids. A
    folder whose tokenizer is its own code reads its files itself; loading it requires trust.
    """
    present = {name for name in (*VOCABULARIES, *MODEL_VOCABULARIES, MERGES) if (folder / name).is_file()}
    if PIPELINE in present or own_code(folder):
        return
    binary = [name for name in MODEL_VOCABULARIES if name in present]
    if binary:
        raise InputError(
            f"{subject} has its tokenizer as {binary[0]} without {PIPELINE}, and SentencePiece and tiktoken files are "
            f""
            f"not read, because transformers' conversion may give other ids: add the publisher's {PIPELINE}."
        )
    if present.isdisjoint(VOCABULARIES):
        raise InputError(
            f"{subject} has no tokenizer: {PIPELINE}, or one of tekken.json, vocab.json with {MERGES}, and vocab.txt "
            "is needed."
        )
    if present == {"vocab.json"}:
        raise InputError(f"{subject} has vocab.json, but neither {MERGES} nor {PIPELINE}: one of them is needed.")


def own_code(folder: Path) -> bool:
    """Whether the tokenizer of a folder is code in the folder, which runs only with trust_remote_code."""
    path = folder / TOKENIZER_CONFIG
    mapped = optional_json(path).get("auto_map")
    return isinstance(mapped, list) or (isinstance(mapped, dict) and bool(mapped.get("AutoTokenizer")))


def check_weight_files(name: str, folder: Path) -> None:
    """Raise InputError when the weights are incomplete or are codes of a quantiser, or when config.json has more blocks
    than the weights have tensors, so that the model would fill the memory."""
    config = read_json(folder / "config.json")
    check_config(folder / "config.json", config)
    config = language_config(config)
    files = {path: check_safetensors(path) for path in weight_files(name, folder)}
    tensors = sum(map(len, files.values()))
    for key in DEPTHS:
        depth = config.get(key)
        if isinstance(depth, int) and depth > tensors:
            raise InputError(
                f"{folder / 'config.json'} of the model {name!r} says {key}: {brief(str(depth), 30)}, but its weights "
                f"have no more than {tensors} tensors."
            )
    check_floating(name, folder, files)


def longest_sequence(spec: Spec) -> int | None:
    """Largest number of tokens of a local model, from its config.json; None if unknown and for a hub model."""
    config = _model_config(spec)
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def layer_inputs(spec: Spec) -> list[int]:
    """Numbers of inputs of a local model's layers, as far as config.json gives them; none for a hub model."""
    config = _model_config(spec)
    heads, length = config.get("num_attention_heads"), config.get("head_dim")
    found = [config.get(key) for key in LAYER_INPUTS]
    if isinstance(heads, int) and isinstance(length, int):
        found.append(heads * length)  # inputs of the attention's output projection
    return sorted({size for size in found if isinstance(size, int)})


def _model_config(spec: Spec) -> dict[str, Any]:
    """The language part of a local model's config.json, or the same from a GGUF header; empty for a hub model."""
    if "gguf" in spec:
        header = gguf_files.header_of(spec)
        return gguf_models.config_of(header) if header else {}
    if "path" not in spec:
        return {}
    return language_config(read_json(locate(spec["path"]) / "config.json"))


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files of the model. Raises InputError when some are absent or outside the folder."""
    if (folder / WEIGHTS).is_file():  # transformers also prefers it
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map", {})
        named = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for shard in named:
            if (
                not isinstance(shard, str)
                or "\0" in shard
                or not shard.endswith(".safetensors")
                or Path(shard).name != shard
            ):
                raise InputError(
                    f"{folder / INDEX} of the model {name!r} must name safetensors files beside it. Got "
                    f"{brief(repr(shard))} instead."
                )
        shards = [folder / shard for shard in sorted(set(named))]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent or not shards:
            raise InputError(
                f"{folder / INDEX} of the model {name!r} names files that do not exist: {brief(', '.join(absent))}."
                if absent
                else f"{folder / INDEX} of the model {name!r} names no files."
            )
        if not isinstance(index.get("metadata"), dict):  # otherwise the library raises a KeyError
            raise InputError(
                f"{folder / INDEX} of the model {name!r} must have an object `metadata`, which transformers requires: "
                f"an "
                "empty one is enough."
            )
        return shards
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    if other:
        raise InputError(
            f"The folder {folder} of the model {name!r} has {', '.join(other)}, but neither {WEIGHTS} nor {INDEX}."
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained({str(folder)!r})"
        )
        raise InputError(
            f"The folder {folder} of the model {name!r} has its weights as {brief(', '.join(pickles))}, and only "
            "safetensors is read, because a pickle can run code: if you trust its source, convert pytorch_model*.bin "
            f"with python -c {shlex.quote(code)}"
        )
    raise InputError(f"The folder {folder} of the model {name!r} has no weights: {WEIGHTS} or {INDEX} is needed.")


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file, from the index; empty for a model in one file. weight_files has checked the files' names."""
    if (folder / WEIGHTS).is_file():
        return {}
    return dict(read_json(folder / INDEX).get("weight_map", {}))


def check_floating(name: str, folder: Path, files: Mapping[Path, Sequence[Header]]) -> None:
    """Raise InputError when the weights of a model are codes of a quantiser, which config.json may not mention.

    files: the tensors of each of the model's files.
    """
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"The model {name!r} must hold whole weights. Got an adapter for other weights instead, "
            f"{folder / ADAPTER}: merge it first."
        )
    for other in QUANTISED_FILES:
        if (folder / other).is_file():
            raise InputError(
                f"The model {name!r} must be in floating point. Got a quantised one instead: {folder} has {other}."
            )
    for path, tensors in files.items():
        for tensor, shape, dtype in tensors:
            narrow = dtype.startswith(CODES) and not recomputed(tensor, shape)
            if len(shape) > 1 and not dtype.startswith(FLOATING) and (narrow or tensor.endswith("weight")):
                raise InputError(
                    f"The model {name!r} must be in floating point. Got {tensor} of dtype {dtype} in {path} instead."
                )


def recomputed(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file is not a weight: a mask or positions, which older versions saved too."""
    mask = len(shape) == 4 and tuple(shape[:2]) == (1, 1) and shape[2] == shape[3]
    return mask or name.endswith(RECOMPUTED)


def check_safetensors(path: Path) -> list[Header]:
    """The tensors of a file, without reading weights.

    Raises InputError when the file does not match its header, or the header violates the format.
    """
    size = path.stat().st_size
    length, tensors = _header(path)
    expected = 8 + length + max((end for *_, end in tensors.values()), default=0)
    if size != expected:
        what = "is cut off" if size < expected else "is too long"
        raise InputError(f"{path} {what}: it has {size} bytes, and its header says {expected}.")
    return _named(tensors)


def tensors_of(path: Path) -> list[Header]:
    """The tensors of a safetensors file. Raises InputError for a damaged header."""
    return _named(_header(path)[1])


def _named(tensors: Mapping[str, tuple[tuple[int, ...], str, int, int]]) -> list[Header]:
    return [(name, shape, dtype) for name, (shape, dtype, *_) in tensors.items()]


def _header(path: Path) -> tuple[int, dict[str, tuple[tuple[int, ...], str, int, int]]]:
    """Length of the header in bytes, and name -> (shape, dtype, begin, end) of every tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > LONGEST_HEADER:
            raise InputError(f"{path} is not a safetensors file: it does not begin with the length of a header.")
        header = file.read(length)
    if len(header) < length:
        raise InputError(f"{path} is cut off: it has {size} bytes, and its header alone takes {length}.")
    try:
        if not header.startswith(b"{"):
            raise ValueError("another kind of JSON")
        pairs = json.loads(header, object_pairs_hook=list)
        found = {name: _tensor(dict(own)) for name, own in pairs if name != "__metadata__"}
        if len(found) != sum(name != "__metadata__" for name, _ in pairs):
            raise ValueError("a name twice")
        end = 0
        for _, _, first, last in sorted(found.values(), key=lambda tensor: tensor[2:]):
            if first != end:
                raise ValueError("tensors that overlap or leave holes")
            end = last
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is not a safetensors file: its header cannot be read.") from None
    return length, found


def _tensor(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], str, int, int]:
    shape, dtype, (first, last) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError("sizes that are not numbers")
    if (last - first) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError("a size that is not its shape's")
    return tuple(shape), dtype, first, last


def model_folder(spec: Spec) -> Path:
    """Local folder of the model: for a hub model, the fetched snapshot, so that all jobs see one commit.

    A missing snapshot is fetched, and a GGUF file is converted. Raises InputError when this fails.
    """
    if "path" in spec:
        return locate(spec["path"])
    if "gguf" in spec:
        return gguf_conversion.converted(spec)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec["hub"], revision=spec["revision"], local_files_only=True))
    except LocalEntryNotFoundError:
        return fetch_model(spec)
