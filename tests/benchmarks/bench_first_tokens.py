"""What errors at the first token of a sequence cost: KL of quantised models against how much their Grams weigh it.

    python -m tests.benchmarks.bench_first_tokens MODEL CALIBRATION EVALUATION --target "4b g64"

MODEL is a local folder; the other two are token files of a study (results/tokens/). Each line quantises the model by
one method on Grams (1 - w) G + w F, where G is that of all tokens and F that of the first token of each sequence; "-"
in place of w leaves first tokens out. The line has the means over the layers of output errors: on all tokens, on first
tokens alone, on all others, and on all tokens without the direction that has most of the inputs' energy. It has the
model's perplexity and KL from the dense model, and KL with the dense model's keys and values of the first token in the
place of its own.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import layerwise
from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.calibration.taps import Tap
from layerwise.compression.score import first_token_error
from layerwise.contract.layer import Gram, Layer
from layerwise.evaluation.divergence import kl
from layerwise.models.loading import load
from layerwise.models.structure import model_linears
from layerwise.sources.tokens import read_tokens

KEYS_AND_VALUES = ("k_proj", "v_proj")


def weighted(tap: Tap, weight: float) -> Gram:
    """The tap's Gram, in which first tokens have this share beside the one that they have anyway."""
    first = tap.statistics.first_tokens
    assert first is not None
    matrix = (1 - weight) * tap.gram.matrix + weight * (first.T @ first / len(first))
    return Gram(matrix, tap.gram.tokens)


def without_first(model: PreTrainedModel, taps: Sequence[Tap], tokens: Tensor) -> dict[str, Gram]:
    """Grams of all tokens but the first of each sequence [sequences, length], by the name of a tap's first layer.

    The Grams are summed again from the inputs. A first token may be 1e4 times as large as the others, and then a Gram
    in float32 no longer holds the others' share.
    """
    sums = {tap.layers[0]: torch.zeros_like(tap.gram.matrix, dtype=torch.float64) for tap in taps}

    def add(name: str, inputs: Tensor) -> None:
        others = inputs[0, 1:].float()
        sums[name] += others.T @ others

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if name in sums:
                handle = module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
                stack.callback(handle.remove)
        for sequence in tokens:
            model(sequence[None])
    count = len(tokens) * (tokens.shape[1] - 1)
    return {name: Gram((total / count).float(), count) for name, total in sums.items()}


def without_direction(gram: Gram) -> tuple[Gram, float]:
    """The Gram of the inputs without their direction of most energy, and the share of the energy that it has."""
    whole = gram.matrix.double()
    values, vectors = torch.linalg.eigh(whole)
    rest = (vectors[:, :-1] * values[:-1].clamp(min=0)) @ vectors[:, :-1].T  # rounding may leave them below zero
    return Gram(rest.float(), gram.tokens), float(values[-1] / values.sum())


