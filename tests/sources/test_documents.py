"""Documents of texts: every format of files, what is normalised, and sentences for what holds no text."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from layerwise.runtime.errors import InputError
from layerwise.sources.documents import documents, read_text, text_hash

DOCUMENTS = ["The first.", "", "Line one.\nLine two: ä\u2028ö."]
ROWS = [{"id": number, "text": document} for number, document in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
MARK = "\ufeff"


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path, name):
    assert documents({"path": write(tmp_path / name, LINES)}) == DOCUMENTS
    assert documents({"path": write(tmp_path / name, LINES.replace("\n", "\n\n"))}) == DOCUMENTS


def test_json_list(tmp_path):
    assert documents({"path": write(tmp_path / "a.json", json.dumps(ROWS))}) == DOCUMENTS


def test_parquet_and_field(tmp_path):
    parquet.write_table(pa.table({"id": [0, 1, 2], "body": DOCUMENTS}), tmp_path / "a.parquet")
    assert documents({"path": str(tmp_path / "a.parquet"), "field": "body"}) == DOCUMENTS
    with pytest.raises(InputError, match=r"a.parquet must have the field 'text'. Got 'id', 'body' instead"):
        documents({"path": str(tmp_path / "a.parquet")})
    with pytest.raises(InputError, match="'id' in .* must hold text. Got int64"):
        documents({"path": str(tmp_path / "a.parquet"), "field": "id"})


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.raw"])
def test_plain_text(tmp_path, name):
    path = write(tmp_path / name, "one\n\n\n\n\ntwo\n\n\n\n")
    assert documents({"path": path}) == ["one\n\n\n\n\ntwo\n\n\n\n"]
    assert documents({"path": path, "separator": "\n\n\n\n"}) == ["one", "\ntwo"]


UNREADABLE = {
    "absent.txt": (None, "cannot be read: .*No such file"),
    "latin.txt": ("ä".encode("latin-1"), "is not text in UTF-8: byte 0"),
    "line.jsonl": ('{"text": "a"}\n{"text": \n', "Line 2 of .*line.jsonl is not JSON"),
    "list.json": ("[1, ", "list.json is not a JSON list"),
    "field.jsonl": (
        '{"body": "a", "id": 1}',
        "must have the field 'text' in each document. Got 'body', 'id' in number 1 instead",
    ),
    "number.jsonl": ('{"text": "a"}\n{"text": 3}', "must hold text. Got 3 in document 2 instead"),
    "string.jsonl": ('"a"', "Got no fields in number 1 instead"),
    "a.csv": ("text", r"must end in one of .*\.txt.*Got .*a.csv instead"),
    "deep.json": ("[" * 100_000, "deep.json is not a JSON list"),
    "bad.parquet": (b"PAR1", "bad.parquet cannot be read"),
    "nul.txt": ("one\0two", "nul.txt must hold text. Got a NUL at character 3 instead: is it UTF-16 without"),
    "wide.txt": ("one".encode("utf-16-le"), "wide.txt must hold text. Got a NUL at character 1"),
    "odd.txt": (codecs.BOM_UTF16_LE + b"a", "odd.txt is not text in UTF-16: byte 2 cannot be decoded"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(tmp_path, name):
    content, sentence = UNREADABLE[name]
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=sentence):
        documents({"path": str(path)})


@pytest.mark.parametrize("spoil", [lambda data: data[:-12], lambda data: b"plain" + data])
def test_broken_gzip(tmp_path, spoil):
    (tmp_path / "a.jsonl.gz").write_bytes(spoil(gzip.compress(LINES.encode())))
    with pytest.raises(InputError, match="a.jsonl.gz cannot be read"):
        documents({"path": str(tmp_path / "a.jsonl.gz")})


# -------------------------------------------------------------------------------------------- Arrow's types of strings

TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of binary": pa.dictionary(pa.int32(), pa.binary()),
}


def column_of(kind: pa.DataType, values: list[Any]) -> pa.ChunkedArray:
    """A column of two chunks."""
    inner = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    array = pa.array([value.encode() if value and "binary" in str(inner) else value for value in values], inner)
    array = array.dictionary_encode() if isinstance(kind, pa.DictionaryType) else array
    assert array.type == kind
    return pa.chunked_array([array[:1], array[1:]])


@pytest.mark.parametrize("name", TYPES)
def test_arrow_s_types_of_strings(tmp_path, name):
    parquet.write_table(pa.table({"text": column_of(TYPES[name], DOCUMENTS)}), tmp_path / "a.parquet")
    stored = parquet.read_table(tmp_path / "a.parquet")["text"].type
    assert stored == TYPES[name], "the file must come back as the type that is to be read"
    assert documents({"path": str(tmp_path / "a.parquet")}) == DOCUMENTS


@pytest.mark.parametrize("name", TYPES)
def test_nulls_are_no_text(tmp_path, name):
    parquet.write_table(pa.table({"text": column_of(TYPES[name], ["a", None])}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="'text' in .*a.parquet must hold text. Got .* with 1 nulls instead"):
        documents({"path": str(tmp_path / "a.parquet")})


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.binary(2), pa.bool_()])
def test_other_types_are_no_text(tmp_path, kind):
    column = pa.array([None, None], kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="must hold text. Got "):
        documents({"path": str(tmp_path / "a.parquet")})


@pytest.mark.parametrize("claimed", [pa.binary(), pa.string()])
def test_bytes_that_are_not_utf8_are_reported_with_their_row(tmp_path, claimed):
    """Arrow takes a column of strings for what its writer says it is."""
    column = pa.array([b"fine", b"ab\xff"], pa.binary()).view(claimed)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    sentence = "'text' in .*a.parquet must hold text in UTF-8. Byte 2 of row 2 cannot be decoded"
    with pytest.raises(InputError, match=sentence):
        documents({"path": str(tmp_path / "a.parquet")})


# -------------------------------------------------------------------------------------------------------- normalisation

PLAIN = "First line.\nSecond: ä.\n\nThird.\n"


def as_json(text: str) -> str:
    return json.dumps({"text": text})


WRITTEN = {  # file -> (bytes that hold PLAIN, what is done to it)
    "plain.txt": (PLAIN.encode(), ""),
    "mark.txt": ((MARK + PLAIN).encode(), "byte order mark"),
    "marks.raw": ((MARK + MARK + PLAIN).encode(), "byte order mark"),
    "windows.txt": ((MARK + PLAIN.replace("\n", "\r\n")).encode(), "byte order mark, line ends"),
    "old mac.txt": (PLAIN.replace("\n", "\r").encode(), "line ends"),
    "mixed.txt": (PLAIN.replace("\n", "\r\n", 1).encode(), "line ends"),
    "little.txt": (codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le"), "UTF-16"),
    "big.txt": (codecs.BOM_UTF16_BE + PLAIN.replace("\n", "\r\n").encode("utf-16-be"), "UTF-16, line ends"),
    "wider.txt": (codecs.BOM_UTF32_LE + PLAIN.encode("utf-32-le"), "UTF-32"),
    "joined.txt": ((MARK + PLAIN[:12] + MARK + PLAIN[12:]).encode(), "byte order mark"),
    # Marks and line ends of a JSON file are not those of its text.
    "lines.jsonl": (
        (MARK + as_json(PLAIN) + "\r\n").encode(),
        "",
    ),
    "lines.jsonl.gz": ((as_json(PLAIN) + "\r").encode(), ""),
    "list.json": ((MARK + "[\r\n" + as_json(PLAIN) + "\r\n]").encode(), ""),
    "strings.json": (as_json(MARK + PLAIN.replace("\n", "\r\n")).encode(), "byte order mark, line ends"),
    "wide.jsonl": (codecs.BOM_UTF16_LE + as_json(PLAIN.replace("\n", "\r")).encode("utf-16-le"), "UTF-16, line ends"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_text_is_the_same_whatever_wrote_it(tmp_path, name):
    content, done = WRITTEN[name]
    read = read_text({"path": write(tmp_path / name, content)})
    assert read.documents == [PLAIN] and read.normalised == done
    assert text_hash(read.documents, "\n\n") == text_hash([PLAIN], "\n\n")


def test_carriage_returns_that_a_text_is_about_stay(tmp_path):
    """As in a docstring on csv's line terminator, whose other line ends are this system's."""
    lines = "".join(f"line {number}\n" for number in range(300))
    about = f'{lines}\n\nincluding the "\r\n" of a row, and \rightarrow.\n{lines}'
    read = read_text({"path": write(tmp_path / "a.txt", about.encode()), "separator": "\n\n\n"})
    assert read.normalised == "" and "\n\n\n".join(read.documents) == about
    assert len(read.documents) == 2
    windows = about.replace("\r", "").replace("\n", "\r\n")
    read = read_text({"path": write(tmp_path / "b.txt", windows.encode()), "separator": "\n\n\n"})
    assert read.normalised == "line ends" and len(read.documents) == 2


@pytest.mark.parametrize("name", ["string", "dictionary", "binary"])
def test_rows_of_parquet_are_normalised(tmp_path, name):
    rows = [PLAIN, MARK + PLAIN, PLAIN.replace("\n", "\r\n")]
    parquet.write_table(pa.table({"text": column_of(TYPES[name], rows)}), tmp_path / "a.parquet")
    read = read_text({"path": str(tmp_path / "a.parquet")})
    assert read.documents == [PLAIN] * 3 and read.normalised == "byte order mark, line ends"


def test_every_line_of_joined_files_may_have_a_mark(tmp_path):
    lines = MARK + as_json("one") + "\r\n" + MARK + as_json("two") + "\r\n"
    assert documents({"path": write(tmp_path / "a.jsonl", lines)}) == ["one", "two"]
    path = write(tmp_path / "a.txt", f"{MARK}one|{MARK}two")
    read = read_text({"path": path, "separator": "|"})
    assert read.documents == ["one", "two"] and read.normalised == "byte order mark"


def test_characters_that_are_no_mark_stay(tmp_path):
    """Within a line U+FEFF is a space without width, and other characters that end lines are the text's own."""
    text = f"word{MARK}word\x0b\x0c\x85\u2028\u2029\u200b"
    assert read_text({"path": write(tmp_path / "a.txt", text)}).documents == [text]
    escaped = write(tmp_path / "a.jsonl", '{"text": "a\\u0000b"}')  # a string may hold a NUL, which tokenizers take
    assert documents({"path": escaped}) == ["a\0b"]


