"""Find the blocks and linear layers of a language model by structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layerwise.models.stored_dtypes import rounded_as_stored
from layerwise.numerics.patterns import ROWS
from layerwise.runtime.errors import InputError

ROUTERS = ("gate", "router")  # names of a linear layer that chooses experts, or of the module around it
SHOWN = 3  # number of names that an error lists before it counts the rest


def few(names: Iterable[str]) -> str:
    """The first names in order, and the number of further ones."""
    found = sorted(names)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a compressible linear layer; a layer with a single output is a gate and does not count."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    return (module.out_features if isinstance(module, nn.Linear) else module.nf) > 1


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of many experts in transformers' layout: parameters [experts, ., .]."""
    return hasattr(module, "is_transposed") and bool(expert_parameters(module))


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own three-dimensional parameters, such as gate_up_proj and down_proj."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """(name, list) of each outermost ModuleList of the model that contains linear layers."""
    outermost: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():  # parents precede their children
        inner = any(name.startswith(f"{outer}.") for outer, _ in outermost)
        if isinstance(module, nn.ModuleList) and not inner and any(map(is_linear, module.modules())):
            outermost.append((name, module))
    return outermost


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's blocks: the one of block_lists with the most parameters.

    Raises InputError when there is none.
    """
    lists = block_lists(model)
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of blocks with linear layers (a torch ModuleList).")
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def check_unshared(model: PreTrainedModel) -> None:
    """Raise InputError when blocks share weights: compressing one would change another after its calibration."""
    prefix = f"{find_blocks(model)[0]}."
    first: dict[int, str] = {}
    shared = {key for pair in model.all_tied_weights_keys.items() for key in pair}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            shared |= {name, first[id(parameter)]}
    if inside := [name for name in shared if name.startswith(prefix)]:
        raise InputError(
            f"Each block of {type(model).__name__} must have weights of its own. Got shared ones instead: "
            f"{few(inside)}."
        )


class Blocks:
    """The blocks of a model; in this class, of a model that is whole in memory.

    with blocks.open(index) as block:    # the block has its weights in this context
    with blocks.outside():               # parameters outside the blocks have theirs
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name, self.modules = find_blocks(model)
        self.device = model.get_input_embeddings().get_parameter("weight").device

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        yield self.modules[index]

    @contextmanager
    def outside(self) -> Iterator[None]:
        yield

    def change(self, write: Callable[[int, nn.Module], None]) -> None:
        """Register a function that writes to each block's weights, given its index, before anything else sees them."""
        for index, block in enumerate(self.modules):
            write(index, block)


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, viewed as weight [out, in] for either storage layout.

    An expert's weight is one index of a parameter [experts, ., .] of the module that holds all experts.
    """

    name: str  # name in the model, such as model.layers.0.self_attn.q_proj or model.layers.0.mlp.experts.3.down_proj
    inside: str  # name in its block, such as self_attn.q_proj or mlp.experts.3.down_proj
    module: nn.Module
    transposed: bool  # transformers' Conv1D, and some experts, store [in, out]
    parameter: str = "weight"
    expert: int | None = None

    @property
    def _view(self) -> Tensor:
        """[out, in] view of the parameter, or of an expert's part of it."""
        stored = self.module.get_parameter(self.parameter).detach()  # by name, because parameters may be replaced
        stored = stored if self.expert is None else stored[self.expert]
        return stored.T if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self._view.shape
        return rows, columns

    def stored_in(self, name: str) -> str:
        """Name of the parameter that holds the weight, for a layer named `name` (its name, or inside)."""
        if self.expert is None:
            return f"{name}.{self.parameter}"
        return name.removesuffix(f"{self.expert}.{self.parameter}") + self.parameter

    def stored(self) -> Tensor:
        """[out, in] the weight itself, in the model's dtype: a view of the module's memory."""
        return self._view

    def weight(self) -> Tensor:
        """[out, in] float32 copy. Raises InputError, naming the layer, when it is not finite."""
        weight = self._view.to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(weight).all():
            raise InputError(f"The weight of {self.name} must be finite. Got NaN or Inf instead.")
        return weight

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] with the values and dtype that it would have in the module."""
        return rounded_as_stored(self.module, self.parameter, weight)

    def replace(self, weight: Tensor) -> None:
        """Write a weight [out, in] to the module, in place and rounded to the model's storage dtype."""
        if tuple(weight.shape) != self.shape:  # copy_ would broadcast
            raise ValueError(f"The new weight of {self.name} must be {self.shape}. Got {tuple(weight.shape)} instead.")
        with torch.no_grad():
            for own, part in zip(self._view.split(ROWS), weight.split(ROWS), strict=True):
                own.copy_(self.as_stored(part))


