"""Catalogues of methods and allocators: cards and hyperparameters are read from the files as text, without torch.

A file in methods/, or in a folder of the config's `method_paths`, that holds a literal CARD and one frozen dataclass
derived from Method is a method, named after the file. See docs/adding-a-method.md. Allocators work the same way, in
allocators/ and `allocator_paths` (docs/allocation.md).
"""

import ast
import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from layerwise.contract.allocator_card import card_fault
from layerwise.contract.cards import ALLOCATOR, METHOD, Kind, merged, needed
from layerwise.contract.import_closure import FOLDERS, closure, imports_of
from layerwise.contract.target import LOW_RANK, SUM, Target, refusal
from layerwise.runtime.sentences import schema_fault

if TYPE_CHECKING:
    from layerwise.contract.allocator import Allocator
    from layerwise.contract.layer import Method

# Code on which a result depends besides the method's own file. An edit to one of these files re-runs every cell.
SHARED_SOURCES = tuple(closure(["layerwise.compression.verify"]))


class CatalogueError(ValueError):
    """A method's file or an entry that uses it is wrong; the text is one sentence for the user."""


class UnknownName(CatalogueError):
    """An entry names a method or an allocator that no file of the catalogue defines."""

    def __init__(self, where: str, kind: Kind, name: str, known: Iterable[str]) -> None:
        self.where, self.kind, self.name, self.known = where, kind, name, sorted(known)
        super().__init__(self.sentence())

    def sentence(self, more: str = "") -> str:
        """The refusal. more: another possibility than the known names."""
        known = ", ".join(self.known)
        return f"{self.where}: the {self.kind.word} must be one of {known}{more}. Got {self.name!r} instead."

    def of_config(self) -> str:
        """The refusal of an entry in a config, which may list folders of files."""
        return self.sentence(f", or a file in a folder of {self.kind.paths}")


