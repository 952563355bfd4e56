"""Layer-wise compression of large language models: methods, one contract, comparable numbers.

    import layerwise

    gram = layerwise.Gram.from_inputs(x)                              # x [tokens, in]
    result = layerwise.compress_layer(weight, gram, "2:4", "sparsegpt")  # weight [out, in]
    print(result.output_error, result.weight)

Each name is imported when it is first used, so that `import layerwise` is quick and loads no torch (docs/library.md).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.api import LayerResult, LowerBound, calibrate, compress_layer, lower_bound, output_error
    from layerwise.compression.model import compress_model
    from layerwise.contract.layer import Compressed, Gram, Layer, Method, Statistics, UnsupportedTarget
    from layerwise.contract.method_table import MethodCard, MethodTable, methods
    from layerwise.contract.target import Target
    from layerwise.runtime.errors import InputError

    __version__: str

__all__ = [
    "Compressed",
    "Gram",
    "InputError",
    "Layer",
    "LayerResult",
    "LowerBound",
    "Method",
    "MethodCard",
    "MethodTable",
    "Statistics",
    "Target",
    "UnsupportedTarget",
    "__version__",
    "calibrate",
    "compress_layer",
    "compress_model",
    "lower_bound",
    "methods",
    "output_error",
]

_MODULES = {
    "layerwise.api": ("LayerResult", "LowerBound", "calibrate", "compress_layer", "lower_bound", "output_error"),
    "layerwise.compression.model": ("compress_model",),
    "layerwise.contract.method_table": ("MethodCard", "MethodTable", "methods"),
    "layerwise.contract.layer": ("Compressed", "Gram", "Layer", "Method", "Statistics", "UnsupportedTarget"),
    "layerwise.contract.target": ("Target",),
    "layerwise.runtime.errors": ("InputError",),
}
MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}  # module of each public name


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in MODULE_OF:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
    return getattr(import_module(MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version in pyproject.toml in a checkout (installed metadata may be older), otherwise the metadata's
    version."""
    import tomllib
    from importlib.metadata import version

    from layerwise.runtime.project import ROOT

    project = ROOT / "pyproject.toml"
    if not project.is_file():
        return version("layerwise")
    return tomllib.loads(project.read_text("utf-8"))["project"]["version"]


class _Package(ModuleType):
    """This module. `methods` is both one of its functions and the folder of adapters (layerwise.methods.gptq, ...).

    Importing an adapter makes the folder an attribute of the package; the folder can then be called as the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "methods" and type(value) is ModuleType:
            value.__class__, value.__doc__ = _Adapters, "The adapters. A call returns the table of their cards."
        super().__setattr__(name, value)


class _Adapters(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from layerwise.contract.method_table import methods

        return methods(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
