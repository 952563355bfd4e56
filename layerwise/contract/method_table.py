"""The methods' cards as a readable table, without importing torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import Entry
from layerwise.runtime.sentences import did_you_mean
from layerwise.runtime.text_table import aligned


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter of a method: its default, its meaning, and the JSON Schema of its values."""

    name: str
    default: Any
    description: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class MethodCard:
    """The facts in a method's card.

    paper, arxiv, code: its source, if it has one.
    patterns: kinds of sparsity that it reaches: dense, row, layer, n:m, 1xb.
    bits: widths and formats of its quantisation grids; empty if it does not quantise.
    updates_weights: whether it changes kept weights.
    needs: the statistics that it reads: "gram" and "cross_gram" of a `Gram`, "fisher" of a `Layer`, the rest fields of
        `Statistics`.
    control: whether it is only a baseline for comparison and not a good compression method.
    """

    name: str
    title: str
    paper: str | None
    arxiv: str | None
    code: str | None
    patterns: tuple[str, ...]
    bits: tuple[int | str, ...]
    updates_weights: bool
    needs: tuple[str, ...]
    control: bool
    parameters: tuple[Parameter, ...]
    path: Path

    def __repr__(self) -> str:
        """The whole card as text."""
        source = [text for text in (self.paper, self.arxiv and f"arXiv {self.arxiv}", self.code) if text]
        lines = [f"{self.name}: {self.title}", *(f"  {text}" for text in source)]
        lines += [
            f"  patterns: {', '.join(self.patterns) or 'none'}",
            f"  bits: {widths(self.bits) or 'none'}",
            f"  updates weights: {'yes' if self.updates_weights else 'no'}",
            f"  needs: {', '.join(self.needs) or 'nothing'}",
            *(f"  {own.name} = {own.default!r}: {own.description}" for own in self.parameters),
        ]
        return "\n".join(lines)


class MethodTable(Sequence[MethodCard]):
    """Cards by number or by name; shown as a table with one row per card."""

    def __init__(self, cards: Iterable[MethodCard]) -> None:
        self._cards = tuple(cards)

    @overload
    def __getitem__(self, key: int | str) -> MethodCard: ...
    @overload
    def __getitem__(self, key: slice) -> "MethodTable": ...
    def __getitem__(self, key: "int | str | slice") -> "MethodCard | MethodTable":
        if isinstance(key, slice):
            return MethodTable(self._cards[key])
        if isinstance(key, int):
            return self._cards[key]
        found = {card.name: card for card in self._cards}
        if key not in found:
            near = did_you_mean(key, found)
            raise KeyError(f"A method must be one of {', '.join(found)}. Got {key!r} instead{near}.")
        return found[key]

    def __len__(self) -> int:
        return len(self._cards)

    def __iter__(self) -> Iterator[MethodCard]:
        return iter(self._cards)

    def __repr__(self) -> str:
        rows = [("name", "title", "patterns", "bits", "updates", "needs", "parameters")]
        rows += [
            (
                card.name,
                card.title,
                ", ".join(card.patterns),
                widths(card.bits),
                "yes" if card.updates_weights else "",
                ", ".join(card.needs),
                ", ".join(f"{own.name}={own.default!r}" for own in card.parameters),
            )
            for card in self._cards
        ]
        return "\n".join(aligned(rows))


def methods(folders: Path | str | Iterable[Path | str] = ()) -> MethodTable:
    """The cards of all shipped methods, and of those in further folders, by name in alphabetical order.

    folders: one folder, or several.
    Reads the files as text; torch is not imported. Raises CatalogueError (a ValueError) for a folder that is absent and
    for a file whose card is wrong.
    """
    listed = [folders] if isinstance(folders, Path | str) else folders
    catalogue = Catalogue([Path(folder) for folder in listed])
    return MethodTable(card_of(catalogue[name]) for name in sorted(catalogue))


def card_of(entry: Entry) -> MethodCard:
    card = entry.card
    return MethodCard(
        name=entry.name,
        title=card["title"],
        paper=card.get("paper"),
        arxiv=card.get("arxiv"),
        code=card.get("code"),
        patterns=tuple(card["patterns"]),
        bits=tuple(card["bits"]),
        updates_weights=card["updates_weights"],
        needs=tuple(card["needs"]),
        control=entry.control,
        parameters=tuple(
            Parameter(name, entry.defaults[name], schema.get("description", ""), schema)
            for name, schema in card["parameters"].items()
        ),
        path=entry.path,
    )


def widths(bits: Iterable[int | str]) -> str:
    """Widths of codes as text: 2-8 for every width from 2 to 8, otherwise a list; then the names of formats."""
    listed = list(bits)
    ordered = sorted(width for width in listed if isinstance(width, int))
    formats = [width for width in listed if isinstance(width, str)]
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return ", ".join([f"{ordered[0]}-{ordered[-1]}", *formats])
    return ", ".join([*map(str, ordered), *formats])
