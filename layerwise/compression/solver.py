"""A method as the runner calls it: timed, guarded, verified and scored."""

import hashlib
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.compression import score, verify
from layerwise.compression.score import (
    LARGEST_ERROR,
    SCORED,
    asymmetric_error,
    first_token_error,
    losses,
    ratio,
    untrue,
)
from layerwise.compression.verify import NOT_FINITE, broken_promise
from layerwise.contract.layer import Compressed, Layer, Method
from layerwise.contract.target import Target
from layerwise.numerics.patterns import finite
from layerwise.runtime.devices import peak_gpu_mb
from layerwise.runtime.errors import Diverged, InputError
from layerwise.runtime.memory import give_back_memory
from layerwise.runtime.provenance import peak_mb
from layerwise.storage import bit_packing, layer_packing, layer_unpacking, packed_file
from layerwise.storage.bits_per_weight import bits_per_weight

PACKING = (bit_packing, layer_packing, layer_unpacking, packed_file)
REGISTRY = "__warningregistry__"
LARGE = 2**20  # weights of a layer from which freed memory is returned to the system before the layer is judged


@dataclass(frozen=True)
class Solver:
    """A method at a target, as the runner calls it. dtype: dtype of the model that it compresses.

    mask_only: whether its card says that it leaves kept weights unchanged. criterion: what its trace measures. targets:
    layer -> the layer's target, if the budget is spread over layers; empty if every layer has the same target.
    """

    name: str
    method: Method
    target: Target
    seed: int
    dtype: torch.dtype = torch.float32
    mask_only: bool = False
    criterion: str | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)

    def at(self, layer: str) -> "Solver":
        """The same solver at the target of one layer. Raises InputError for a layer without a level."""
        if not self.targets:
            return self
        if layer not in self.targets:
            raise InputError(f"The allocation must have a level for every layer. Got none for {layer}.")
        return replace(self, target=self.targets[layer], targets={})

    def without_factors(self, shapes: Mapping[str, tuple[int, int]]) -> str | None:
        """One sentence about the first layer that would get no factors, or None. shapes: name -> (out, in)."""
        for name, shape in shapes.items() if self.target.rank else ():
            target = self.at(name).target
            if self.method.rank_of(target, *shape) < 1:
                return target.without_factors(shape, name)
        return None

    def solve(self, layer: Layer) -> tuple[Compressed, dict[str, Any]]:
        """The layer's result, with the scales that are stored, and its row of numbers.

        Raises InputError, which names the layer, when the method fails.
        """
        rng = torch.Generator().manual_seed(layer_seed(self.seed, layer.name))
        before, around = inputs_state(layer), process_state()
        start = time.perf_counter()
        try:
            found = [self.method.compress(layer, self.target, rng)]
        except Exception as error:  # the message names the method and the layer
            raise InputError(f"{self.name} failed on {layer.name}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        if not isinstance(found[0], Compressed):
            raise InputError(
                f"{self.name} must return a Compressed on {layer.name}. Got {type(found[0]).__name__} instead."
            )
        written = [name for name, state in inputs_state(layer).items() if state != before[name]]
        if written:  # otherwise the score would compare the result with itself
            raise self.breach(layer, f"promise 1: the inputs must be untouched. Got a changed {written[0]} instead")
        changed = [name for name, state in process_state().items() if state != around[name]]
        if changed:  # later layers, and the times of other methods, would depend on it
            raise self.breach(
                layer, f"promise 4: global state must be left alone. Got a change of {changed[0]} instead"
            )
        if layer.weight.numel() >= LARGE:
            give_back_memory()  # what the method has freed
        return self.judged(layer, found.pop(), seconds)  # not held here, so that it can be freed once it is stored

    def breach(self, layer: Layer, broken: str) -> InputError:
        """The error that reports a promise broken on a layer."""
        kind = Diverged if NOT_FINITE in broken else InputError
        return kind(f"{self.name} broke its contract on {layer.name}: {broken}.")

    def judged(self, layer: Layer, result: Compressed, seconds: float) -> tuple[Compressed, dict[str, Any]]:
        """The verified result, with the scales as stored, and its row of numbers.

        Raises InputError for the first promise that is broken, Diverged for an error beyond LARGEST_ERROR.
        """
        broken = broken_promise(layer, self.target, result, self.mask_only)
        if broken:
            raise self.breach(layer, broken)
        traced = self.criterion == "error" and bool(result.trace)
        rounds = layer_packing.rounds(self.target, self.dtype)
        # before the stored weight overwrites the weight that the trace is about
        given = losses(layer, result.weight)[0] if traced and rounds else None
        result = layer_packing.as_stored(result, self.target, self.dtype)
        if self.dtype == torch.float16 and not finite(result.weight.half()):
            raise Diverged(
                f"{self.name} gives {layer.name} weights beyond float16: use dtype: bfloat16 or float32 for the model."
            )
        rows, inputs = layer.weight.shape
        absolute, whole = losses(layer, result.weight)
        relative = ratio(absolute, whole)
        if not relative <= LARGEST_ERROR:
            raise Diverged(f"{self.name} has diverged on {layer.name}: its output_error is {relative:.3g}.")
        if traced and (broken := untrue(result, absolute if given is None else given, whole)):
            raise self.breach(layer, broken)
        size = result.weight.numel()
        kept = 1.0 if result.mask is None or not self.target.sparsity else int(result.mask.count_nonzero()) / size
        return result, {
            "layer": layer.name,
            "kind": layer.name.rpartition(".")[2],
            "out": rows,
            "in": inputs,
            "output_error": relative,
            "absolute_error": absolute,
            "asymmetric_error": asymmetric_error(layer, result.weight, relative),
            "first_token_error": first_token_error(layer, result.weight),
            "achieved_sparsity": (size - int(result.weight.count_nonzero())) / size,
            "bits_per_weight": bits_per_weight(
                self.target,
                kept,
                rows,
                inputs,
                input_scale=result.quantised is not None and result.quantised.input_scale is not None,
                reordered=layer_packing.reordered(result, self.target.rest),
                levels=result.quantised is not None and result.quantised.levels is not None,
                sparse_factor=layer_packing.sparse_factor(result),
                rotated=result.quantised is not None and result.quantised.rotation is not None,
            ),
            "damping": None if (used := result.info.get("damping")) is None else float(used),
            "seconds": seconds,
            "peak_mb": peak_mb(),
            "peak_gpu_mb": peak_gpu_mb(layer.weight.device.type),
        }


def process_state() -> dict[str, Any]:
    """Global state that a method could change for others: generators, torch's settings, the functions that judge it."""
    judges = [vars(module) for module in (sys.modules[__name__], score, verify, *PACKING)]
    numpys = np.random.get_state(legacy=False)["state"]
    return {
        "torch's global generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's global generator": (numpys["key"].tobytes(), numpys["pos"]),
        "Python's global generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "the precision of products": torch.get_float32_matmul_precision(),
        # (a warning of a method leaves its registry in the module that called it)
        "the runner's code": [id(own) for names in judges for name, own in names.items() if name != REGISTRY],
    }


def inputs_state(layer: Layer) -> dict[str, tuple[int, float]]:
    """Marks that change when a method writes to its inputs: versions (for torch), sums (for other access)."""
    tensors = {"weight": layer.weight, "gram": layer.gram.matrix}
    if layer.gram.apart:
        tensors |= {"cross-Gram": layer.gram.cross, "dense Gram": layer.gram.dense}
    if layer.fisher is not None:
        tensors["fisher"] = layer.fisher
    if layer.statistics:
        tensors |= {key: value for key, value in vars(layer.statistics).items() if isinstance(value, Tensor)}
    return {name: (tensor._version, placed_sum(tensor)) for name, tensor in tensors.items()}


def placed_sum(tensor: Tensor) -> float:
    """Weighted sum in float64 with a different weight for each place, so that swapped entries show too."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    across, down = (torch.linspace(1, 2, n, dtype=torch.float64, device=tensor.device) for n in rows.shape[::-1])
    sums, memory = torch.empty_like(down), down.new_empty(min(SCORED, len(rows)), rows.shape[-1])
    for part, total in zip(rows.split(SCORED), sums.split(SCORED), strict=True):
        torch.mv(memory[: len(part)].copy_(part), across, out=total)
    return float(sums @ down)


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer's generator, independent of the order in which layers are solved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