@dataclass(frozen=True)
class Entry:
    """The card and class of a method's file."""

    name: str
    path: Path
    class_name: str
    card: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[Path, ...] = ()  # files of methods/ that it imports, except the shared ones
    kind: Kind = METHOD

    @property
    def control(self) -> bool:
        return bool(self.card.get("control"))

    @property
    def criterion(self) -> str | None:
        """The measure of the objective in the method's trace; None for a method without a trace."""
        return self.card.get("criterion")

    @property
    def shipped(self) -> bool:
        """Whether the file is part of the project rather than from a folder of the config's `method_paths`."""
        return self.path.parent == FOLDERS[self.kind.folder]

    @property
    def cost(self) -> Mapping[str, Any] | None:
        """The cost of a layer on the card: weights, grams, products (docs/adding-a-method.md)."""
        return self.card.get("cost")

    @property
    def look(self) -> Mapping[str, str] | None:
        """Colour and marker in figures, from the card."""
        return self.card.get("look")

    @property
    def warm_starts(self) -> list[str]:
        """Names of the parameters that hold another method."""
        return [name for name, schema in self.card["parameters"].items() if schema.get("format") == "method"]

    @property
    def chains(self) -> list[str]:
        """Names of the parameters that hold two methods, one of which prunes and the other quantises."""
        found = self.card["parameters"].items()
        return [name for name, schema in found if schema.get("items", {}).get("format") == "method"]

    def needs(self, params: Mapping[str, Any]) -> set[str]:
        """The names of the inputs that the method needs with these complete parameters, from its card, and their
        Grams."""
        found = set(needed(self.card, params))
        return found | ({"weight", "gram"} if found & {"errors", "trials"} else set())

    def inner(self, params: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
        """(parameter, name, complete parameters) of every method inside this one's complete parameters.

        An allocation's parameters lack the methods that its target does not ask for.
        """
        held = [(key, params[key]) for key in self.warm_starts if params.get(key) is not None]
        held += [(key, step) for key in self.chains for step in params.get(key, ())]
        return [(key, name, inside) for key, value in held for name, inside in value.items()]

    def refusal(self, target: Target, params: Mapping[str, Any] | None = None) -> str | None:
        """One sentence saying why the method (with these complete parameters) cannot reach the target, or None."""
        told = self.card.get("refused_where", {}).items()
        reasons = [of[value] for key, of in told if params and (value := str(params.get(key))) in of]
        return refusal(self.name, self.card, target) or (reasons[0] if reasons else None)

    def comparison(self, target: Target) -> str:
        """The group of methods with which this one may be compared at the target."""
        if self.control:
            return "control"
        if target.rank and target.rest.dense:
            return "sparse factor" if self.card.get("sparse_factor") else LOW_RANK
        if target.rank:
            return SUM
        if target.bits is not None:
            return "pruned and quantised" if target.sparsity else "quantised"
        return "weight-updating" if self.card["updates_weights"] else "mask-only"


class Catalogue(Mapping[str, Entry]):
    """All methods of the given folders by name, or all files of another kind."""

    def __init__(
        self, folders: list[Path] | None = None, kind: Kind = METHOD, methods: "Catalogue | None" = None
    ) -> None:
        """methods: the catalogue for parameters of the format `method`, if the files are of another kind."""
        self.kind, self.methods = kind, methods or self
        self._entries: dict[str, Entry] = {}
        for folder in [FOLDERS[kind.folder], *(folders or [])]:
            try:
                files = sorted(folder.glob("*.py")) if folder.is_dir() else None
            except OSError:  # for example, a name that is too long
                files = None
            if files is None:
                raise CatalogueError(f"{kind.paths} must be folders. Got {str(folder)!r} instead.")
            for path in files:
                self.add(path)

    def add(self, path: Path) -> Entry | None:
        """Add a file and return its entry, or None for a file without a CARD; raises CatalogueError for a wrong
        file."""
        entry = read_entry(path, self.kind)
        if entry is not None:
            if entry.name in self._entries:
                other = self._entries[entry.name].path
                raise CatalogueError(f"Two files define the {self.kind.word} {entry.name}: {other} and {path}.")
            self._entries[entry.name] = entry
            self._check_names()
        return entry

    @property
    def named_by(self) -> dict[str, str]:
        """Parameter by which a config names a method -> the method."""
        return {entry.card["named_by"]: entry.name for entry in self.values() if "named_by" in entry.card}

    def _check_names(self) -> None:
        """Raise CatalogueError for a parameter that in a config names another method."""
        named_by = self.named_by
        for entry in self.values():
            for key in named_by.keys() & entry.card["parameters"].keys():
                if named_by[key] != entry.name:
                    raise CatalogueError(
                        f"{entry.path}: the parameter {key} must have another name: in a config it names the method "
                        f"{named_by[key]}."
                    )

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str, where: str) -> Entry:
        """The entry, or an UnknownName that lists the known ones."""
        if name not in self._entries:
            raise UnknownName(where, self.kind, name, self)
        return self._entries[name]

    def complete(self, name: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The method's parameters with defaults filled in, warm starts as {name: {params}}; raises CatalogueError."""
        return self._complete(name, params, where, ())

    def _complete(self, name: str, params: Mapping[str, Any], where: str, outer: tuple[str, ...]) -> dict[str, Any]:
        """`complete` for a warm start inside the `outer` methods, which must not occur again."""
        entry = self.find(name, where)
        unknown = [key for key in params if key not in entry.card["parameters"]]
        if unknown:
            known = ", ".join(entry.card["parameters"]) or "none"
            raise CatalogueError(f"{where}: {name} has no parameter {unknown[0]!r}; its parameters are: {known}.")
        full = {key: params.get(key, entry.defaults[key]) for key in entry.card["parameters"]}
        for key, schema in entry.card["parameters"].items():
            inside = () if key in params else (*outer, name)
            if schema.get("format") == "method":
                if full[key] is None and schema.get("optional"):
                    continue
                full[key] = self.methods._complete_warm_start(full[key], f"{where}.{key}", inside)
                continue
            if key in entry.chains and isinstance(full[key], list):
                steps = enumerate(full[key])
                full[key] = [self._complete_warm_start(step, f"{where}.{key}.{i}", inside) for i, step in steps]
            if isinstance(full[key], float) and not math.isfinite(full[key]):  # NaN passes any limit
                raise CatalogueError(f"{where}: {name}'s {key} is wrong: {full[key]} is not finite.")
            errors = list(jsonschema.Draft202012Validator(schema).iter_errors(full[key]))
            if errors:
                advice = _advice(full[key], schema)
                first: Any = errors[0]
                fault = schema_fault(first.validator, first.validator_value, first.instance, first.message)
                raise CatalogueError(f"{where}: {name}'s {key} {fault}{advice}.{_meaning(schema)}")
            if schema.get("type") == "integer":  # JSON Schema accepts 128.0 as an integer, range() does not
                full[key] = int(full[key])
        return full

    def _complete_warm_start(self, value: Any, where: str, outer: tuple[str, ...]) -> dict[str, Any]:
        name, params = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(name, str) or not isinstance(params or {}, dict):
            raise CatalogueError(f"{where} must be a method's name or {{name: {{parameters}}}}. Got {value!r} instead.")
        if name in outer:
            raise CatalogueError(
                f"{where}: warm starts must not form a cycle. Got {' -> '.join([*outer, name])} instead."
            )
        return {name: self._complete(name, params or {}, where, outer)}

    def refusal(self, name: str, params: Mapping[str, Any], target: Target) -> str | None:
        """Why the method with these complete parameters, including warm starts, cannot reach the target, or None."""
        entry = self[name]
        own = entry.refusal(target, params)
        if own:
            return own
        if entry.chains:
            return self._chain_refusal([(name, inside) for _, name, inside in entry.inner(params)], target)
        for key, inner, inner_params in entry.inner(params):
            schema, card = entry.card["parameters"][key], self[inner].card
            asked = schema.get("asked")
            part = target if asked is None else getattr(target, asked)
            if asked == "unrounded" and card.get("sparse_factor"):
                return f"its {key} cannot be used: {inner} gives a sparse factor"
            if asked in ("pruning", "grid") and part.dense:
                continue
            if "gives" in schema and (lacking := self.needs(inner, inner_params) - set(schema["gives"])):
                return (
                    f"its {key} cannot quantise: {inner} needs {', '.join(sorted(lacking))}, which {name} does not give"
                )
            if asked != "pruning" and card.get("own_grid"):
                return f"its {key} cannot quantise: {inner} has a grid of its own"
            if reason := self.refusal(inner, inner_params, part):
                return f"its {key} cannot be used: {reason}"
            if asked == "grid" and target.sparsity and not card.get("keeps_zeros"):
                return f"its {key} cannot be used: {inner} does not keep zeros"
        return None

    def _chain_refusal(self, steps: list[tuple[str, Mapping[str, Any]]], target: Target) -> str | None:
        """Why a chain of two methods cannot prune and quantise to the target, or None."""
        quantises = [self.refusal(*step, target.grid) for step in steps]
        if None not in quantises:
            return f"none of its methods quantises: {quantises[0]}, {quantises[1]}"
        prunes = [self.refusal(*step, target.pruning) for step in steps]
        # If both can quantise, the first one prunes, unless only the second can prune.
        prunes_first = quantises[1] is None and not (quantises[0] is None and prunes[0] and not prunes[1])
        pruner, quantiser = steps if prunes_first else steps[::-1]
        cannot = prunes[0 if prunes_first else 1]
        if cannot:
            return f"{quantiser[0]} quantises, and the other method cannot prune: {cannot}"
        if not self[quantiser[0]].card.get("keeps_zeros"):
            return f"{quantiser[0]} does not keep the zeros of {pruner[0]}"
        if not prunes_first and self[pruner[0]].card["updates_weights"]:
            return f"{pruner[0]} changes the weights that {quantiser[0]} has quantised"
        return None

    def needs(self, name: str, params: Mapping[str, Any]) -> set[str]:
        """The needs of a method with these complete parameters, and of the methods inside it, from their cards.

        A chain only passes its layer to its methods, so it needs what they need.
        """
        own = set() if self[name].chains else set(needed(self[name].card, params))
        return own.union(*(self.methods.needs(inner, own_params) for _, inner, own_params in self[name].inner(params)))

    def sources(self, name: str, params: Mapping[str, Any]) -> list[Path]:
        """Files of the code that decides the method's results: its own and their imports, its warm starts', the shared
        ones."""
        own = [self[name].path, *self[name].imports]
        for _, inner, inner_params in self[name].inner(params):
            own += [p for p in self.methods.sources(inner, inner_params) if p not in SHARED_SOURCES]
        return [*dict.fromkeys(own), *SHARED_SOURCES]

    def build(self, name: str, params: Mapping[str, Any]) -> "Method":
        """Import the method's file (and with it torch) and construct the method with complete parameters."""
        return self._build(name, params)

    def allocator(self, name: str, params: Mapping[str, Any]) -> "Allocator":
        """The same for a catalogue of allocators."""
        return self._build(name, params)

    def _build(self, name: str, params: Mapping[str, Any]) -> Any:
        entry = self[name]
        values = dict(params)
        for key in entry.chains:
            if key in values:
                values[key] = ()
        for key, inner, inner_params in entry.inner(params):
            built = self.methods.build(inner, inner_params)
            values[key] = (*values[key], built) if key in entry.chains else built
        return getattr(_import(entry), entry.class_name)(**values)


def kind_of(path: Path) -> Kind:
    """ALLOCATOR for a file with a class derived from Allocator; METHOD for any other file."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, RecursionError, SyntaxError, ValueError):  # read_entry reports the error
        return METHOD
    return ALLOCATOR if _derived(tree, ALLOCATOR) else METHOD


def read_entry(path: Path, kind: Kind = METHOD) -> Entry | None:
    """The entry of a file of this kind, or None for a file without a CARD; raises CatalogueError for a wrong file."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise CatalogueError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path} is not valid Python: {error}.") from None
    return _entry(path, text, kind)


