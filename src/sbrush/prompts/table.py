"""A table, wherever it comes from: its columns' names, and the cells of those that may hold texts or images' names."""

from __future__ import annotations

import shlex
import unicodedata
from dataclasses import dataclass
from typing import Any

from sbrush.console import SbrushError, count, printable

TEXT_COLUMNS = ("prompt", "caption", "text")
FILE_COLUMNS = ("file_name", "filename", "file", "image")  # the first one that there is names the images
SHOWN = 20  # columns that an error names


@dataclass(frozen=True)
class Table:
    """Columns in their order, a name each, and by name the cells of those that are `kept`; None for an absent cell."""

    names: list[str]
    cells: dict[str, list[Any]]
    source: str
    headless: str = ""  # what to do if the names are none, but the first row

    def text_column(self, column: str | None, *, required: bool = True) -> str:
        """The column with the texts: `column`, else the one called prompt, caption or text, in any case.

        Not `required`, a `column` that is absent is passed over. SbrushError if there is none, or more than one.
        """
        shown, names = printable(self.source), self.names
        if column is not None:
            found = [name for name in names if name == column] or [n for n in names if fold(n) == fold(column)]
            if not found and required:
                raise SbrushError(
                    f"{shown} has no column {quote(column)}; it has {_listed(names)}",
                    f"--column {_example(names)}",
                    code=2,
                )
        else:
            found = []
        found = found or [name for name in names if fold(name) in TEXT_COLUMNS]
        if not found:
            raise SbrushError(
                f"{shown} has no column called prompt, caption or text; it has {_listed(names)}",
                f"name one: --column {_example(names)}{self.headless}",
                code=2,
            )
        if len(found) > 1:
            raise SbrushError(
                f"{shown} has {count(len(found), 'column')} that may be meant: {_listed(found)}",
                f"name one: --column {_example(found)}" if len(set(found)) > 1 else "give each a name of its own",
                code=2,
            )
        return found[0]

    def texts(self, column: str) -> list[str]:
        """A column's cells as text, "" for an absent one. SbrushError if one is no text."""
        for row, cell in enumerate(self.cells[column], 1):
            if cell is not None and not is_text(cell):
                what = "no valid text" if isinstance(cell, str) else f"{json_kind(cell)}, not text"
                raise SbrushError(
                    f"row {row} of {printable(self.source)}: its {quote(column)} is {what}",
                    "a prompt or caption is one string",
                    code=2,
                )
        return ["" if cell is None else cell for cell in self.cells[column]]

    def files(self, column: str) -> list[str] | None:
        """The images' names of a table that has them beside its texts in `column`; None if it has not."""
        for wanted in FILE_COLUMNS:
            if found := [name for name in self.names if fold(name) == wanted and name != column]:
                return self.texts(found[0])
        return None


def fold(name: str) -> str:
    """A column's name as names are compared."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def is_kept(name: str, column: str | None) -> bool:
    """Whether a column's cells may be wanted."""
    return fold(name) in (*TEXT_COLUMNS, *FILE_COLUMNS) or (column is not None and fold(name) == fold(column))


def is_text(cell: Any) -> bool:
    """Whether a cell is a string that can be written as UTF-8 and holds no NUL."""
    try:
        return isinstance(cell, str) and b"\0" not in cell.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def json_kind(value: Any) -> str:
    """What a JSON value that is no string is called."""
    kinds = {bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value), "a number")


def quote(name: str) -> str:
    """A column's name in a message."""
    return f"'{printable(name)}'"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(quote, names[:SHOWN])) or "none"
    return shown + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _example(names: list[str]) -> str:
    """One of the columns' names as an argument."""
    return next((shlex.quote(name) for name in names if name.isprintable() and len(name) < 40), "NAME")
