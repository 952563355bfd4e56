"""Perplexity of a model with a cell's weights, as the papers compute it: windows that do not overlap, scored alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from workflow.scripts.models import Linear, check_tokens, few, model_linears, vocabulary
from workflow.scripts.packed import PackedFile
from workflow.scripts.runtime import InputError
from workflow.scripts.text import read_tokens

LOGITS_AT_ONCE = 2**23  # logits of a batch, 32 MB in float32: on a processor larger batches are slower
DECIMALS = 6  # of the losses written


def batch_size(length: int, vocabulary: int) -> int:
    """Windows per forward pass, at least one, so that the logits stay within LOGITS_AT_ONCE."""
    return max(1, LOGITS_AT_ONCE // (length * vocabulary))


@torch.inference_mode()
def window_losses(model: nn.Module, tokens: Tensor, batch: int, label: str = "perplexity") -> Tensor:
    """Mean negative log likelihood [n] float64, in nats, of the L - 1 targets of each window [n, L].

    Windows are scored alone, `batch` at a time; logits are taken to float32 one window at a time.
    """
    device = next(model.parameters()).device
    losses = torch.empty(len(tokens), dtype=torch.float64, device=device)
    # (one tensor: a small one kept per window pins the freed logits in the heap, 1.4 GB where 0.5 do)
    for start in tqdm(range(0, len(tokens), batch), desc=label, unit="batch", mininterval=0.5):
        chunk = tokens[start : start + batch].to(device)  # [batch, L]
        logits = model(input_ids=chunk, use_cache=False).logits  # [batch, L, vocabulary]
        for number, (window, scores) in enumerate(zip(chunk, logits, strict=True), start):
            losses[number] = cross_entropy(scores[:-1].float(), window[1:], reduction="none").double().mean()
    return losses.cpu()


def perplexity(losses: Tensor | Sequence[float]) -> float:
    """exp of the mean loss of windows of one length: the published exp(sum(loss L) / (n L)).

    Raises InputError, naming the first window at fault, when it is not finite.
    """
    losses = torch.as_tensor(losses, dtype=torch.float64)
    faults = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if faults:
        raise InputError(
            f"The perplexity is not finite: the loss of {len(faults)} of {len(losses)} windows is NaN or Inf, "
            f"first of window {faults[0]}."
        )
    mean = float(losses.mean())
    try:
        return math.exp(mean)
    except OverflowError:
        raise InputError(f"The perplexity is not finite: the mean loss is {mean:.6g} nats.") from None


def apply_weights(model: nn.Module, path: Path) -> None:
    """Write a cell's weights into the linear layers of the model's blocks, one at a time.

    Raises InputError when the file cannot be read, or does not hold exactly these layers in their shapes.
    """
    file = PackedFile(path)
    for name, layer in layers_of(model, file).items():
        layer.replace(file.read(name).weight)


def layers_of(model: nn.Module, file: PackedFile) -> dict[str, Linear]:
    """Name -> linear layer of all blocks; InputError when the file does not hold exactly these in their shapes."""
    layers, path, names = model_linears(model), file.path, file.shapes.keys()
    if names - layers.keys():
        raise InputError(f"{path} has layers that the model has not: {few(names - layers.keys())}.")
    if layers.keys() - names:
        raise InputError(f"{path} lacks layers of the model: {few(layers.keys() - names)}.")
    for name, layer in layers.items():
        if file.shapes[name] != layer.shape:
            raise InputError(f"{path} should hold {name} as {layer.shape}. Got {file.shapes[name]} instead.")
    return layers


def evaluate(model: PreTrainedModel, tokens: Tensor, label: str = "perplexity") -> dict[str, Any]:
    """Perplexity and what it was made of, for tokens [n, L]; seconds: of the forward passes.

    A perplexity that is not finite is None, with the reason.
    """
    check_tokens(model, tokens)
    start = time.perf_counter()
    losses = window_losses(model, tokens, batch_size(tokens.shape[1], vocabulary(model)), label)
    seconds = time.perf_counter() - start
    try:
        found: dict[str, Any] = {"perplexity": perplexity(losses), "mean_loss": float(losses.mean())}
    except InputError as error:  # a model that compression has ruined is a result, told as one
        found = {"perplexity": None, "mean_loss": None, "reason": f"the model has diverged: {error}"}
    return found | {
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "seconds": round(seconds, 3),
        "losses": [round(loss, DECIMALS) if math.isfinite(loss) else None for loss in losses.tolist()],
    }


def evaluate_text(model: PreTrainedModel, path: Path, label: str = "perplexity") -> dict[str, Any]:
    """The same of a file of evaluation tokens, with what the file says of its text."""
    tokens, text = read_tokens(path)
    return evaluate(model, torch.from_numpy(tokens), label) | {"text": text}
