"""Perplexity of a model with a cell's weights, as in the papers: windows do not overlap and are scored separately.

The same pass also gives the divergence from the dense model (divergence.py).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.evaluation.divergence import DenseStates, Divergence
from layerwise.models.loading import vocabulary
from layerwise.models.structure import Blocks, Linear, few, linears, model_linears
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import read_made, sha256
from layerwise.sources.tokens import read_tokens
from layerwise.storage.packed_file import PackedFile

if TYPE_CHECKING:
    from layerwise.evaluation.cache import Evaluation

ROWS = 1024  # rows of a window's logits converted to float32 at a time
LOGITS_AT_ONCE = 2**22  # logits of a batch, 16 MB in float32; on a CPU larger batches are slower (2**23 by 4%)
DECIMALS = 6  # decimals of the written losses


def batch_size(length: int, vocabulary: int) -> int:
    """Windows per forward pass, at least one, so that the logits stay within LOGITS_AT_ONCE."""
    return max(1, LOGITS_AT_ONCE // (length * vocabulary))


@torch.no_grad()
def window_losses(
    model: PreTrainedModel | Blocks, tokens: Tensor, batch: int, label: str = "perplexity", folder: Path | None = None
) -> Tensor:
    """Mean negative log likelihood [n] float64, in nats, of the L - 1 targets of each window [n, L].

    All windows pass one block before the next, so that each block is read once. Windows are scored separately, `batch`
    at a time; logits are converted to float32 ROWS at a time. folder: for the hidden states (default: in memory).
    """
    return losses_of(Stream(model, tokens, batch, folder), tokens, batch, label)


@torch.no_grad()
def losses_of(stream: Stream, tokens: Tensor, batch: int, label: str, divergence: Divergence | None = None) -> Tensor:
    """The same for a stream at the first block, which then knows where hidden states overflowed.

    divergence: also receives the logits.
    """
    last = len(stream.blocks) - 1
    losses = torch.empty(len(tokens), dtype=torch.float64)
    # (one tensor, because a small tensor per window would pin freed logits in the heap: 1.4 GB instead of 0.5 GB)
    with tqdm(total=last + 1, desc=label, unit="block", mininterval=0.5) as progress:
        for _ in to_last_block(stream):
            progress.update()
        with stream.source.open(last), stream.source.outside():
            for number, chunk in enumerate(tokens.split(batch)):  # [batch, L]
                logits = stream.logits(number, chunk)  # [batch, L, vocabulary]
                for place, (window, scores) in enumerate(zip(chunk.to(logits.device), logits, strict=True)):
                    losses[number * batch + place] = loss_of(scores[:-1], window[1:])
                if divergence:
                    divergence.add(number, chunk, logits)
        progress.update()
    return losses


def to_last_block(stream: Stream, first: int = 0) -> Iterator[int]:
    """Advance a stream from block `first` to the last one; yields the index of each block passed."""
    for index in range(first, len(stream.blocks) - 1):
        with stream.source.open(index):
            stream.advance(index)
        yield index


def loss_of(scores: Tensor, targets: Tensor) -> float:
    """Mean negative log likelihood of the targets [n], given their logits [n, vocabulary] of any float dtype."""
    parts = zip(scores.split(ROWS), targets.split(ROWS), strict=True)
    return float(torch.cat([cross_entropy(s.float(), t, reduction="none") for s, t in parts]).double().mean())


def perplexity(losses: Tensor | Sequence[float]) -> float:
    """exp of the mean loss of windows of equal length: the published exp(sum(loss L) / (n L)).

    Raises InputError, which names the first faulty window, when it is not finite.
    """
    losses = torch.as_tensor(losses, dtype=torch.float64)
    faults = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if faults:
        raise InputError(
            f"The perplexity is not finite: the loss of {len(faults)} of {len(losses)} windows is NaN or Inf; "
            f""
            f"the first is window {faults[0]}."
        )
    mean = float(losses.mean())
    try:
        return math.exp(mean)
    except OverflowError:
        raise InputError(f"The perplexity is not finite: the mean loss is {mean:.6g} nats.") from None


def apply_weights(model: PreTrainedModel | Blocks, path: Path) -> None:
    """Write a cell's weights to the linear layers of the model's blocks, one at a time; to lazy blocks when they are
    read.

    Raises InputError when the file cannot be read, or does not hold exactly these layers in their shapes.
    """
    file, blocks = PackedFile(path), model if isinstance(model, Blocks) else Blocks(model)
    layers_of(blocks.model, file)

    def write(index: int, block: nn.Module) -> None:
        for layer in linears(block, f"{blocks.name}.{index}"):
            layer.replace(file.read(layer.name).weight)

    blocks.change(write)


def layers_of(model: nn.Module, file: PackedFile) -> dict[str, Linear]:
    """Name -> linear layer of all blocks; InputError when the file does not hold exactly these in their shapes."""
    layers, path, names = model_linears(model), file.path, file.shapes.keys()
    if names - layers.keys():
        raise InputError(f"{path} has layers that the model lacks: {few(names - layers.keys())}.")
    if layers.keys() - names:
        raise InputError(f"{path} lacks layers of the model: {few(layers.keys() - names)}.")
    for name, layer in layers.items():
        if file.shapes[name] != layer.shape:
            raise InputError(f"{path} must hold {name} as {layer.shape}. Got {file.shapes[name]} instead.")
    return layers


def evaluate(
    model: PreTrainedModel | Blocks,
    tokens: Tensor,
    label: str = "perplexity",
    folder: Path | None = None,
    dense: DenseStates | None = None,
) -> dict[str, Any]:
    """Perplexity and its components, for tokens [n, L]. seconds: time of the forward passes.

    A perplexity that is not finite is None, with a reason. folder: for the hidden states (default: in memory). dense:
    the dense model's states on the same tokens, for the `divergence`, which is omitted without them.
    Raises InputError if tokens or dense states do not fit the model.
    """
    start = time.perf_counter()
    words = vocabulary(model.model if isinstance(model, Blocks) else model)
    batch = batch_size(tokens.shape[1], words)
    stream = Stream(model, tokens, batch, folder)
    divergence = Divergence(dense, stream, tokens) if dense else None
    losses = losses_of(stream, tokens, batch, label, divergence)
    seconds = time.perf_counter() - start
    try:
        found: dict[str, Any] = {"perplexity": perplexity(losses), "mean_loss": float(losses.mean())}
    except InputError as error:  # a model ruined by compression is a valid result
        where = f" In the forward pass, {stream.overflow}." if stream.overflow else ""
        found = {"perplexity": None, "mean_loss": None, "reason": f"the model has diverged: {error}{where}"}
    if divergence:
        found["divergence"] = divergence.result()
    return found | {
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "seconds": round(seconds, 3),
        "losses": [round(loss, DECIMALS) if math.isfinite(loss) else None for loss in losses.tolist()],
    }


def evaluate_cell(blocks: Blocks, evaluation: Evaluation) -> dict[str, Any]:
    """The result of an evaluation of this kind, for a model with the cell's weights."""
    tokens, text = read_tokens(evaluation.data)
    dense = DenseStates.read(evaluation.dense) if evaluation.dense else None
    if dense:
        dense.check(sha256(evaluation.data), read_made(evaluation.fingerprint)["files"])
    folder = evaluation.weights.with_name(f".states-{evaluation.data.stem}")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        return evaluate(blocks, torch.from_numpy(tokens), evaluation.name, folder, dense) | {"text": text}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
