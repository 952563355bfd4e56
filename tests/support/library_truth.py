"""What transformers itself computes of a saved model: losses, and what enters each linear layer. Without layerwise."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.support.tiny_configs import SPECIAL_TOKENS, VOCABULARY

Linears = (nn.Linear, Conv1D)


class Truth:
    """A model that the library loads from a folder and runs window by window, with its own defaults."""

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        """tokens: [windows, length]. Raises what the library does."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: PreTrainedModel = loaded.eval().requires_grad_(False)
        self.tokens = tokens

    def logits(self, windows: Tensor) -> Tensor:
        """[windows, length, vocabulary] of tokens [windows, length]. Raises ValueError for logits of other tokens."""
        found = torch.cat([self.model(input_ids=window[None], use_cache=False).logits for window in windows])
        if found.shape[:2] != windows.shape:
            raise ValueError(f"The model has logits {list(found.shape)} for tokens {list(windows.shape)}")
        return found

    def losses(self) -> Tensor:
        """[windows] float64, mean negative log likelihood of all tokens but the first."""
        pairs = zip(self.logits(self.tokens), self.tokens, strict=True)
        return torch.stack([cross_entropy(scores[:-1].double(), window[1:]) for scores, window in pairs])

    def causal(self) -> bool:
        """Whether the logits of a token are the same whatever the window's last token is."""
        window = self.tokens[:1]
        other = window.clone()
        other[0, -1] = SPECIAL_TOKENS + (window[0, -1] + 1) % (VOCABULARY - SPECIAL_TOKENS)
        before, after = (self.logits(x)[0, :-1] for x in (window, other))
        return torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))

    def inputs(self) -> Inputs:
        """What enters the model's linear layers and experts in its own forward pass."""
        with recorded(self.model) as found:
            self.logits(self.tokens)
        return found


class Inputs:
    """Of a forward pass: what entered each module of one weight, and of many experts."""

    def __init__(self) -> None:
        self.linear: defaultdict[str, list[Tensor]] = defaultdict(list)  # [tokens, in] float64, by module's name
        self.experts: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # with the experts chosen

    def gram(self, name: str) -> Tensor:
        """[in, in] float64, mean of x xt over everything that entered a linear layer, 0 where nothing did."""
        return second_moment(torch.cat(self.linear[name])) if self.linear[name] else torch.zeros(())

    def expert_gram(self, name: str, module: nn.Module, expert: int, parameter: str, every: bool) -> Tensor:
        """The same of an expert's weight, over the tokens routed to it, or over every token that entered `module`."""
        hidden, chosen = (torch.cat(parts) for parts in zip(*self.experts[name], strict=True))
        rows = hidden if every else hidden[(chosen == expert).any(1)]
        return second_moment(activation(module, expert, rows) if parameter.startswith("down") else rows)


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def activation(module: Any, expert: int, rows: Tensor) -> Tensor:
    """[tokens, intermediate] float64, what enters an expert's second product: by the library's own gate."""
    name = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    weight, biases = getattr(module, name)[expert].double(), getattr(module, f"{name}_bias", None)
    bias = None if biases is None else biases[expert].double()
    product = linear(rows, weight.T if module.is_transposed else weight, bias)
    return module._apply_gate(product) if name == "gate_up_proj" else module.act_fn(product)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Inputs]:
    """Within it every forward pass of the model is recorded."""
    found = Inputs()

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]

    def of_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        found.linear[name].append(given(module, args, kwargs)[0].flatten(0, -2).double())

    def of_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        hidden, chosen = given(module, args, kwargs)[:2]
        found.experts[name].append((hidden.flatten(0, -2).double(), chosen.flatten(0, -2)))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = (
                of_linear if isinstance(module, Linears) else of_experts if hasattr(module, "is_transposed") else None
            )
            if hook:

                def see(own: nn.Module, args: Any, kwargs: Any, hook: Any = hook, name: str = name) -> None:
                    hook(own, args, kwargs, name)

                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield found
