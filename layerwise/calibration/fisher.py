"""The statistic `fisher` of a dense model's linear layers, from backward passes of its loss.

For a weight W [out, in], let L_s be the mean cross-entropy in nats of the tokens of sequence s (except the first),
given the tokens before:

    f_i = sum_j mean_s (dL_s / dW_ij)^2

This is the squared gradient of a sequence's mean loss, averaged over the sequences and summed over each row (FWSVD, Hsu
et al., section 4: the empirical Fisher information with a sequence as one datum).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration import fisher_store
from layerwise.calibration.gram_store import content
from layerwise.models import loading
from layerwise.models.structure import Linear, check_unshared, find_blocks, model_linears, parameter_of
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.runtime.devices import take
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import unchanged, whole_file
from layerwise.sources.fingerprint import check_unchanged
from layerwise.sources.tokens import read_tokens

PART = 8  # a killed job resumes after the last complete part of this many sequences


class Gradients:
    """Context in which `add` passes one sequence at a time forward and backward through a model.

    Only the row sums of a gradient's squares are kept, in float64. The gradient is freed before the next one is
    computed. A block stores only its inputs, and is run again in the backward pass. The model is left unchanged.

    totals: layer -> [out] float64, the sums over the sequences so far.
    """

    def __init__(self, model: PreTrainedModel, totals: Mapping[str, Tensor] | None = None) -> None:
        """totals: the totals of earlier sequences. Raises InputError for blocks that share weights."""
        check_unshared(model)
        self.model = model
        layers = model_linears(model)
        self.device = next(iter(layers.values())).stored().device
        self.totals = {
            name: torch.zeros(layer.shape[0], dtype=torch.float64, device=self.device)
            if totals is None
            else totals[name].to(self.device)
            for name, layer in layers.items()
        }
        self._by_parameter: dict[Tensor, list[Linear]] = defaultdict(list)  # several layers for experts
        for layer in layers.values():
            self._by_parameter[parameter_of(layer)].append(layer)
        self._stack = ExitStack()

    def __enter__(self) -> Gradients:
        for parameter in self.model.parameters():
            self._stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in self._by_parameter)
        for parameter, layers in self._by_parameter.items():
            handle: Any = parameter.register_post_accumulate_grad_hook(partial(self._see, layers))
            self._stack.callback(handle.remove)
        for block in find_blocks(self.model)[1]:
            self._stack.callback(run_again(block))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _see(self, layers: Iterable[Linear], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # the hook runs after it is accumulated
        for layer in layers:
            own = gradient if layer.expert is None else gradient[layer.expert]
            norms = torch.linalg.vector_norm(own, dim=0 if layer.transposed else 1, dtype=torch.float64)
            self.totals[layer.name] += norms.square()

    def add(self, tokens: Tensor) -> None:
        """Pass a sequence of tokens [length] forward and backward."""
        with torch.enable_grad():
            own = tokens[None].to(self.device)
            logits = self.model(input_ids=own, use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits.float(), own[0, 1:]).backward()

    def means(self, sequences: int) -> dict[str, Tensor]:
        """Layer -> f [out] float32, the means over this many sequences. Raises InputError if one is not finite."""
        found = {name: (total / sequences).float() for name, total in self.totals.items()}
        for name, own in found.items():
            if not torch.isfinite(own).all():
                raise InputError(f"The squared gradients of {name} must be finite in float32. Got NaN or Inf instead.")
        return found


def run_again(block: nn.Module) -> Callable[[], None]:
    """Make a block store only its inputs for the backward pass; returns a function that undoes this."""
    own = vars(block).get("forward")
    block.forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)

    def undo() -> None:
        del block.forward
        if own is not None:
            block.forward = own

    return undo


def of_model(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Layer -> f [out] float32 of a model in float32, in eval mode, for tokens [sequences, length]; the model is
    unchanged.

    Raises InputError for tokens outside the model's vocabulary, blocks that share weights, another dtype, and gradients
    that are not finite.
    """
    check(model, tokens)
    with Gradients(model) as gradients:
        for sequence in tokens:
            gradients.add(sequence)
    return gradients.means(len(tokens))


def check(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise InputError for a model or tokens whose gradients cannot be computed."""
    loading.check_tokens(model, tokens)
    if other := next((own.dtype for own in model.parameters() if own.dtype != torch.float32), None):
        raise InputError(f"The model must be in float32 for gradients of its loss. Got {other} instead.")


def write_fisher(
    path: Path,
    model: PreTrainedModel,
    tokens: Tensor,
    fingerprint: Mapping[str, Any],
    check_source: Callable[[], None] = lambda: None,
) -> None:
    """Write f of every linear layer of a model's blocks for tokens [sequences, length], in the form that fisher_store
    reads.

    A killed process leaves its sums, saved every PART sequences, next to the file. The next process resumes there if
    its fingerprint is the same. check_source: raises InputError if the model no longer matches its fingerprint.
    """
    check(model, tokens)
    folder = path.with_name(f".{path.stem}.part")
    with Checkpoint(folder, fingerprint, check_source, "parts of the sequences") as checkpoint:
        done = checkpoint.done
        totals = load_file(checkpoint.file(done - 1, "safetensors")) if done else None
        parts = tokens.split(PART)
        with (
            Gradients(model, totals) as gradients,
            tqdm(total=len(tokens), initial=min(done * PART, len(tokens)), desc="fisher", unit="sequence") as shown,
        ):
            for index in range(done, len(parts)):
                for sequence in parts[index]:
                    gradients.add(sequence)
                    shown.update()
                with whole_file(checkpoint.file(index, "safetensors")) as part:
                    save_file({name: total.to("cpu") for name, total in gradients.totals.items()}, part)
                checkpoint.finish(index)
            found = gradients.means(len(tokens))
        samples, length = tokens.shape
        fisher_store.write(path, found, {"samples": samples, "length": length})
        checkpoint.remove()


def main(
    argv: list[str] | None = None, before: Callable[[Mapping[str, Any], Path, Path, str], object] | None = None
) -> None:
    """before: called first, with the model's entry, its fingerprint, the tokens' file and the device."""
    parser = argparse.ArgumentParser(prog="fisher", description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--code", type=Path, help="file that names the code on which the result depends, and its hash")
    parser.add_argument(
        "--out", type=Path, required=True, help="safetensors file to write, with a vector for each layer"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    loading.set_threads(args.threads)
    if before:
        before(args.model, args.fingerprint, args.tokens, args.device)
    code = unchanged(args.code) if args.code else ""
    fingerprint = content(args.fingerprint, args.model, args.tokens, "float32", code, args.device)
    check_source = partial(check_unchanged, args.model, args.fingerprint)
    check_source()  # before the model is opened; the checkpoint checks again
    take(args.device)
    tokens = torch.from_numpy(read_tokens(args.tokens)[0])
    model = loading.load(args.model, args.device).float()  # float32 with the values of the model's own dtype
    write_fisher(args.out, model, tokens, fingerprint, check_source)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
