"""Tables in text: CSV with a header, and its kin with semicolons, tabs or bars; quotes by Python's csv module.

A table of one column has no separator: a comma in its cells is a comma. In a TSV quotes mean nothing unless they
enclose a cell: those that are written without any quoting are read as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sbrush.console import SbrushError, count, printable
from sbrush.prompts.table import Table, fold, is_kept

CSV_SUFFIXES = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|"}  # and the separators that they may have, best first
NONE = "\x1f"  # ASCII's own separator, which no text holds: for a table of one column


@dataclass(frozen=True)
class Header:
    """A table's first row, and what separates its cells."""

    names: list[str]
    separator: str

    def has(self, *columns: str) -> bool:
        """Whether one of these is a column, in any case."""
        return any(fold(name) in map(fold, columns) for name in self.names)


def read_header(text: str, separators: str, columns: tuple[str, ...]) -> Header | None:
    """The first row of a table; None if it is none.

    Its separator is the one by which it has one of `columns`, else most cells. Excel's first line "sep=;" says so.
    """
    if told := re.match(r"sep=([,;\t|])\r?\n", text):
        separators = told[1]
    found = []
    for separator in (*separators, NONE):
        try:
            names = [name.strip() for name in next(_rows(text, separator))[1]]
        except (csv.Error, StopIteration):
            continue
        found.append(Header(names, separator))
    if not found:
        return None
    several = [header for header in found if len(header.names) > 1]
    return max(several or found[-1:], key=lambda header: (header.has(*columns), len(header.names)))


def read_delimited(text: str, header: Header, source: str, column: str | None, *, exact: bool = False) -> Table:
    """The rows below a header. SbrushError if one has more cells than the header, or a quote stays open.

    Empty cells at a row's end may be absent, as spreadsheets leave them out; not if `exact`.
    """
    width, shown = len(header.names), printable(source)
    kept = {name: header.names.index(name) for name in header.names if is_kept(name, column)}
    cells: dict[str, list[str | None]] = {name: [] for name in kept}
    line, blank = 1, 0
    try:
        rows = _unquoted_rows(text, width) if header.separator == "\t" and width > 1 else None
        rows = rows or _rows(text, header.separator)
        next(rows)
        for line, row in rows:
            if any(cell.strip() for cell in row[width:]) or (exact and row and len(row) != width):
                raise SbrushError(
                    f"line {line} of {shown} has {count(len(row), 'cell')}, the header {width}",
                    'enclose cells that hold the separator in quotes: "a cat, sleeping"',
                    code=2,
                )
            if not row:  # an empty line is an empty row, but at the end
                blank += 1
                continue
            for name, place in kept.items():
                cells[name] += [None] * blank + [row[place] if place < len(row) else None]
            blank = 0
    except csv.Error as problem:
        raise SbrushError(
            f"{shown} is no table: line {line + 1} or one below it: {problem}",
            'each quote needs its partner, and a quote within quotes is doubled: "the ""red"" cat"',
            code=2,
        ) from None
    return Table(header.names, cells, source, "; a list without a header, one text a line, is a .txt file")


def split_lines(text: str) -> list[str]:
    """A text's lines, however they end: LF, CR LF, CR CR LF or CR. Unicode's other line separators end none."""
    return re.split(r"\r*\n|\r", text) if "\r" in text else text.split("\n")


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Each row with the number of the line that it ends on; csv.Error as csv raises it."""
    csv.field_size_limit(2**31 - 1)  # a cell of another column may be long; prompts are measured later
    skipped = re.match(r"sep=[,;\t|]\r?\n", text)
    stream = io.StringIO(text[skipped.end() :] if skipped else text, newline="")
    reader = csv.reader(stream, delimiter=separator, strict=True)
    for row in reader:
        yield reader.line_num + bool(skipped), row


def _unquoted_rows(text: str, width: int) -> Iterator[tuple[int, list[str]]] | None:
    """The rows of a text each of whose lines has `width` cells between tabs; None if one has not."""
    lines = split_lines(text)
    if any(line and line.count("\t") != width - 1 for line in lines):
        return None
    return (
        (n, [_without_quotes(cell) for cell in line.split("\t")] if line else []) for n, line in enumerate(lines, 1)
    )


def _without_quotes(cell: str) -> str:
    """A cell that is enclosed in quotes, with those within doubled, without them; any other as it is."""
    inner = cell[1:-1]
    enclosed = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if enclosed else cell
