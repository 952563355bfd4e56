"""The storage dtype of each weight of a model that is computed in another dtype.

Such a model holds float32 tensors whose values are exact in the stored dtype. Values read from its files or written to
it are rounded first, so that a checkpoint in the stored dtype holds exactly the values of the computation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

OF_MODULE = "layerwise_stored_dtypes"  # attribute of a module: name of its own parameter or buffer -> dtype
OF_MODEL = "layerwise_stored_dtype"  # attribute of a model: the dtype of most tensors


def native_dtypes(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> dict[str, torch.dtype]:
    """Name -> dtype of each tensor in the state of a model that is computed in its storage dtype.

    This is `dtype`, except for tensors that the model's code creates in another dtype or keeps in float32, such as the
    bias of a router.
    """
    with no_init_weights(), init_empty_weights():
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(dtype)
    for name in found:
        for pattern, kept in plan.items():
            if re.search(pattern.replace("*", ".*"), name):  # as the library interprets patterns
                found[name] = kept
    return found


def mark(model: PreTrainedModel, stored: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
    """Record the storage dtypes of a model's tensors. stored: dtype by name. dtype: dtype of most."""
    setattr(model, OF_MODEL, dtype)
    for prefix, module in model.named_modules():
        own = {
            name: stored[key]
            for name in (*module._parameters, *module._buffers)
            if (key := f"{prefix}.{name}" if prefix else name) in stored and stored[key].is_floating_point
        }
        setattr(module, OF_MODULE, own)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The storage dtype of a model's weights; also their compute dtype, unless the model is marked."""
    return getattr(model, OF_MODEL, model.dtype)


def rounded_as_stored(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """A value for a module's own parameter, rounded to the parameter's storage dtype, in the parameter's dtype."""
    own = module.get_parameter(name).dtype
    return value.to(getattr(module, OF_MODULE, {}).get(name, own)).to(own)


@torch.no_grad()
def round_as_stored(module: nn.Module) -> None:
    """Round the tensors of a module and its submodules to their storage dtypes."""
    for inner in module.modules():
        for name, dtype in getattr(inner, OF_MODULE, {}).items():
            value = inner._parameters.get(name)
            value = inner._buffers.get(name) if value is None else value
            if value is not None and not value.is_meta and value.dtype != dtype:
                value.copy_(value.to(dtype))
