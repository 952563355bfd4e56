"""Mixtures of experts: which tokens each expert of a block sees, and their Gram and statistics.

transformers keeps the experts of a block in one module, as parameters [experts, ., .], and its eager forward pass runs
them one after another. The pass is unchanged; products with a slice of such a parameter are intercepted.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from layerwise.calibration.tap_statistics import RoutedStatistics, TapStatistics
from layerwise.models.structure import Linear
from layerwise.numerics.patterns import finite
from layerwise.runtime.errors import InputError

PRODUCTS = (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)

# name and scope of a tap, its layers, its statistics, its statistics
TapParts = tuple[str, str, list[Linear], TapStatistics | RoutedStatistics]


class ExpertRecorder(TorchFunctionMode):
    """Context in which each forward pass of a block adds the tokens routed to its experts to their statistics.

    If an expert's layer sees fewer tokens than it has inputs, its Gram would be singular. `all_tokens` then returns
    True after the last batch, and all batches must be run once more. In this second pass these layers see every token.
    """

    def __init__(self, block: str, layers: Sequence[Linear], sequences: int, length: int) -> None:
        super().__init__()
        self.block, self.sequences, self.length = block, sequences, length
        self.layers = {(id(layer.module), layer.parameter, layer.expert): layer for layer in layers}
        self.modules = list({id(layer.module): layer.module for layer in layers}.values())
        self.statistics: dict[str, TapStatistics | RoutedStatistics] = {}  # keyed by layer name
        self.entering: dict[int, str] = {}  # by module: the first parameter of an expert
        self.shared: dict[int, TapStatistics] = {}  # by module: statistics of every token, as it enters all experts
        self.runs: dict[int, Tensor] = {}  # by width: scratch memory of the products
        self.few: dict[str, Linear] | None = None  # layers that see every token, once they are known
        self.routing: Routing | None = None  # routing in the running module
        # per layer: tokens seen in this batch minus tokens expected
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> ExpertRecorder:
        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.routing = None
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.routing is not None and func in PRODUCTS:
            self._see(self.routing, *(args if len(args) > 1 else (*args, (kwargs or {})["weight"]))[:2])
        return func(*args, **(kwargs or {}))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The names of the arguments differ between families.
        given = list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())
        hidden, chosen = given[1].flatten(0, -2), given[2].flatten(0, -2)  # [tokens, hidden], [tokens, experts of each]
        if self.few is not None:
            self._show_all(module, hidden, chosen, given[3])
            return
        self.routing = Routing(module, hidden, chosen)
        for (owner, _, expert), layer in self.layers.items():
            if owner == id(module) and expert is not None:
                self.seen[layer.name] -= int(self.routing.counts[expert])

    def _end(self, *_: Any) -> None:
        self.routing = None

    def _show_all(self, module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Add all tokens to the layers that were routed few: run the module as if every token were routed there."""
        few = [layer for layer in (self.few or {}).values() if layer.module is module]
        inner = [layer for layer in few if layer.parameter != self.entering[id(module)]]
        within = {layer.expert for layer in inner if layer.expert is not None}
        if any(layer.parameter == self.entering[id(module)] for layer in few):
            if id(module) not in self.shared:
                self.shared[id(module)] = self._of_every(hidden)
            self.shared[id(module)].update(hidden)
        for expert in sorted(within):
            everywhere = torch.full_like(chosen[:, :1], expert)
            self.routing = Routing(module, hidden, everywhere)
            type(module).forward(module, hidden, everywhere, weights.flatten(0, -2)[:, :1])
            self.routing = None

    def _see(self, routing: Routing, inputs: Tensor, weight: Tensor) -> None:
        """Handle a product of inputs [tokens, in]: add its tokens if the weight is an expert's."""
        place = routing.place(weight)
        if place is None:
            return
        layer = self.layers[id(routing.module), *place]
        if self.few is not None:
            if layer.name in self.few and layer.parameter != self.entering[id(routing.module)]:
                if layer.name not in self.statistics:
                    self.statistics[layer.name] = self._of_every(inputs)
                self.statistics[layer.name].update(inputs)
            return
        if layer.expert not in routing.orders:
            self.entering[id(routing.module)] = layer.parameter
        order = routing.tokens_of(layer, inputs)
        self.seen[layer.name] += len(inputs)
        if len(inputs) != len(order):  # end_batch reports it
            return
        if layer.name not in self.statistics:
            features = inputs.shape[-1]
            if features not in self.runs:
                self.runs[features] = torch.zeros(features, features, device=inputs.device)
            self.statistics[layer.name] = RoutedStatistics(features, self.length, self.runs[features])
        rising = order.argsort()
        parts = torch.bincount(order // self.length).tolist()  # tokens of each sequence
        for part in inputs[rising].split(parts):
            if len(part):
                self.statistics[layer.name].update(part)

    def _of_every(self, inputs: Tensor) -> TapStatistics:
        return TapStatistics(inputs.shape[-1], self.sequences, self.length, inputs.device)

    def end_batch(self) -> None:
        """Raise InputError when an expert's layer did not see each token routed to it exactly once."""
        wrong = sorted(name for name, tokens in self.seen.items() if tokens)
        if wrong:
            tokens = self.seen[wrong[0]]
            raise InputError(
                "Every layer of an expert must see each token routed to it exactly once, as in transformers' eager "
                f"experts. Got {abs(tokens)} tokens too {'many' if tokens > 0 else 'few'} of a batch in {wrong[0]} "
                "instead."
            )
        self.seen.clear()

    def all_tokens(self) -> bool:
        """Whether some layers were routed fewer tokens than they have inputs. If so, they see every token in the next
        batches."""
        if not self.layers:
            return False
        routed = {name: statistics.seen for name, statistics in self.statistics.items()}
        self.few = {x.name: x for x in self.layers.values() if routed.get(x.name, 0) < x.shape[1]}
        for name in self.few:
            self.statistics.pop(name, None)
        self.runs.clear()
        if self.few:
            few = {(id(layer.module), layer.expert) for layer in self.few.values()}
            experts = {(owner, expert) for owner, _, expert in self.layers}
            print(
                f"{self.block}: {len(few)} of {len(experts)} experts were routed fewer tokens than one of their "
                f"layers has inputs; these {len(self.few)} of {len(self.layers)} layers are calibrated on every token.",
                file=sys.stderr,
            )
        return bool(self.few)

    def overflown(self) -> str | None:
        """The first layer whose inputs, or their squares, are not finite."""
        found = (name for name, own in self.statistics.items() if not finite(own.gram.diagonal()))
        return next(found, None)

    def found(self) -> Iterator[TapParts]:
        """The experts' taps, in the order of the layers; experts that see every token share one input tap."""
        for module in self.modules:
            own = [layer for layer in self.layers.values() if layer.module is module]
            if id(module) in self.shared:
                members = [layer for layer in own if layer.name not in self.statistics]
                name = members[0].stored_in(members[0].inside)
                yield name, "fallback", members, self.shared.pop(id(module))
            for layer in own:
                if layer.name in self.statistics:
                    scope = "fallback" if layer.name in (self.few or {}) else "routed"
                    yield layer.inside, scope, [layer], self.statistics.pop(layer.name)


class Routing:
    """The routing of the tokens in one forward pass of an experts' module.

    hidden: [tokens, hidden] the module's input. chosen: [tokens, experts per token] the experts that see each token.
    """

    def __init__(self, module: nn.Module, hidden: Tensor, chosen: Tensor) -> None:
        self.module, self.hidden, self.chosen = module, hidden, chosen
        self.parameters = {name: value for name, value in module.named_parameters(recurse=False) if value.ndim == 3}
        count = len(next(iter(self.parameters.values())))
        # An index of `count` or more is not an expert of this module.
        self.counts = torch.bincount(chosen.flatten(), minlength=count)[:count].tolist()
        self.orders: dict[int, Tensor] = {}  # token order of each expert that has run

    def place(self, weight: Any) -> tuple[str, int] | None:
        """(parameter, expert) whose memory the weight shares, or None."""
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        for name, parameter in self.parameters.items():
            offset, step = weight.data_ptr() - parameter.data_ptr(), parameter.stride(0) * parameter.element_size()
            if 0 <= offset < step * len(parameter) and offset % step == 0:
                return name, offset // step
        return None

    def tokens_of(self, layer: Linear, inputs: Tensor) -> Tensor:
        """[tokens] index in `hidden` of each row of an expert's input.

        Raises InputError when the expert's input does not consist of these rows of `hidden`.
        """
        expert = layer.expert
        assert expert is not None
        if expert not in self.orders:
            order = (self.chosen == expert).T.nonzero()[:, 1]  # first choices first, in transformers' order
            rows = self.hidden[order]
            if rows.shape != inputs.shape or not torch.equal(bits(rows), bits(inputs)):
                raise InputError(f"{layer.name} does not receive the tokens routed to it in the expected order.")
            self.orders[expert] = order
        return self.orders[expert]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, in which NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