@pytest.mark.parametrize("place", ["\\ud800", "ab\\udfff.", "\\ude00\\ud83d"])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_half_a_character_is_reported_with_its_document(tmp_path, place, form):
    rows = ['{"text": "fine \\ud83d\\ude00"}', f'{{"text": "{place}"}}']
    content = "\n".join(rows) if form == "lines" else f"[{','.join(rows)}]"
    path = write(tmp_path / "a.json", content)
    at = 2 if place.startswith("ab") else 0
    sentence = (
        r"'text' in .*a.json must hold whole characters. Got half of one, the lone surrogate \\u.*, "
        f"as character {at} of document 2 instead"
    )
    with pytest.raises(InputError, match=sentence):
        documents({"path": path})
    assert documents({"path": write(tmp_path / "b.jsonl", rows[0])}) == ["fine 😀"]


# ----------------------------------------------------------------------------------------------------------- separators


def test_documents_of_a_windows_text_are_separated(tmp_path):
    """The text of a Windows editor, with the separator of the config: as many documents as the plain text has."""
    pages = [f"Page {number}.\nIts end." for number in range(200)]
    path = write(tmp_path / "a.txt", (MARK + "\n\n".join(pages)).replace("\n", "\r\n"))
    for separator in ("\n\n", "\r\n\r\n"):  # the text's own, as it was written
        read = read_text({"path": path, "separator": separator})
        assert read.documents == pages and read.normalised == "byte order mark, line ends"
    assert documents({"path": path, "separator": "\n\n", "begins": "Page 7.\r\n"}) == [pages[7]]


