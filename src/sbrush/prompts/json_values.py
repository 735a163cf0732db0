"""JSON files: one list, or values one after another (JSON Lines, or as jq writes them); of objects, or of strings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sbrush.console import SbrushError, printable
from sbrush.prompts.table import Table, is_kept, is_text, json_kind, quote

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FORMS = "a JSON file is a list, or one value a line; of strings, or of objects that hold a prompt, caption or text"


def read_json(text: str, source: str, column: str | None) -> Table | list[str]:
    """Objects as a table of their keys, strings as they are. SbrushError if it is no JSON, or holds anything else."""
    shown = printable(source)
    try:
        values = list(_values(text))
    except json.JSONDecodeError as problem:
        raise SbrushError(f"{shown} is no JSON: line {problem.lineno}: {problem.msg}", FORMS, code=2) from None
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits; lists within lists
        raise SbrushError(f"{shown} cannot be read as JSON ({type(problem).__name__})", FORMS, code=2) from None
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(values) == 1 and isinstance(values[0], dict) and "\n" in text.strip():
        keys = ", ".join(map(quote, list(values[0])[:5]))
        raise SbrushError(f"{shown} is one JSON object, of {keys}, and no list", FORMS, code=2)
    if all(isinstance(value, dict) for value in values):
        return _table(values, source, column)
    for row, value in enumerate(values, 1):
        if not is_text(value):
            what = "no valid text" if isinstance(value, str) else json_kind(value)
            raise SbrushError(f"value {row} of {shown} is {what}", FORMS, code=2)
    return values


def begins_like_json(text: str) -> bool:
    """Whether a text's first letters are those of a JSON list or object of our forms, and hardly of a prompt."""
    return re.match(r'\s*(\[\s*["{]|\{\s*")', text) is not None


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after another; ValueError or RecursionError if something in it is none."""
    decoder, place, end = json.JSONDecoder(), 0, len(text)
    space = re.compile(r"\s*")
    while (place := space.match(text, place).end()) < end:  # type: ignore[union-attr]
        value, place = decoder.raw_decode(text, place)
        yield value


def _table(rows: list[dict[str, Any]], source: str, column: str | None) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = {name: [row.get(name) for row in rows] for name in names if is_kept(name, column)}
    return Table(names, cells, source)
