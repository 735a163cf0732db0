"""Where the texts stand in a source: a line each, a column of a table, or the strings or objects of a JSON file.

    .csv .tsv .tab         a table with a header; cells split by commas, semicolons, tabs or bars, as the header is
    .jsonl .ndjson .json   JSON values one after another, or one list of them: objects, or strings
    any other, and pipes   what the content is beyond doubt: JSON objects, a JSON list of strings, a table whose header
                           names a text column and whose every row fits it; else plain text, one a line

A table's texts are in the column (an object's key) that is called prompt, caption or text, in any case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sbrush.console import SbrushError, count, printable
from sbrush.prompts.delimited import CSV_SUFFIXES, NONE, read_delimited, read_header, split_lines
from sbrush.prompts.encoding import to_text
from sbrush.prompts.json_values import JSON_SUFFIXES, begins_like_json, read_json
from sbrush.prompts.source import Source
from sbrush.prompts.table import TEXT_COLUMNS, Table, quote

NAMED = 5  # ignored columns that are named


@dataclass(frozen=True)
class Texts:
    """The texts of a source in its order, as they stand there, and where in it they were found."""

    texts: list[str]
    source: str
    stem: str  # the source's name, for a folder of its own
    found: str = ""  # "column 'caption'; 3 other columns ignored"; "" for plain text
    unit: str = "line"  # what holds a text
    files: list[str] | None = None  # the images' names, of a table with such a column
    ignored: int = 0  # columns of a table beside the texts

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def find_texts(source: Source, column: str | None = None, *, required: bool = True) -> Texts:
    """The texts of a source; `column`: see Table.text_column. SbrushError if there is no telling where they are."""
    text, name = to_text(source), source.name
    if source.suffix in JSON_SUFFIXES:
        return _of_json(read_json(text, name, column), source, column, required=required)
    if separators := CSV_SUFFIXES.get(source.suffix):
        header = read_header(text, separators, (column,) if column else TEXT_COLUMNS)
        if header is None:
            if not text.strip():
                raise SbrushError(f"{printable(name)} holds no {source.what}", source.form, code=2)
            raise SbrushError(
                f"{printable(name)} is no table: its first line has a quote without a partner",
                "a table begins with its columns' names; a list without them, one text a line, is a .txt file",
                code=2,
            )
        return _of_table(read_delimited(text, header, name, column), source, column, required=required)
    plain = Texts(split_lines(text), name, source.stem)
    if begins_like_json(text):
        try:
            values = read_json(text, name, column)
        except SbrushError as problem:
            if column and required:
                raise
            return replace(plain, found=f"as plain text: it begins like JSON, but {problem}")
        return _of_json(values, source, column, required=required)
    first = re.match(r"(sep=.\r?\n)?[^\r\n]*", text)  # not all of a text that begins with a quote
    header = read_header(first[0] if first else "", ",;\t|", (column,) if column else TEXT_COLUMNS)
    if header is None or not _is_header(header.names, header.has(*TEXT_COLUMNS, *([column] if column else []))):
        if column and required:
            raise SbrushError(
                f"{printable(name)} has no column {quote(column)}: it is plain text, one {source.what} a line",
                "leave --column out; a table has its columns' names in its first line",
                code=2,
            )
        return plain
    if header.separator == NONE and not column:
        return replace(plain, found=f"as plain text, its first line {quote(header.names[0])} a {source.what} too")
    try:
        table = read_delimited(text, header, name, column, exact=True)
    except SbrushError as problem:
        if column and required:
            raise
        return replace(plain, found=f"as plain text: its first line is like a table's, but {problem}")
    if not any(table.cells.values()):
        return plain
    return _of_table(table, source, column, required=required)


def _is_header(names: list[str], has_texts: bool) -> bool:
    """Whether a line of a file that need be no table can only be a header."""
    short = all(re.fullmatch(r"[\w .()/#:-]{1,64}", name) for name in names)
    return has_texts and short and len(set(names)) == len(names)


def _of_table(table: Table, source: Source, column: str | None, *, required: bool) -> Texts:
    chosen = table.text_column(column, required=required)
    texts, files = table.texts(chosen), table.files(chosen)
    if not any(text.strip() for text in texts):
        raise SbrushError(f"column {quote(chosen)} of {printable(source.name)} is empty", source.form, code=2)
    others = [name for name in table.names if name != chosen]
    found = f"column {quote(chosen)}"
    if others:
        named = f" ({', '.join(map(printable, others))})" if len(others) <= NAMED else ""
        found += f"; {count(len(others), 'other column')} ignored{named}"
    return Texts(texts, source.name, source.stem, found, "row", files, len(others))


def _of_json(values: Table | list[str], source: Source, column: str | None, *, required: bool) -> Texts:
    if isinstance(values, Table):
        if not values.names:
            raise SbrushError(f"{printable(source.name)} holds no {source.what}", source.form, code=2)
        return _of_table(values, source, column, required=required)
    if column and required:
        raise SbrushError(
            f"{printable(source.name)} has no column {quote(column)}: it holds strings", "leave --column out", code=2
        )
    return Texts(values, source.name, source.stem, "strings of a JSON file", "value")
