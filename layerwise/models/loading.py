"""Load any Hugging Face decoder-only language model, and find its blocks and linear layers by structure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from layerwise.models.shards import Shards
from layerwise.models.stored_dtypes import mark, native_dtypes, round_as_stored, stored_dtype
from layerwise.models.structure import few
from layerwise.runtime.errors import InputError, out_of_memory
from layerwise.runtime.sentences import reason
from layerwise.sources.checkpoint_files import check_weight_files, model_folder, recomputed
from layerwise.sources.config_faults import config_fault
from layerwise.sources.hub import read_json
from layerwise.sources.model_config import DEFAULTED, language_config

OF_QUANTISED = ("scale", "zero", "qweight", "g_idx", "absmax", "quant_state", "quant_map", "packed")
EXPERTS = "eager"  # transformers' implementation that runs one expert after another with torch's own products


# ---------------------------------------------------------------------------------------------------------- loading


def described(spec: Mapping[str, Any]) -> str:
    """A model's name in error messages."""
    if spec.get("path"):
        return f"the model folder {spec['path']}"
    if spec.get("gguf"):
        return f"the GGUF file {spec['gguf']}"
    return f"the hub model {spec['hub']}" + (f" at revision {spec['revision']}" if spec.get("revision") else "")


def source(spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder and keyword arguments of from_pretrained for a model.

    Raises InputError for a folder that is absent or lacks config.json or complete safetensors weights, and for a hub
    model that cannot be fetched.
    """
    folder = model_folder(spec)
    if not folder.is_dir():
        raise InputError(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        raise InputError(f"The model folder {folder} has no config.json.")
    check_weight_files(str(spec.get("name", folder)), folder)
    # A local folder never uses the network.
    return str(folder), {"trust_remote_code": bool(spec.get("trust_remote_code", False)), "local_files_only": True}


@contextmanager
def sentences(spec: Mapping[str, Any]) -> Iterator[None]:
    """Context in which a library's exception about a model that cannot be loaded becomes an InputError."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"The weights of {described(spec)} are damaged or incomplete: {reason(error)}.") from error
    except InputError:
        raise
    except Exception as error:  # unexpected types in config.json can raise anything
        if out_of_memory(error):
            raise
        if fault := config_fault(model_folder(spec), error, bool(spec.get("trust_remote_code"))):
            raise fault from error
        kind = (
            "" if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) else f"{type(error).__name__}: "
        )
        raise InputError(f"Cannot load {described(spec)}: {kind}{reason(error)}.") from error


def read_config(spec: Mapping[str, Any]) -> tuple[str, PreTrainedConfig, dict[str, Any]]:
    """Folder, config and keyword arguments of the library's loaders for a model.

    Raises InputError for a model that is absent or already quantised.
    """
    transformers_logging.disable_progress_bar()  # the scripts show their own bars
    name, options = source(spec)
    with sentences(spec):
        config = AutoConfig.from_pretrained(name, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"The model must be in floating point. Got {described(spec)} instead, which is already quantised."
        )
    config._experts_implementation = EXPERTS
    return name, config, options


def check_names(
    spec: Mapping[str, Any], model: nn.Module, mismatched: Collection[str], missing: Collection[str]
) -> None:
    """Raise InputError for tensors whose shape contradicts the config, and for missing tensors."""
    if mismatched:
        raise InputError(
            f"The weights of {described(spec)} must have the shapes of its config. Got {len(mismatched)} tensors of "
            f"another shape instead: {few(mismatched)}{told_of(spec, model)}."
        )
    if missing:  # without tied weights and computed buffers
        raise InputError(
            f"The weights of {described(spec)} lack tensors of {type(model).__name__}: "
            f"{few(missing)}{told_of(spec, model)}."
        )


def told_of(spec: Mapping[str, Any], model: nn.Module) -> str:
    """The end of a sentence about wrong tensors: the possible reason in config.json."""
    file, config = read_json(model_folder(spec) / "config.json"), cast(Any, model.config)
    own = config.get_text_config()
    said = {own.attribute_map.get(key, key) for key in language_config(file)}
    taken = [f"{key} ({value})" for key, value in own.to_dict().items() if key in DEFAULTED and key not in said]
    kinds = file.get("architectures")
    told = ""
    if isinstance(kinds, list) and kinds and type(model).__name__ not in kinds:
        told += f"; its config.json says that they are of {few(map(str, kinds))}"
    return told + (f"; its config.json leaves {', '.join(taken)} to transformers' defaults" if taken else "")


def check_used(spec: Mapping[str, Any], model: nn.Module, unused: Mapping[str, Tensor]) -> None:
    """Raise InputError for tensors of the files that the model does not use, except masks and the like.

    unused: name in the files -> tensor of the shape and dtype there, without tensors that the model's class ignores.
    """
    names = [name for name, tensor in unused.items() if not recomputed(name, tensor.shape)]
    if names:
        advice = ": they belong to a quantised model, and one in floating point is needed" if quantised(names) else ""
        raise InputError(
            f"The weights of {described(spec)} hold {len(names)} tensors that {type(model).__name__} does not take: "
            f"{few(names)}{advice}."
        )


