"""Compress a loaded Hugging Face model in place, as a cell does, in memory and without files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerwise.calibration import fisher
from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.calibration.modes import in_turn, sequential_blocks
from layerwise.calibration.taps import Tap
from layerwise.compression.cell import bar, visit
from layerwise.compression.resolve import MethodLike, Resolved, as_target, needs, resolve, solve
from layerwise.contract.cards import NO_DRIFT
from layerwise.contract.gram import whole_number
from layerwise.contract.layer import Layer, UnsupportedTarget
from layerwise.contract.target import Target
from layerwise.evaluation.model_check import check_walk
from layerwise.models.loading import EXPERTS
from layerwise.models.structure import Blocks, find_blocks, linears, model_linears
from layerwise.runtime.errors import InputError, status_of
from layerwise.sources.documents import documents, lone_surrogate
from layerwise.sources.text_files import TEXT_SUFFIXES
from layerwise.sources.tokenizer_files import check_loaded
from layerwise.sources.tokens import sequences
from layerwise.storage.table_schema import columns, to_frame, typed
from layerwise.study.cell import canonical

ATTRIBUTE = "_experts_implementation"  # attribute of a config: how transformers multiplies by experts
MODES = ("shared", "sequential")
SAMPLINGS = ("stream", "documents")
LONGEST = 2048  # tokens per sequence if no length is given and the model takes this many


def compress_model(
    model: PreTrainedModel,
    tokenizer_or_tokens: PreTrainedTokenizerBase | Tensor,
    target: Target | str,
    method: MethodLike,
    *,
    mode: str = "shared",
    text: str | Path | Sequence[str] | None = None,
    samples: int = 128,
    length: int | None = None,
    sampling: str = "stream",
    seed: int = 0,
    layers: str | Sequence[str] | Callable[[str], bool] | None = None,
    progress: bool = True,
    asymmetric: bool = False,
    **parameters: Any,
) -> pd.DataFrame:
    """Compress the linear layers of a causal language model's blocks in place; returns one row per layer.

    The numbers are those of a study's cell for the same tokens. Embeddings, the head, norms and routers are unchanged,
    and so are the model's dtype, device, training mode, requires_grad and config.

    model: whole in memory, on one device. target, method, parameters: as `compress_layer` takes them.
    tokenizer_or_tokens: calibration tokens [sequences, length], integers; or the model's tokenizer, with `text`.
    A method that needs the fisher of the loss (fwsvd) passes the tokens back through the model, or, where it is not in
    float32, through a copy that is.
    mode: "shared": every layer sees the inputs that it has in the dense model. "sequential": every layer sees inputs
        that passed through the compressed blocks before it, as in the published code. In shared mode nothing has
        drifted: a method that needs the cross-Gram (gptaq, foem, qronos) then gives a UserWarning that says so.
    text: the source of the tokens: a text, a list of documents, or the path of a .txt, .jsonl, .json or .parquet file.
    samples, length: number and length of the drawn sequences. length None: the model's maximum, but at most 2048.
    sampling: "stream": crops of the joined text, as published for WikiText-2; "documents": crops of documents, as for
        C4.
    seed: seed of the draw, and of the random numbers of a method that draws any.
    layers: the layers to compress: patterns such as "*.mlp.*", or a function of a layer's name; None means all.
    progress: whether to show a bar on stderr.
    asymmetric: whether to pass the tokens through the dense model too in sequential mode, so that `asymmetric_error` is
        known for any method. Methods that need the cross-Gram do so in any case.

    The table has the columns of a study's `layers` table that apply; output_error is the share of the layer's output
    that is lost, in float64 on the Gram of its mode.
    Raises ValueError, in one sentence, for arguments that do not fit, or its subclasses CatalogueError and
    UnsupportedTarget. Raises InputError when the model's structure is unknown, the model is not causal or is not a
    plain sequence of blocks, the text is too short, or a method fails on a layer. If some layers are already
    compressed, the sentence names them. They stay compressed, and the others are unchanged.
    """
    goal = as_target(target)
    for name, value, known in (("mode", mode, MODES), ("sampling", sampling, SAMPLINGS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}. Got {value!r} instead.")
    check(model)
    seed = whole_number(seed, "seed", 0)
    chosen = chosen_layers(model, layers)
    resolved = resolve(method, parameters, goal)
    tokens = calibration_tokens(model, tokenizer_or_tokens, text, samples, length, sampling, seed)
    solver = resolved.solver(goal, seed, model.dtype)
    shapes = {name: own.shape for name, own in model_linears(model).items() if name in chosen}
    resolved.check_inputs(goal, {name: inputs for name, (_, inputs) in shapes.items()})
    if sentence := solver.without_factors(shapes):
        raise UnsupportedTarget(sentence)
    asked = needs(resolved.method)
    if "fisher" in asked and mode == "sequential":
        raise ValueError(
            f"mode must be 'shared' for {resolved.name}, whose fisher is of the dense model's loss. Got 'sequential' "
            "instead."
        )
    for sentence in resolved.idle(goal):
        warnings.warn(sentence, stacklevel=2)
    if "cross_gram" in asked and mode == "shared":
        warnings.warn(f"{resolved.name}: {NO_DRIFT}", stacklevel=2)
    done: list[str] = []
    rows = []
    with as_it_was(model), saying(done, len(chosen)):
        check_walk(Blocks(model), Blocks(model), tokens)
        stream = Stream(model, tokens, beside=mode == "sequential" and (asymmetric or "cross_gram" in asked))
        fishers = fisher.of_model(in_float32(model), tokens) if "fisher" in asked else None
        walked = (
            enumerate(map(in_turn, shared(stream)))
            if mode == "shared"
            else sequential_blocks(stream, stays=partial(outside, chosen, model), renewed="cross_gram" in asked)
        )
        title = f"{resolved.name} {goal.label} {mode}"
        with bar(model, title, total=len(chosen)) if progress else nullcontext(ignore) as shown:

            def report(row: Mapping[str, Any]) -> None:
                done.append(row["layer"])
                shown(row)

            def solved(layer: Layer) -> tuple[Any, dict[str, Any]]:
                return solve(solver, layer)

            rows += [row for row, _ in visit(model, only(walked, chosen), solved, report, fishers)]
    return table(rows, resolved, goal, mode, seed)


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it is in float32, otherwise a float32 copy."""
    narrow = any(own.dtype != torch.float32 for own in model.parameters())
    return copy.deepcopy(model).float() if narrow else model