@cache  # a process reads the same files for each of its catalogues, .2 s for all of them
def _entry(path: Path, text: str, kind: Kind) -> Entry | None:
    """The same for the text of a file."""
    try:
        tree = ast.parse(text, filename=str(path))
    except RecursionError:
        raise CatalogueError(f"{path} is not valid Python: it is nested too deeply.") from None
    except SyntaxError as error:
        at = f" in line {error.lineno}" if error.lineno else ""
        raise CatalogueError(f"{path} is not valid Python: {error.msg}{at}.") from None
    except ValueError as error:  # a null byte
        raise CatalogueError(f"{path} is not valid Python: {error}.") from None
    card = _card(tree, path, kind)
    if card is None:
        return None
    classes = _derived(tree, kind)
    if len(classes) != 1:
        raise CatalogueError(f"{path} must define one class derived from {kind.base}. Got {len(classes)} instead.")
    _check_methods(classes[0], path, kind)
    if kind is ALLOCATOR and (
        fault := card_fault(card, classes[0].name, _defined(classes[0]), len(classes[0].bases) > 1)
    ):
        raise CatalogueError(f"{path}: {fault}")
    defaults = _defaults(classes[0], path)
    if set(defaults) != set(card["parameters"]):
        raise CatalogueError(
            f"{path}: CARD['parameters'] and the fields of {classes[0].name} must be the same. "
            f"Got {sorted(card['parameters'])} and {sorted(defaults)} instead."
        )
    _check_names_of(card, defaults, path)
    needed = tuple(own for own in closure(imports_of(tree)) if own not in SHARED_SOURCES)
    return Entry(path.stem, path, classes[0].name, card, defaults, needed, kind)


