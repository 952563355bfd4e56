"""Markdown of the code host made into that of the site: links, and the blank lines that Python-Markdown asks for."""

import posixpath
import re
from collections.abc import Callable, Iterator

FENCE = re.compile(r"^ *(```|~~~)")
CODE = re.compile(r"(`+)(?:.*?[^`])?\1(?!`)", re.DOTALL)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
ITEM = re.compile(r"^ *([-*+]|\d+\.) ")
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")  # https:, mailto:


def sections(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a fenced block, text) of a page, one after the other; the texts together are the page."""
    fenced, lines = False, list[str]()
    for line in text.splitlines(keepends=True):
        fence = FENCE.match(line) is not None
        if fence and not fenced and lines:
            yield False, "".join(lines)
            lines = []
        lines.append(line)
        if fence:
            if fenced:
                yield True, "".join(lines)
                lines = []
            fenced = not fenced
    if lines:
        yield fenced, "".join(lines)


def without_code(text: str) -> str:
    """The text without fenced blocks and inline code."""
    return "".join(CODE.sub("", part) for fenced, part in sections(text) if not fenced)


def links(text: str) -> list[str]:
    """The addresses that a page links to and images that it shows, in order, those in code left out."""
    return [match[2] for match in LINK.finditer(without_code(text))]


def relinked(text: str, source: str, address: Callable[[str], str]) -> str:
    """The text with its relative links replaced.

    source: path of the page within the repository, from which its links are read. address: path within the repository
    -> the new link; anchors are kept. Links within the page and to other hosts stay.
    """

    def replaced(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        if not path or ELSEWHERE.match(path):
            return match[0]
        return match[1] + address(resolved(source, path)) + hash_ + anchor + match[3]

    return "".join(part if fenced else _outside_code(part, replaced) for fenced, part in sections(text))


def resolved(source: str, link: str) -> str:
    """The path within the repository that a link of a page, without its anchor, leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _outside_code(text: str, replaced: Callable[[re.Match[str]], str]) -> str:
    """Links replaced in a text without fenced blocks; a link's text may have code in it, but code has no link."""
    spans = [match.span() for match in CODE.finditer(text)]
    inside = lambda match: any(start <= match.start() and match.end() <= end for start, end in spans)  # noqa: E731
    return LINK.sub(lambda match: match[0] if inside(match) else replaced(match), text)


def spaced(text: str) -> str:
    """The text with a blank line before each list that follows a paragraph, and nested items indented by four.

    The code host asks for neither, Python-Markdown for both.
    """
    return "".join(part if fenced else _spaced(part) for fenced, part in sections(text))


def _spaced(text: str) -> str:
    lines, previous = list[str](), ""
    for line in text.splitlines(keepends=True):
        item = ITEM.match(line)
        if item and previous.strip() and not ITEM.match(previous) and not previous.startswith(" "):
            lines.append("\n")
        nested = re.match(r"^( {2,3})([-*+] )", line)
        lines.append("    " + line.lstrip() if nested else line)
        previous = line
    return "".join(lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; a bar within an entry is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |" for line in lines) + "\n"


def code(value: str) -> str:
    """A value as inline code, nothing for nothing."""
    return f"`{value}`" if value else ""
