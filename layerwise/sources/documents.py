"""Read the documents of a text from files of several formats and encodings, and normalise them.

Invisible characters from an editor or a platform would become tokens. So byte order marks and the carriage returns of
line ends are removed, both in files and in strings of JSON and parquet.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.sources.hub import Spec
from layerwise.sources.text_files import PLAIN_SUFFIXES, TEXT_SUFFIXES, fetch_text

if TYPE_CHECKING:
    import pyarrow as pa

READ_ERRORS = (OSError, EOFError, zlib.error)
# The steps of normalisation, in the order in which `normalised` names them.
WIDE, MARK, RETURNS = ("UTF-32", "UTF-16"), "byte order mark", "line ends"
STEPS = (*WIDE, MARK, RETURNS)
FOREIGN = 0.01  # share of lines above which carriage returns count as line ends of another system
# Byte order marks of encodings identified only by their mark; the mark of UTF-32 begins with that of UTF-16.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
RETURN = re.compile("\r\n?")
MARKS = re.compile("^\ufeff+", re.MULTILINE)  # also at the start of a line, where files with a mark were joined


@dataclass(frozen=True)
class Text:
    """documents: in the order of the files. normalised: the STEPS applied to them, such as "byte order mark, line
    ends"; empty if nothing changed."""

    documents: list[str]
    normalised: str = ""


def documents(spec: Spec) -> list[str]:
    """The documents of a text, as `read_text` reads them."""
    return read_text(spec).documents


def read_text(spec: Spec) -> Text:
    """The documents of a text, normalised, in the order of its files.

    A .txt or .raw file is one document, or several that its `separator` separates (without blank ones). Each line of a
    .jsonl or .json, element of a JSON list and row of a .parquet is one document, in its `field` (default "text"). With
    `begins`, only documents that begin with it count. Line ends in `separator` and `begins` are normalised like those
    of the text.
    Raises InputError, which names the file, for an unreadable file and for a field that is absent or not text; also if
    the separator occurs nowhere or no document begins with `begins`. A warning on stderr names the files without the
    separator, if it occurs in others.
    """
    where = spec.get("path") or spec["hub"]
    separator, begins = (RETURN.sub("\n", spec.get(key) or "") for key in ("separator", "begins"))
    done: set[str] = set()
    found: list[str] = []
    occurs, whole = False, list[str]()
    for path in fetch_text(spec):
        read = _read(path, spec.get("field") or "text", done)
        if separator and path.suffix in PLAIN_SUFFIXES:
            parts = read[0].split(separator)
            occurs = occurs or len(parts) > 1
            whole += [path.name] if len(parts) == 1 and read[0].strip() else []
            read = [part for part in (without_marks(part, done) for part in parts) if part.strip()]
        found += read
    if separator and not occurs:  # everything would be one document, and JSON and parquet do not use it
        raise InputError(
            f"The separator {separator!r} of {where} must occur in a .txt or .raw of the text, but it occurs nowhere: "
            "leave it out, or give the string that separates the documents."
        )
    if whole:  # this may be right for a file with a single document
        told = f"does not occur in {brief(', '.join(whole))}, which is read as one document per file"
        print(f"warning: The separator {separator!r} of {where} {told}.", file=sys.stderr)
    chosen = [document for document in found if document.startswith(begins)]
    if found and not chosen:
        raise InputError(
            f"None of the {len(found)} documents of {where} begins with {begins!r}, as the text's `begins` requires."
        )
    return Text(chosen, ", ".join(step for step in STEPS if step in done))


def normalise(text: str, done: set[str]) -> str:
    """The text without byte order marks at its start or that of a line, each line end a "\\n".

    Carriage returns in less than a hundredth of the lines are part of the text, not line ends, and are kept. done: the
    applied STEPS are added to it.
    """
    returns = text.count("\r")
    if returns and returns >= FOREIGN * text.count("\n"):
        text = RETURN.sub("\n", text)
        done.add(RETURNS)
    return without_marks(text, done)


def without_marks(text: str, done: set[str]) -> str:
    """The text without byte order marks at its start or that of a line. done: as in `normalise`."""
    if "\ufeff" in text and (cleaned := MARKS.sub("", text)) != text:
        text = cleaned
        done.add(MARK)
    return text