def linears(block: nn.Module, prefix: str) -> list[Linear]:
    """The linear layers of a block, in the order of its modules; prefix: the block's name in the model.

    Routers and other gates are excluded. Raises InputError for three-dimensional weights in an unknown layout.
    """
    found, routers = [], set(router_names(block))
    for inside, module in block.named_modules():
        if is_linear(module) and inside not in routers:
            found.append(Linear(f"{prefix}.{inside}", inside, module, transposed=isinstance(module, Conv1D)))
        elif is_experts(module):
            found += experts(module, inside, prefix)
        elif many := [name for name in expert_parameters(module) if is_stack(module, name)]:
            raise InputError(
                f"{type(module).__name__} of {prefix} keeps {few(many)} with three dimensions, which only experts in "
                "transformers' layout may have."
            )
    check_known(block, prefix, found)
    return found


def check_known(block: nn.Module, prefix: str, layers: Sequence[Linear]) -> None:
    """Raise InputError when most weights of a block are matrices outside its linear layers, such as DBRX's experts."""
    known = {(id(layer.module), layer.parameter) for layer in layers}
    others = {
        f"{inside}.{name}": parameter.numel()
        for inside, module in block.named_modules()
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and (id(module), name) not in known
    }
    if sum(others.values()) > sum(math.prod(p.shape) for p in {id(q): q for q in map(parameter_of, layers)}.values()):
        raise InputError(
            f"Most weights of {prefix} are in no linear layer, and in no experts of transformers' layout: "
            f"{few(others)}."
        )


def parameter_of(layer: Linear) -> Tensor:
    return layer.module.get_parameter(layer.parameter)


def experts(module: nn.Module, inside: str, prefix: str) -> list[Linear]:
    """The linear layers of all experts of a module, expert by expert."""
    names = expert_parameters(module)
    return [
        Linear(f"{prefix}.{layer}", layer, module, bool(module.is_transposed), name, expert)
        for expert in range(len(module.get_parameter(names[0])))
        for name in names
        for layer in [f"{inside}.{expert}.{name}"]
    ]


def is_stack(module: nn.Module, name: str) -> bool:
    """Whether a three-dimensional parameter is a stack of matrices rather than a convolution along the sequence."""
    return not isinstance(module, nn.Conv1d) and min(module.get_parameter(name).shape[1:]) > 1


def router_names(block: nn.Module) -> Iterator[str]:
    """Names of linear layers with one output for each expert of their sibling module."""
    for inside, module in block.named_modules():
        if is_experts(module):
            count, around = len(module.get_parameter(expert_parameters(module)[0])), inside.rpartition(".")[0]
            for name, beside in block.get_submodule(around).named_modules(prefix=around):
                called = not set(ROUTERS).isdisjoint(name.split(".")[-2:])  # Gemma 4's is router.proj
                if called and isinstance(beside, nn.Linear) and beside.out_features == count:
                    yield name


def model_linears(model: nn.Module) -> dict[str, Linear]:
    """Name -> linear layer of all blocks."""
    prefix, blocks = find_blocks(model)
    return {layer.name: layer for i, block in enumerate(blocks) for layer in linears(block, f"{prefix}.{i}")}


def count_linears(model: nn.Module, first: int | None = None) -> int:
    """Number of linear layers in all blocks, or in the first `first` blocks."""
    name, blocks = find_blocks(model)
    return sum(len(linears(block, name)) for block in list(blocks)[:first])
