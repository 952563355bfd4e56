"""A model that is never whole in memory: each block is read from its safetensors shards when it is run."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from layerwise.models.loading import check_finite, check_names, check_used, keep_as_stored, read_config, sentences
from layerwise.models.shards import Shards
from layerwise.models.stored_dtypes import round_as_stored
from layerwise.models.structure import Blocks, check_unshared
from layerwise.runtime.memory import free_memory, give_back_memory

SHARE = 0.7  # largest share of the free memory for all blocks


class LazyBlocks(Blocks):
    """The blocks of a model without weights in memory.

    A block is read when it is opened or run. It is dropped, with any changes to its weights, when it is closed or has
    run. Meanwhile another thread reads the next block. Parameters outside the blocks are handled in the same way.
    """

    def __init__(
        self, spec: Mapping[str, Any], device: str | torch.device = "cpu", compute_dtype: str | None = None
    ) -> None:
        """spec, compute_dtype: a config entry and its compute dtype, as in `models.loading.load`.

        Raises InputError as `models.loading.load` does, but for weights that are not finite only when their block is
        read.
        """
        self._spec, self._device_map = spec, {"": str(device)}
        folder, config, options = read_config(spec)
        with sentences(spec):
            self._shards = Shards(spec.get("name", folder), Path(folder).absolute())  # the process may move
            stored = saved_dtype(spec, config, self._shards.empty)
            # Parameters get no data, but buffers do, because models compute them.
            with no_init_weights(), init_empty_weights(include_buffers=False):
                model: Any = AutoModelForCausalLM.from_config(
                    config,
                    dtype=getattr(torch, compute_dtype) if compute_dtype else stored,
                    trust_remote_code=options["trust_remote_code"],
                )
            if compute_dtype and getattr(torch, compute_dtype) != stored:
                keep_as_stored(model, stored, options["trust_remote_code"])
        self._write: Callable[[int, nn.Module], None] | None = None
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        self._plan = model._get_dtype_plan(model.dtype)
        model.initialize_weights()  # for the buffers, outside the model's dtype, as in the library's loader
        buffers = [(module, key, own) for module in model.modules() for key, own in module._buffers.items()]
        self._absent = self._check(model)
        for module, key, own in buffers:  # the check has removed the data of saved buffers
            module._buffers[key] = None if own is None else own.to(device)
        super().__init__(model.eval().requires_grad_(False))
        check_unshared(model)
        self._keys = self._of_blocks(model)  # names in the files; the key None holds those outside the blocks
        self.device = torch.device(device)
        self._users: Counter[int | None] = Counter()
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        for index, block in enumerate(self.modules):
            block.forward = self._opening(index, block.forward)

    def _opening(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            with self.open(index):
                return forward(*args, **kwargs)

        return opened

    def _put(
        self, model: PreTrainedModel, tensors: Mapping[str, Tensor], device: Mapping[str, str] | None = None
    ) -> Any:
        """Put the tensors of the files into the model's parameters, converted as the library does."""
        config = LoadStateDictConfig(
            dtype=model.dtype,
            dtype_plan=self._plan,
            weight_mapping=self._mapping,
            device_map=dict(device or self._device_map),
            ignore_mismatched_sizes=True,
        )
        with sentences(self._spec):
            return convert_and_load_state_dict_in_model(model, dict(tensors), config)[0]

    def _check(self, model: PreTrainedModel) -> frozenset[str]:
        """Names of the parameters that are absent from the files and tied to others, from loading all without data.

        Raises InputError when the files do not hold the model's parameters, or hold others.
        """
        info = self._put(model, self._shards.empty, {"": "meta"})
        absent = frozenset(info.missing_keys)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)  # removes tied names
        model._adjust_missing_and_unexpected_keys(info)
        missing = info.missing_keys & set(model.state_dict())  # the model computes buffers that are not saved
        check_names(self._spec, model, {key for key, *_ in info.mismatched_keys}, missing)
        check_used(self._spec, model, {key: self._shards.empty[key] for key in info.unexpected_keys})
        return absent

    def _of_blocks(self, model: PreTrainedModel) -> dict[int | None, list[str]]:
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known, found = model.state_dict(), defaultdict(list)
        inside = re.compile(rf"{re.escape(self.name)}\.(\d+)\.")
        for key in self._shards.empty:
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            block = inside.match(name)
            found[int(block[1]) if block else None].append(key)
        return found

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        with self._used(index):
            yield self.modules[index]

    @contextmanager
    def outside(self) -> Iterator[None]:
        with self._used(None):
            yield

    @contextmanager
    def _used(self, index: int | None) -> Iterator[None]:
        if not self._users[index]:
            self._load(index)
        self._users[index] += 1
        try:
            yield
        finally:
            self._users[index] -= 1
            if not self._users[index]:
                self._drop(index)

    @contextmanager
    def whole_if_it_fits(self) -> Iterator[None]:
        """Context in which all blocks are in memory, if they take at most SHARE of the free memory. Otherwise each
        block is read whenever it is run, with the same results but more slowly."""
        size, free = sum(own.nbytes for own in self.modules.parameters()), free_bytes(self.device)
        with self.outside(), ExitStack() as stack:
            if size <= SHARE * free:
                for index in range(len(self)):
                    stack.enter_context(self.open(index))
            else:
                print(
                    f"The blocks take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: each block is "
                    f"read whenever it is run.",
                    file=sys.stderr,
                )
            yield

    def change(self, write: Callable[[int, nn.Module], None]) -> None:
        self._write = write

    def _load(self, index: int | None) -> None:
        with sentences(self._spec):
            found = self._read(index)
        self._put(self.model, found)
        del found
        # as from_pretrained ties: a separate head in the files stays separate, even against the config
        if index is None:
            self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)
        read = self.model if index is None else self.modules[index]
        read.requires_grad_(False)
        round_as_stored(read)
        prefix = "" if index is None else f"{self.name}.{index}."
        held = read.state_dict().items()  # parameters and saved buffers, such as the bias of a router
        check_finite(self._spec, ((prefix + key, own) for key, own in held if not own.is_meta))
        if index is not None and self._write:
            self._write(index, read)

    def _read(self, index: int | None) -> dict[str, Tensor]:
        """The tensors of a block, or those outside the blocks; another thread then reads the next block's."""
        if index is None:
            return self._shards.read(self._keys[None])
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead and ahead[0] == index else self._shards.read(self._keys[index])
        if index + 1 < len(self) and not self._users[index + 1]:
            self._ahead = (index + 1, self._reader.submit(self._shards.read, self._keys[index + 1]))
        return found

    def _drop(self, index: int | None) -> None:
        inside = set(self.modules.modules()) if index is None else set()
        for module in (self.model if index is None else self.modules[index]).modules():
            for key, own in module._parameters.items() if module not in inside else ():
                if own is not None:
                    module._parameters[key] = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=False)
        give_back_memory()


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, or free memory within the system and the process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def saved_dtype(spec: Mapping[str, Any], config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a model: from its entry, otherwise its config, otherwise its first weight."""
    own = spec.get("dtype") or "auto"
    if own == "auto":
        own = config.dtype or next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    return getattr(torch, own) if isinstance(own, str) else own