def lone_surrogate(text: str) -> int | None:
    """The index of half a character in a text, which no file and no tokenizer accepts; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def text_hash(documents: Sequence[str], join: str) -> str:
    """SHA-256 of the joined documents in UTF-8."""
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(((join if number else "") + document).encode("utf-8"))
    return digest.hexdigest()


def _read(path: Path, field: str, done: set[str]) -> list[str]:
    """The documents of a file, normalised; a plain text is one."""
    if not path.name.endswith(TEXT_SUFFIXES):
        raise InputError(f"A text must end in one of {', '.join(TEXT_SUFFIXES)}. Got {path} instead.")
    if path.suffix == ".parquet":
        return [normalise(text, done) for text in _parquet(path, field)]
    text = _decoded(path, done)
    if path.suffix in PLAIN_SUFFIXES:
        return [normalise(text, done)]
    # Marks and line ends between the strings belong to the file, not to the text, so `normalised` omits them.
    return [normalise(found, done) for found in _json(path, normalise(text, set()), field)]


def _decoded(path: Path, done: set[str]) -> str:
    """The characters of a file, in UTF-8 or the encoding of its byte order mark."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "UTF-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in {encoding}: byte {error.start} cannot be decoded.") from None
    if "\0" in text:
        raise InputError(
            f"{path} must hold text. Got a NUL at character {text.index(chr(0))} instead: "
            "is it UTF-16 without a byte order mark, or not text?"
        )
    if encoding in WIDE:
        done.add(encoding)
    return text


def _json(path: Path, text: str, field: str) -> Iterator[str]:
    """The field of each object of a JSON list, or of each line that is not blank."""
    if text.lstrip().startswith("["):
        try:
            rows = enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a JSON list: {error}.") from None
    else:
        rows = _lines(path, text)
    for number, row in rows:
        if not isinstance(row, dict) or field not in row:
            fields = ", ".join(map(repr, row)) if isinstance(row, dict) else "no fields"
            raise InputError(
                f"{path} must have the field {field!r} in each document. Got {fields} in number {number} instead."
            )
        found = row[field]
        if not isinstance(found, str):
            raise InputError(
                f"The field {field!r} in {path} must hold text. Got {json.dumps(found)} in document {number} instead."
            )
        if (place := lone_surrogate(found)) is not None:
            raise InputError(
                f"The field {field!r} in {path} must hold whole characters. Got half of one, the lone surrogate "
                f"{brief(found[place])}, as character {place} of document {number} instead."
            )
        yield found


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): strings may hold other line separators
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"Line {number} of {path} is not JSON: {error}.") from None


def _parquet(path: Path, field: str) -> Iterator[str]:
    """The field of each row: any of Arrow's string types, or binary with UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        column = parquet.read_table(path, columns=[field])[field] if field in names else None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if column is None:
        raise InputError(f"{path} must have the field {field!r}. Got {', '.join(map(repr, names))} instead.")
    if not _of_text(column.type) or column.null_count:
        raise InputError(
            f"The field {field!r} in {path} must hold text. Got {column.type} with {column.null_count} nulls instead."
        )
    row = 0
    for chunk in column.chunks:
        values: Iterator[Any]
        try:
            values = iter(chunk.to_pylist())
        except UnicodeDecodeError:  # a string column may hold invalid bytes, because Arrow trusts the writer
            values = (scalar.as_py() for scalar in chunk)  # one by one, six times more slowly, to find the faulty one
        for _ in range(len(chunk)):
            row += 1
            try:
                value = next(values)
                yield value.decode("utf-8") if isinstance(value, bytes) else value
            except UnicodeDecodeError as error:
                raise InputError(
                    f"The field {field!r} in {path} must hold text in UTF-8. Byte {error.start} of row {row} cannot be "
                    "decoded."
                ) from None


def _of_text(kind: pa.DataType) -> bool:
    """Whether an Arrow column type can hold text, directly or as dictionary codes."""
    import pyarrow as pa

    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    own = pa.types
    texts = (own.is_string, own.is_large_string, own.is_string_view)
    return any(is_kind(kind) for is_kind in (*texts, own.is_binary, own.is_large_binary, own.is_binary_view))