def _card(tree: ast.Module, path: Path, kind: Kind) -> dict[str, Any] | None:
    """The card of a file, with the schemas of its parameters complete; None for a file without one."""
    cards = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["CARD"]
    ]
    if not cards:
        return None
    card = _literal(cards[0], f"{path}: CARD")
    errors = list(jsonschema.Draft202012Validator(kind.schema).iter_errors(card))
    if errors:
        at = "".join(f"[{part!r}]" for part in errors[0].absolute_path)
        raise CatalogueError(f"{path}: CARD{at} is wrong: {errors[0].message}.")
    for parameter, schema in card["parameters"].items():
        at = f"CARD['parameters'][{parameter!r}]"
        try:
            card["parameters"][parameter] = schema = merged(schema)
            jsonschema.Draft202012Validator.check_schema(schema)
        except KeyError as error:
            raise CatalogueError(f"{path}: {at} is wrong: {error.args[0]}.") from None
        except jsonschema.SchemaError as error:
            raise CatalogueError(f"{path}: {at} is wrong: {error.message.splitlines()[0]}.") from None
    return card


def _check_names_of(card: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> None:
    """Raise CatalogueError for an entry of the card that must name a parameter and does not."""
    if "named_by" in card and card["named_by"] not in card["parameters"]:
        raise CatalogueError(f"{path}: CARD['named_by'] must be a parameter. Got {card['named_by']!r} instead.")
    cost = card.get("cost", {})
    for key in ("products_where", "products_per"):
        for name in cost.get(key, {}).keys() - card["parameters"].keys():
            raise CatalogueError(f"{path}: CARD['cost'][{key!r}] must name parameters. Got {name!r} instead.")
    for name in cost.get("products_per", {}):
        if isinstance(defaults[name], bool) or not isinstance(defaults[name], int | float):
            raise CatalogueError(
                f"{path}: CARD['cost']['products_per'] must name parameters whose default is a number. "
                f"Got {name!r} instead, whose default is {defaults[name]!r}."
            )


def _derived(tree: ast.Module, kind: Kind) -> list[ast.ClassDef]:
    """The classes of a file that derive from the kind's base."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] == kind.base for base in node.bases)
    ]


def _check_methods(node: ast.ClassDef, path: Path, kind: Kind) -> None:
    """Raise CatalogueError unless the class implements its call and does not override the base class's methods."""
    defined = _defined(node)
    for name in kind.of_the_base:
        if name in defined:
            raise CatalogueError(
                f"{path}: {node.name} must define {kind.signature}. Got {name} instead, which belongs to the "
                "base class: it checks the target before solve is called."
            )
    if defined.isdisjoint({kind.signature.partition("(")[0], *kind.instead}) and len(node.bases) == 1:
        raise CatalogueError(f"{path}: {node.name} must define {kind.signature}.")


def _defined(node: ast.ClassDef) -> set[str]:
    """The names that a class defines itself."""
    names = [target for statement in node.body if isinstance(statement, ast.Assign) for target in statement.targets]
    names += [statement.target for statement in node.body if isinstance(statement, ast.AnnAssign)]
    functions = {statement.name for statement in node.body if isinstance(statement, ast.FunctionDef)}
    return functions | {name.id for name in names if isinstance(name, ast.Name)}


def _defaults(node: ast.ClassDef, path: Path) -> dict[str, Any]:
    defaults = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if statement.value is None:
                raise CatalogueError(f"{path}: the field {name} of {node.name} needs a literal default.")
            value = _literal(statement.value, f"{path}: the default of {node.name}.{name}")
            defaults[name] = list(value) if isinstance(value, tuple) else value  # as in JSON, and therefore in a config
    return defaults


def _literal(node: ast.expr, what: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise CatalogueError(f"{what} must be a literal, so that it can be read without running the file.") from None


def _meaning(schema: Mapping[str, Any]) -> str:
    return f" It means: {schema['description']}" if "description" in schema else ""


def _advice(value: Any, schema: Mapping[str, Any]) -> str:
    """Advice on a number that YAML reads as text, such as 1e-3."""
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and schema.get("type") in ("number", "integer"):
            return f"; YAML reads {value} as text: write {float(value)!r}"
    return ""


def _import(entry: Entry):
    if entry.shipped:
        return importlib.import_module(f"layerwise.{entry.kind.folder}.{entry.name}")
    name = _module_name(entry.path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, entry.path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their own module
        spec.loader.exec_module(module)
    return sys.modules[name]


def forget(path: Path) -> None:
    """Import the file outside methods/ again when its method is next built, because it may have been edited."""
    sys.modules.pop(_module_name(path), None)


def _module_name(path: Path) -> str:
    return f"layerwise_method_{path.resolve()}"  # the path, because another folder may hold a method of the same name