def ignore(row: Mapping[str, Any]) -> None:
    """Stands for a progress bar that is not shown."""


def check(model: PreTrainedModel) -> None:
    """Raise ValueError or InputError for a model that cannot be compressed in place."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a loaded transformers model. Got {type(model).__name__} instead.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("The model must be in floating point. Got one that is already quantised instead.")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise InputError(f"model must be whole on one device. Got {', '.join(devices) or 'no parameters'} instead.")


def chosen_layers(model: PreTrainedModel, layers: str | Sequence[str] | Callable[[str], bool] | None) -> set[str]:
    """Names of the layers to compress. Raises ValueError when there is none, or a pattern fits none."""
    names = list(model_linears(model))
    if layers is None:
        return set(names)
    if callable(layers):
        found = {name for name in names if layers(name)}
        if not found:
            raise ValueError(f"layers must choose at least one of the {len(names)} linear layers. Got none instead.")
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    found = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"layers must be patterns, or a function of a layer's name. Got {pattern!r} instead.")
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(f"layers must fit names such as {names[0]}. Got {pattern!r} instead.")
        found |= fitting
    if not found:
        raise ValueError(f"layers must choose at least one of the {len(names)} linear layers. Got none instead.")
    return found


def outside(chosen: set[str], model: PreTrainedModel, index: int) -> bool:
    """Whether none of a block's layers is chosen."""
    name, blocks = find_blocks(model)
    return chosen.isdisjoint(layer.name for layer in linears(blocks[index], f"{name}.{index}"))


def only(blocks: Iterable[tuple[int, Iterable[Tap]]], chosen: set[str]) -> Iterator[tuple[int, Iterator[Tap]]]:
    """The blocks' taps, restricted to the chosen layers."""

    def of(taps: Iterable[Tap]) -> Iterator[Tap]:
        for tap in taps:
            pairs = [pair for pair in zip(tap.layers, tap.inside, strict=True) if pair[0] in chosen]
            if pairs:
                names, inside = zip(*pairs, strict=True)
                yield replace(tap, layers=names, inside=inside)
            del tap  # frees its Gram before the next tap is read

    for index, taps in blocks:
        yield index, of(taps)


