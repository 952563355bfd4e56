"""Convert a GGUF file once to a local folder that any job can read: safetensors, config.json and tokenizer.

The folder is in the store of gguf_files.py. Its name is a hash of the file's SHA-256, the versions of the libraries,
and this code. torch and transformers are imported only when a file is converted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.runtime.errors import InputError, out_of_memory
from layerwise.runtime.files import digest_of, sha256, write_atomic, writing
from layerwise.runtime.project import portable
from layerwise.runtime.sentences import brief, reason
from layerwise.sources import gguf_files, gguf_header, gguf_models, gguf_tokenizer
from layerwise.sources.gguf_header import PLAIN, Header
from layerwise.sources.hub import Spec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

RECORD = "gguf.json"  # file in a converted folder with its source and the SHA-256 of its files
LIBRARIES = ("gguf", "transformers", "tokenizers")
SHARD = "5GB"  # largest file of weights
# keys of the config that record how it was loaded
NOT_SAVED = ("quantization_config", "_model_name_or_path", "_name_or_path")
HALVES = {"F16": "float16", "BF16": "bfloat16"}


def folder_of(spec: Spec) -> Path:
    """The folder for the conversion of an entry's file."""
    made = {"sha256": gguf_files.content(spec), **made_by()}
    return gguf_files.store() / hashlib.sha256(json.dumps(made).encode()).hexdigest()[:32]


@functools.cache  # the code imported by this process, even if it is edited later
def made_by() -> dict[str, str]:
    """The code and library versions on which a conversion depends."""
    code = [str(module.__file__) for module in (gguf_header, gguf_models, gguf_tokenizer)]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"code": digest_of(map(portable, [*code, __file__])), **versions}


def converted(spec: Spec) -> Path:
    """Folder of an entry's file, which is converted if the folder is absent or incomplete.

    Raises InputError, in one sentence, for an unsupported file.
    """
    folder = folder_of(spec)
    if whole(folder):
        return folder
    header = gguf_files.fetched_header(spec)
    with new_folder(folder) as part:
        convert(spec, header, part)
        made = {path.name: sha256(path) for path in sorted(part.iterdir()) if path.is_file()}
        record = {"gguf": gguf_files.named(spec), "sha256": gguf_files.content(spec), "wheel": spec.get("sha256")}
        write_atomic(part / RECORD, json.dumps(record | {"files": made}, indent=1) + "\n")
    return folder


def whole(folder: Path) -> bool:
    """Whether a converted folder has all its files; the fingerprint compares their content with their hashes."""
    try:
        return all((folder / name).is_file() for name in made_files(folder))
    except (OSError, ValueError, KeyError):
        return False


def made_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of a converted folder."""
    return json.loads((folder / RECORD).read_text("utf-8"))["files"]


def check_made(folder: Path, found: Mapping[str, str]) -> None:
    """Raise InputError, and remove the folder, when one of its files has changed since the conversion.

    found: name -> SHA-256 of the current files.
    """
    for name, known in made_files(folder).items():
        if found.get(name, known) != known:
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"{folder / name} is damaged: it has changed since the conversion from a GGUF file; run again."
            )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed when the body ends without an error and its content is on the disk.

    Another process may make the same folder meanwhile; the first complete one is kept.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    with writing(folder):
        part.mkdir(parents=True)
        try:
            yield part
            for path in part.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if not whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            try:
                part.rename(folder)
            except OSError:
                if not whole(folder):
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def convert(spec: Spec, header: Header, out: Path) -> None:
    """Write the model of an entry's file to a folder."""
    subject = f"The GGUF file {gguf_files.named(spec)}"
    print(f"{subject} ({header.quantisation}) is converted once.", file=sys.stderr)
    alone = out / "alone"  # a folder with the file alone, so that no neighbouring file is read as a part of it
    alone.mkdir()
    gguf_files.place_at(spec, alone / "model.gguf")
    model = load(alone, header, subject)
    shutil.rmtree(alone)
    save_weights(model, header, out)
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_SAVED}
    config["architectures"] = [type(model).__name__]
    write_atomic(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    gguf_tokenizer.write_tokenizer(header, subject, out)


def load(folder: Path, header: Header, subject: str) -> PreTrainedModel:
    """The model of model.gguf in a folder, in float32. Raises InputError if tensors are unused or missing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # only once, because it takes seconds for a long vocabulary
        said = load_gguf_checkpoint(folder / "model.gguf")["config"]
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=AutoConfig.for_model(**said | gguf_models.supplied(header)),
            gguf_file="model.gguf",
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
        model, told = loaded
        left = unused(model, header)
    except Exception as error:  # unexpected metadata can raise anything in the library
        if out_of_memory(error):
            raise
        raise InputError(f"{subject} cannot be read by transformers: {reason(error)}.") from error
    wrong = [key for key, *_ in told["mismatched_keys"]] or sorted(told["missing_keys"])
    if wrong:
        raise InputError(
            f"{subject} must have every tensor of {type(model).__name__}, in its shape. Got {len(wrong)} that are "
            f"missing or have another shape instead, such as {brief(wrong[0], 80)}."
        )
    if left:
        raise InputError(
            f"{subject} must have no tensors that {type(model).__name__} does not use. Got {len(left)} instead, such "
            f"as {brief(left[0], 80)}."
        )
    return model


def unused(model: PreTrainedModel, header: Header) -> list[str]:
    """Names of the tensors of a file that transformers ignores because they match no weight of the model."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    taken = get_gguf_hf_weights_map(model, processor)
    tied = {gguf_models.OUTPUT} if model.config.tie_word_embeddings else set()
    whole = {f"{name}.weight" for name in taken}  # experts in one tensor, whose name in the model has no .weight
    return sorted(header.names - set(taken) - tied - whole)


def save_weights(model: PreTrainedModel, header: Header, out: Path) -> None:
    """Write the weights: in half precision for a file with half-precision values, otherwise in float32."""
    import torch
    from huggingface_hub import save_torch_state_dict

    kinds = {tensor.kind for tensor in header.tensors}
    halves = [getattr(torch, HALVES[kind]) for kind in HALVES if kind in kinds] if kinds <= set(PLAIN) else []
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            exact = (half for half in halves if torch.equal(tensor.to(half).to(tensor.dtype), tensor))
            state[name] = tensor.to(next(exact, tensor.dtype)).contiguous()
    save_torch_state_dict(state, out, max_shard_size=SHARD)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # the library makes them private, but a store may be shared