@pytest.mark.parametrize("separator", ["\n\n\n\n", "---", "<|endoftext|>"])
def test_a_separator_that_never_occurs_is_reported(tmp_path, separator):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n--\nthree")
    with pytest.raises(InputError, match="The separator .* of .*a.txt must occur in a .txt or .raw of the text, but"):
        documents({"path": path, "separator": separator})
    with pytest.raises(InputError, match="must occur in a .txt"):
        documents({"path": write(tmp_path / "a.jsonl", as_json(f"one{separator}two")), "separator": separator})


def test_files_without_the_separator_are_reported(tmp_path, monkeypatch, capsys):
    contents = {"a.txt": "one--two", "b.txt": "three", "blank.txt": " \n", "c.jsonl": as_json("a document")}
    files = [Path(write(tmp_path / name, content)) for name, content in contents.items()]
    monkeypatch.setattr("layerwise.sources.documents.fetch_text", lambda spec: files)
    assert documents({"hub": "organisation/name", "separator": "--"}) == ["one", "two", "three", "a document"]
    said = "warning: The separator '--' of organisation/name does not occur in b.txt, which is read as one document per"
    assert capsys.readouterr().err == f"{said} file.\n"
    files.remove(tmp_path / "b.txt")
    documents({"hub": "organisation/name", "separator": "--"})
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="of organisation/name must occur"):
        documents({"hub": "organisation/name", "separator": "=="})