def quantised(names: Iterable[str]) -> bool:
    """Whether tensors have names of scales, codes and zero points."""
    return any(part in name.rpartition(".")[2] for name in names for part in OF_QUANTISED)


def check_finite(spec: Mapping[str, Any], parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise InputError for the first weight that is not finite."""
    for name, value in parameters:
        if not torch.isfinite(value).all():
            raise InputError(f"The weights of {described(spec)} must be finite. Got NaN or Inf in {name} instead.")


def load(
    spec: Mapping[str, Any], device: str | torch.device = "cpu", compute_dtype: str | None = None
) -> PreTrainedModel:
    """The model of a config entry {path | hub, revision, dtype, trust_remote_code}, whole and ready for inference.

    It is in eval mode, without gradients, in the entry's dtype (default: the dtype in which it was saved), with the
    library's default attention and eager experts, whose products are recorded one by one. compute_dtype: dtype of
    tensors and passes, if it differs from the entry's (`models/compute_dtype.py`). The tensors then hold values of the
    entry's dtype, and values written to them are rounded to it (`models/stored_dtypes.py`). Raises InputError, in one
    sentence, when the model is absent, damaged, incomplete (transformers would initialise missing weights randomly) or
    already quantised, has tensors that its class does not use, or has weights that are not finite.
    """
    name, config, options = read_config(spec)
    with sentences(spec):
        shards = Shards(str(spec.get("name", name)), Path(name))
        own: dict[str, Any] = {
            "config": config,
            "dtype": compute_dtype or spec.get("dtype") or "auto",
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # refused below, by name
        }
        loaded: Any
        if shards.repeated:  # the library would take a repeated tensor from the last file, against the index
            with torch.device("meta"):
                kind: Any = type(
                    AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])
                )
            loaded = kind.from_pretrained(None, state_dict=shards.read(shards.empty), **own)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **own, **options)
    model, info = loaded
    check_names(spec, model, [key for key, *_ in info["mismatched_keys"]], info["missing_keys"])
    check_used(spec, model, {key: shards.empty[key] for key in info["unexpected_keys"]})
    check_finite(spec, model.state_dict().items())
    if compute_dtype and compute_dtype != spec["dtype"]:
        keep_as_stored(model, getattr(torch, spec["dtype"]), options["trust_remote_code"])
        round_as_stored(model)
        check_finite(spec, model.state_dict().items())  # float16 may overflow
    return model.to(device).eval().requires_grad_(False)


def read_generation_config(model: PreTrainedModel, spec: Mapping[str, Any]) -> None:
    """Load a model's generation config from its folder, as from_pretrained does: stop tokens, penalties.

    A model that is read block by block lacks it. Raises InputError for an unusable file.
    """
    if not model.can_generate() or model.generation_config is None:
        return
    folder, _ = source(spec)
    file = Path(folder) / "generation_config.json"
    if file.is_file():
        with sentences(spec):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def keep_as_stored(model: PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Record in a model its storage dtype, if it is computed in another. dtype: dtype of most tensors."""
    mark(model, native_dtypes(model.config, dtype, trust_remote_code), dtype)


def set_threads(threads: int | None) -> None:
    """Set the number of threads within torch's operations; between operations, one thread, because no job limits
    these."""
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    if threads:
        torch.set_num_threads(threads)


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype in which a model's weights are stored, as the config spells it."""
    return str(stored_dtype(model)).removeprefix("torch.")


def computed_dtype(model: PreTrainedModel) -> str:
    """The dtype in which a model's passes are computed, as the config spells it."""
    return str(model.dtype).removeprefix("torch.")


def vocabulary(model: PreTrainedModel) -> int:
    """Number of tokens that the model embeds."""
    return model.get_input_embeddings().get_parameter("weight").shape[0]


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise InputError when the tokens [sequences, length] cannot belong to the model."""
    whole = tokens.dtype in (torch.int32, torch.int64)  # an embedding takes no others
    if not whole or tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise InputError(
            "Tokens must be int32 or int64 [sequences, length], of at least one sequence and two tokens. "
            f"Got {tokens.dtype} {list(tokens.shape)} instead."
        )
    words, low, high = vocabulary(model), int(tokens.min()), int(tokens.max())
    if low < 0 or high >= words:
        raise InputError(
            f"The tokens must be 0 to {words - 1}, which the model embeds. Got {low} to {high} instead: "
            "do the tokenizer and the model belong together?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < tokens.shape[1]:  # XLNet gives -1 for any number
        raise InputError(
            f"The sequences must have at most {positions} tokens for this model. Got {tokens.shape[1]} instead."
        )