@contextmanager
def hooked(model: nn.Module, hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within it `hook` sees, and may replace, the outputs of layers that give keys and values."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(KEYS_AND_VALUES):
                handle = module.register_forward_hook(lambda _, args, output, name=name: hook(name, output))
                stack.callback(handle.remove)
        yield


class Windows:
    """The dense model on windows [windows, length]: its logits, and keys and values of first tokens."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.first: list[dict[str, Tensor]] = [{} for _ in tokens]
        self.dense = [self._logits(window, self._keep(window)) for window in range(len(tokens))]

    def _keep(self, window: int) -> Callable[[str, Tensor], None]:
        def keep(name: str, output: Tensor) -> None:
            self.first[window][name] = output[:, 0].clone()

        return keep

    def _replace(self, window: int) -> Callable[[str, Tensor], Tensor]:
        def replace(name: str, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, 0] = self.first[window][name]
            return output

        return replace

    def _logits(self, window: int, hook: Callable[[str, Tensor], Tensor | None]) -> Tensor:
        with torch.no_grad(), hooked(self.model, hook):
            return self.model(self.tokens[window : window + 1]).logits[0].float()

    def measure(self, dense_first: bool) -> tuple[float, float]:
        """Perplexity, and mean KL(dense || model) over the tokens, in nats; with dense first tokens if asked for."""
        loss = divergence = 0.0
        for window, (tokens, dense) in enumerate(zip(self.tokens, self.dense, strict=True)):
            logits = self._logits(window, self._replace(window) if dense_first else lambda name, output: None)
            loss += float(nn.functional.cross_entropy(logits[:-1].double(), tokens[1:]))
            divergence += float(kl(dense, logits).mean())
        return math.exp(loss / len(self.tokens)), divergence / len(self.tokens)


@dataclass(frozen=True)
class Errors:
    """Output errors of a layer, or their means over layers."""

    all_tokens: float
    first_tokens: float
    other_tokens: float
    other_directions: float


def errors_of(tap: Tap, parts: tuple[Gram, Gram], name: str, dense: Tensor, weight: Tensor) -> Errors:
    """The errors of one layer of the tap. parts: its Grams without first tokens, and without one direction."""
    first = first_token_error(Layer(name, dense, tap.gram, tap.statistics), weight)
    every, others, directions = (layerwise.output_error(dense, weight, gram) for gram in (tap.gram, *parts))
    return Errors(every, first or 0.0, others, directions)


def quantise(
    model: PreTrainedModel,
    taps: Sequence[Tap],
    parts: Mapping[str, tuple[Gram, Gram]],
    method: str,
    target: str,
    share: str,
) -> Errors:
    """Quantise every layer in place; returns the mean errors. share: of first tokens, or "-". parts: by first layer."""
    found, errors = model_linears(model), []
    for tap in taps:
        rest = parts[tap.layers[0]]
        gram = rest[0] if share == "-" else weighted(tap, float(share))
        for name in tap.layers:
            dense = found[name].weight()
            result = layerwise.compress_layer(dense, gram, target, method, statistics=tap.statistics)
            errors.append(errors_of(tap, rest, name, dense, result.weight))
            found[name].replace(result.weight)
    return Errors(*(statistics.fmean(column) for column in zip(*map(astuple, errors), strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--target", default="4b g64")
    runs = ["rtn:0", "awq:0", "gptq:0", "gptq:-", "gptq:.1", "gptq:.5"]
    parser.add_argument("--runs", nargs="+", default=runs, help="METHOD:w, or METHOD:-")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    spec: dict[str, Any] = {"path": str(args.model), "name": "model", "dtype": "float32"}
    model = load(spec)
    calibration, _ = read_tokens(args.calibration)
    evaluation, _ = read_tokens(args.evaluation)
    taps = [tap for block in shared(Stream(model, torch.from_numpy(calibration))) for tap in block]
    others = without_first(model, taps, torch.from_numpy(calibration).long())
    dense = {name: linear.weight().clone() for name, linear in model_linears(model).items()}
    windows = Windows(model, torch.from_numpy(evaluation[: args.windows]).long())
    directions = {tap.layers[0]: without_direction(tap.gram) for tap in taps}
    parts = {name: (others[name], gram) for name, (gram, _) in directions.items()}
    shares = [share for name, (_, share) in directions.items() if name.endswith("q_proj")]
    mean, most = statistics.fmean(shares), max(shares)
    print(f"of the energy of q, k and v's inputs one direction has {mean:.2f} on average and {most:.2f} at most")
    dense_perplexity, _ = windows.measure(dense_first=False)
    print(
        f"dense perplexity {dense_perplexity:.3f} on {len(windows.tokens)} windows of {windows.tokens.shape[1]} tokens"
    )
    print("method       w  error    first    others   directions  perplexity  KL      KL, dense first token")
    for method, share in (run.split(":") for run in args.runs):
        errors = quantise(model, taps, parts, method, args.target, share)
        (perplexity, plain), (_, repaired) = (windows.measure(dense_first) for dense_first in (False, True))
        numbers = "  ".join(f"{error:.5f}" for error in astuple(errors))
        print(f"{method:8} {share:5}  {numbers:42}  {perplexity:10.3f}  {plain:.4f}  {repaired:.4f}", flush=True)
        for name, linear in model_linears(model).items():
            linear.replace(dense[name])


if __name__ == "__main__":
    main()
