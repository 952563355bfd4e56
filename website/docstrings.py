"""Signatures and docstrings of the library's public names as Markdown, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator

from layerwise.runtime.project import PACKAGE

LONGEST = 96  # characters of a signature in one line
NAMED = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")  # how a line on an argument or a field begins
Function = ast.FunctionDef | ast.AsyncFunctionDef


def entry(module: str, name: str) -> str:
    """The section of a class or function: signature, docstring, and a class's members.

    module: of the package, which defines the name or imports it from another module of the package. Raises ValueError
    where it does neither.
    """
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return _class(node) if isinstance(node, ast.ClassDef) else _function(node, 2)
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and any((own.asname or own.name) == name for own in node.names)
        ):
            return entry(node.module, name)
    raise ValueError(f"{module} must define or import {name}, a class or a function. Got neither instead.")


def _class(node: ast.ClassDef) -> str:
    """A class: its fields as its signature, its docstring, and its public members that have one."""
    fields = [own for own in node.body if isinstance(own, ast.AnnAssign)]
    arguments = [ast.unparse(own) for own in fields if not ast.unparse(own.target).startswith("_")]
    bases = [ast.unparse(base) for base in node.bases]
    said = f"Derived from {', '.join(f'`{base}`' for base in bases)}.\n" if bases else ""
    parts = [
        f"## {node.name}\n",
        _code(_call(f"class {node.name}", arguments, "")),
        said,
        prose(ast.get_docstring(node)),
    ]
    return "\n".join([*filter(None, parts), *(_function(own, 3) for own in _members(node))])


def _members(node: ast.ClassDef) -> Iterator[Function]:
    """Public methods and properties with a docstring."""
    for own in node.body:
        if isinstance(own, Function) and not own.name.startswith("_") and ast.get_docstring(own):
            yield own


def _function(node: Function, level: int) -> str:
    """A function, method or property under a heading of a level."""
    marks = {ast.unparse(own).partition("(")[0].rpartition(".")[2] for own in node.decorator_list}
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if marks & {"property", "cached_property"}:
        signature = f"{node.name}{result.replace(' -> ', ': ', 1)}"
    else:
        signature = _call(f"def {node.name}", _arguments(node.args), result)
    return "\n".join([f"{'#' * level} {node.name}\n", _code(signature), prose(ast.get_docstring(node))])


def _arguments(given: ast.arguments) -> list[str]:
    """The arguments of a signature, one by one, but for self and cls."""
    text, depth, found = ast.unparse(given), 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    names = [own.strip() for own in found if own.strip() not in ("", "self", "cls")]
    return [re.sub(r"^([\w*]+: [^=]*)=", r"\1 = ", own) for own in names]


def _call(start: str, arguments: list[str], result: str) -> str:
    """A signature, with an argument per line where one line is too short for all."""
    line = f"{start}({', '.join(arguments)}){result}"
    if len(line) <= LONGEST:
        return line
    return "\n".join([f"{start}(", *(f"    {own}," for own in arguments), f"){result}"])


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: the lines that begin with names of arguments or fields become a list."""
    paragraphs = re.split(r"\n\s*\n", docstring or "")
    return "\n\n".join(_paragraph(own) if i else own for i, own in enumerate(paragraphs)) + "\n"


def _paragraph(text: str) -> str:
    if not NAMED.match(text):
        return text
    items = list[str]()
    for line in text.splitlines():
        named = NAMED.match(line)
        if named:
            items.append(f"- `{named[1]}`: {line[named.end() :]}")
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)
