"""Reference pages, each generated from what the program itself reads: schemas, cards, the command, docstrings."""

from collections.abc import Iterator, Mapping
from typing import Any

import typer.main
import yaml
from typer.core import TyperGroup

from layerwise.cli import cards
from layerwise.cli.app import app
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import Entry
from layerwise.contract.method_table import widths
from layerwise.runtime.project import ROOT
from layerwise.storage import table_schema
from website import docstrings, plan
from website.markdown import code, table

CONFIG = ROOT / "workflow/schemas/config.schema.yaml"
KEYS = ["key", "what it may be", "default", "meaning"]
Schema = Mapping[str, Any]


def config_keys() -> str:
    """Every key of a study's config: what it may be, its default and its meaning, from the schema that checks it."""
    schema = yaml.safe_load(CONFIG.read_text("utf-8"))
    keys = schema["properties"]
    plain = {name: own for name, own in keys.items() if _entries(own, schema) is None}
    parts = ["# Config keys\n", "Generated from the schema that every study is checked against.\n"]
    parts += ["## The study\n", _key_table(plain, schema, schema["required"])]
    for name, own in keys.items():
        entry = _entries(own, schema)
        if entry is not None:
            parts += [f"## {name}\n", *([own["description"] + "\n"] if "description" in own else [])]
            parts += [_key_table(entry.get("properties", {}), schema, entry.get("required", ()))]
    return "\n".join([*parts, *_stages(schema)])


def _stages(schema: Schema) -> Iterator[str]:
    """The stages of `tune`, which are below a method."""
    tune = schema["$defs"]["tune"]
    yield f"## tune\n\n{tune['description']}\n"
    for name, stage in tune["properties"].items():
        yield f"### {name}\n\n{stage['description']}\n\n" + _key_table(stage["properties"], schema, ())


def _resolved(schema: Schema, whole: Schema) -> Schema:
    """The schema with what its $ref names filled in."""
    if "$ref" not in schema:
        return schema
    return {**whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], **{key: schema[key] for key in schema if key != "$ref"}}


def _entries(schema: Schema, whole: Schema) -> Schema | None:
    """The schema of an entry of a section or list of objects; None for a key that holds a plain value."""
    inner = schema.get("additionalProperties") or schema.get("items")
    found = _resolved(inner, whole) if isinstance(inner, Mapping) else {}
    return found if "properties" in found else None


def _key_table(properties: Mapping[str, Schema], whole: Schema, required: Any) -> str:
    rows = []
    for name, given in properties.items():
        own = _resolved(given, whole)
        default = "required" if name in required else code(cards.as_text(own["default"])) if "default" in own else ""
        if own.get("default", 0) == "\n\n":
            default = "two line ends"
        rows.append([code(name), _kind(own, whole), default, own.get("description", "")])
    return table(KEYS, rows)


def _kind(schema: Schema, whole: Schema) -> str:
    """What a value may be, in words."""
    if schema.get("type") == "array":
        return f"list of {_kind(_resolved(schema.get('items', {}), whole), whole)}"
    if "properties" in schema:
        return "keys of its own"
    return cards.type_of(schema)


def methods() -> str:
    """The cards of all methods: a table, then each whole."""
    known = cards.catalogue()
    rows = [
        [
            f"[{entry.name}](#{entry.name})",
            entry.card["title"],
            ", ".join(entry.card["patterns"]),
            widths(entry.card["bits"]) or "none",
            "control" if entry.control else cards.as_text(entry.card["updates_weights"]),
            ", ".join(entry.card["needs"]) or "nothing",
        ]
        for entry in known.values()
    ]
    header = ["method", "title", "patterns", "bits", "updates kept weights", "reads"]
    return "\n".join(
        [
            "# Methods\n",
            "Generated from the cards of the methods' files.\n",
            table(header, rows),
            *map(_card, known.values()),
        ]
    )


def allocators() -> str:
    """The cards of all allocators."""
    known = Catalogue([], kind=ALLOCATOR, methods=cards.catalogue())
    rows = [
        [
            f"[{e.name}](#{e.name})",
            e.card["title"],
            ", ".join(e.card["budgets"]),
            ", ".join(e.card["needs"]) or "nothing",
        ]
        for e in known.values()
    ]
    parts = ["# Allocators\n", "Generated from the cards of the allocators' files.\n"]
    parts += [table(["allocator", "title", "spreads", "reads"], rows), *map(_card, known.values())]
    return "\n".join(parts)


def _card(entry: Entry) -> str:
    """One card: its source, its file and its parameters."""
    card = entry.card
    source = [card.get("paper", "")]
    source += [f"[arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})"] if "arxiv" in card else []
    source += [f"<{card['code']}>" if card["code"].startswith("http") else card["code"]] if "code" in card else []
    lines = [f"## {entry.name}\n", f"{card['title']}. " + ", ".join(filter(None, source)) + "\n"]
    rows = [
        [code(name), cards.type_of(schema), code(cards.as_text(entry.defaults[name])), schema.get("description", "")]
        for name, schema in card["parameters"].items()
    ]
    return "\n".join([*lines, table(["parameter", *KEYS[1:]], rows) if rows else "It has no parameters.\n"])


def tables() -> str:
    """The columns of every table that a study writes, from the schema that each table is checked against."""
    parts = ["# Columns of the tables\n", "Generated from the schema that every table is checked against.\n"]
    for name, content in table_schema.document()["tables"].items():
        parts += [f"## {name}\n", *([content["description"] + "\n"] if "description" in content else [])]
        rows = [
            [code(column), _type(own), own.get("description", "")] for column, own in table_schema.columns(name).items()
        ]
        parts.append(table(["column", "type", "meaning"], rows))
    return "\n".join(parts)


def _type(column: Schema) -> str:
    """The type of a column, and whether it may be empty."""
    types = column["type"] if isinstance(column["type"], list) else [column["type"]]
    words = [f"one of {', '.join(map(str, column['enum']))}" if "enum" in column else types[0]]
    return ", ".join([*words, *(["may be empty"] if "null" in types else [])])


def command_line() -> str:
    """What `--help` prints of the command and of each of its commands."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    whole = command.make_context("layerwise", [], resilient_parsing=True)
    parts = ["# The command\n", "Generated from what `layerwise --help` prints.\n", _help(command.get_help(whole))]
    for name, own in command.commands.items():
        if not own.hidden:
            parts += [f"## {name}\n", _help(own.get_help(own.make_context(name, [], whole, resilient_parsing=True)))]
    return "\n".join(parts)


def _help(text: str) -> str:
    return f"```text\n{text}\n```\n"


def library() -> str:
    """Signatures and docstrings of the public names of the library."""
    import layerwise

    names = sorted(layerwise.MODULE_OF, key=lambda name: (name[0].isupper(), name))  # functions, then classes
    entries = [docstrings.entry(layerwise.MODULE_OF[name], name) for name in names]
    return "\n".join(["# The library\n", "Generated from the docstrings of `layerwise`.\n", *entries])


def rules() -> str:
    """What each rule of the workflow does, from its docstring."""
    rows = [[code(name), text, code(file)] for name, (text, file) in plan.rules().items()]
    head = "# Rules of the workflow\n\nGenerated from the docstrings of `workflow/rules`.\n\n"
    return head + table(["rule", "what it does", "file"], rows)


PAGES = {
    "reference/api.md": library,
    "reference/config.md": config_keys,
    "reference/methods.md": methods,
    "reference/allocators.md": allocators,
    "reference/tables.md": tables,
    "reference/cli.md": command_line,
    "reference/rules.md": rules,
}