def calibration_tokens(
    model: PreTrainedModel,
    tokenizer_or_tokens: PreTrainedTokenizerBase | Tensor,
    text: str | Path | Sequence[str] | None,
    samples: int,
    length: int | None,
    sampling: str,
    seed: int,
) -> Tensor:
    """The given tokens, or tokens [samples, length] drawn from the text as a study draws them."""
    if isinstance(tokenizer_or_tokens, Tensor):
        if text is not None:
            raise ValueError("text must be given with a tokenizer. Got it with tokens instead.")
        return tokenizer_or_tokens  # the stream checks the tokens
    if not callable(tokenizer_or_tokens):
        came = type(tokenizer_or_tokens).__name__
        raise ValueError(f"The second argument must be tokens [sequences, length] or a tokenizer. Got {came} instead.")
    if text is None:
        raise ValueError("text must be given with a tokenizer: a text, documents or a file. Got None instead.")
    if length is None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = min(LONGEST, positions) if isinstance(positions, int) else LONGEST
    cut = {"samples": whole_number(samples, "samples"), "length": whole_number(length, "length"), "seed": seed}
    found = documents_of(text)
    check_loaded(tokenizer_or_tokens, found[0])
    drawn, _ = sequences(tokenizer_or_tokens, found, cut, sampling)
    return torch.from_numpy(drawn)


def documents_of(text: str | Path | Sequence[str]) -> list[str]:
    """The documents of a file or a list; a single text is one document."""
    if isinstance(text, Path) or (isinstance(text, str) and text.endswith(TEXT_SUFFIXES) and "\n" not in text):
        return documents({"path": str(text)})
    if not isinstance(text, Iterable):
        raise ValueError(f"text must be a text, a list of documents or a file's path. Got {text!r} instead.")
    found = [text] if isinstance(text, str) else list(text)
    if not found or not all(isinstance(document, str) for document in found):
        came = next((type(document).__name__ for document in found if not isinstance(document, str)), "none")
        raise ValueError(f"text must hold at least one document, each a str. Got {came} instead.")
    for number, document in enumerate(found, 1):
        if (place := lone_surrogate(document)) is not None:
            raise ValueError(
                f"text must hold whole characters. Got half of one, the lone surrogate {document[place]!r}, as "
                f"character {place} of document {number} instead."
            )
    return found


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model is ready for calibration. Afterwards its modes and configs are restored."""
    training = {module: module.training for module in model.modules()}
    configs = {id(own): own for module in model.modules() if (own := getattr(module, "config", None)) is not None}
    experts = [(own, getattr(own, ATTRIBUTE)) for own in configs.values() if hasattr(own, ATTRIBUTE)]
    model.eval()
    for config, _ in experts:
        setattr(config, ATTRIBUTE, EXPERTS)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, before in experts:
            setattr(config, ATTRIBUTE, before)


@contextmanager
def saying(done: Sequence[str], total: int) -> Iterator[None]:
    """Context in which an error names the layers that are already compressed."""
    try:
        yield
    except BaseException as error:
        if not done:
            raise
        told = f"{len(done)} of {total} layers of the model are already compressed: {', '.join(done)}"
        if not isinstance(error, Exception):  # such as Ctrl-C
            error.add_note(told)
            raise
        kind = type(error) if isinstance(error, InputError) else InputError
        raise kind(f"{status_of(error)[1].rstrip('.')} ({told}).") from error


def table(rows: Sequence[Mapping[str, Any]], resolved: Resolved, target: Target, mode: str, seed: int) -> pd.DataFrame:
    """The rows with the columns of the `layers` table that apply, in its order and types."""
    common = {
        "mode": mode,
        "label": resolved.name,
        "method": resolved.name,
        **({"comparison": resolved.entry.comparison(target)} if resolved.entry else {}),
        "target": target.label,
        **target.as_dict(),
        "params": canonical(resolved.params),
        "seed": seed,
    }
    full = [{**common, **row} for row in rows]
    names = [name for name in columns("layers") if name in full[0]]
    data = pa.Table.from_pylist([{name: row[name] for name in names} for row in full])
    return to_frame(typed(data, "layers", f"the layers of {resolved.name} {target.label}", names))
