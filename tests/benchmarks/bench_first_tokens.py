"""What errors at the first token of a sequence cost: KL of quantised models against how much their Grams weigh it.

    python -m tests.benchmarks.bench_first_tokens MODEL CALIBRATION EVALUATION --target "4b g64"

MODEL is a local folder; the other two are token files of a study (results/tokens/). Each line quantises the model by
one method on Grams (1 - w) G + w F, where G is that of all tokens and F that of the first token of each sequence, and
says how far its predictions are from the dense model's: as it is, and with the dense model's keys and values of the
first token put in the place of its own.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

    def divergence(self, dense_first: bool) -> float:
        """Mean KL(dense || model) over the tokens, in nats; with the dense first tokens if asked for."""
        total = 0.0
        for window, dense in enumerate(self.dense):
            logits = self._logits(window, self._replace(window) if dense_first else lambda name, output: None)
            total += float(kl(dense, logits).mean())
        return total / len(self.dense)


def quantise(
    model: PreTrainedModel, taps: Sequence[Tap], method: str, target: str, weight: float
) -> tuple[float, float]:
    """Quantise every layer in place; returns the mean output error and the mean first-token error."""
    found, errors, firsts = model_linears(model), [], []
    for tap in taps:
        for name in tap.layers:
            dense = found[name].weight()
            result = layerwise.compress_layer(dense, weighted(tap, weight), target, method, statistics=tap.statistics)
            errors.append(layerwise.output_error(dense, result.weight, tap.gram))
            firsts.append(first_token_error(Layer(name, dense, tap.gram, tap.statistics), result.weight) or 0.0)
            found[name].replace(result.weight)
    return sum(errors) / len(errors), sum(firsts) / len(firsts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--target", default="4b g64")
    runs = ["rtn:0", "awq:0", "gptq:0", "gptq:.1", "gptq:.5"]
    parser.add_argument("--runs", nargs="+", default=runs, help="METHOD:w")
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
    dense = {name: linear.weight().clone() for name, linear in model_linears(model).items()}
    windows = Windows(model, torch.from_numpy(evaluation[: args.windows]).long())
    print(f"{'method':8} {'w':>5} {'output error':>13} {'first tokens':>13} {'KL':>7} {'KL, dense first token':>22}")
    for method, weight in (run.split(":") for run in args.runs):
        error, first = quantise(model, taps, method, args.target, float(weight))
        plain, repaired = (windows.divergence(dense_first) for dense_first in (False, True))
        print(f"{method:8} {float(weight):5.2f} {error:13.5f} {first:13.5f} {plain:7.4f} {repaired:22.4f}", flush=True)
        for name, linear in model_linears(model).items():
            linear.replace(dense[name])


if __name__ == "__main__":
    main()
