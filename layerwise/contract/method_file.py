"""Card and hyperparameters of a method's or an allocator's file, read as text, without torch.

A file that holds a literal CARD and one frozen dataclass derived from Method or Allocator has an entry in a catalogue,
named after the file. See docs/adding-a-method.md.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from layerwise.contract.allocator_card import card_fault
from layerwise.contract.cards import ACTS, ALLOCATOR, METHOD, Kind, merged, needed
from layerwise.contract.import_closure import FOLDERS, closure, imports_of
from layerwise.contract.target import LOW_RANK, SUM, Target, refusal
from layerwise.runtime.sentences import schema_fault

# Code on which a result depends besides the method's own file. An edit to one of these files re-runs every cell.
SHARED_SOURCES = tuple(closure(["layerwise.compression.verify"]))


class CatalogueError(ValueError):
    """A method's file or an entry that uses it is wrong; the text is one sentence for the user."""


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


def card_kind(path: Path) -> Kind:
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
        raise CatalogueError(f"{path} is not text in UTF-8: byte {error.start} cannot be decoded.") from None
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
        raise CatalogueError(f"{path}: CARD{at} {schema_fault(errors[0])}.")
    for parameter, schema in card["parameters"].items():
        at = f"CARD['parameters'][{parameter!r}]"
        try:
            card["parameters"][parameter] = schema = merged(schema)
            jsonschema.Draft202012Validator.check_schema(schema)
        except KeyError as error:
            raise CatalogueError(f"{path}: {at} is wrong: {error.args[0]}.") from None
        except jsonschema.SchemaError as error:
            at += "".join(f"[{part!r}]" for part in error.absolute_path)
            raise CatalogueError(f"{path}: {at} {schema_fault(error)}.") from None
        told = schema.get("acts", {})
        for word in told.values() if isinstance(told, Mapping) else [told]:
            if word not in [*ACTS]:
                raise CatalogueError(f"{path}: {at}['acts'] must be one of {', '.join(ACTS)}. Got {word!r} instead.")
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
