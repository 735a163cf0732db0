"""Which seeds there are, and how they are written on the command line: 7, 1-8 or 1,5,9-12."""

from __future__ import annotations

import re

from sbrush.console import SbrushError, printable

MOST_SEEDS = 100_000
LARGEST_SEED = 10**18 - 1  # of an image or a run, wherever it is asked for


def parse_seeds(text: str) -> list[int]:
    """ "3", "1-8" or "1,5,9-12" as a list of seeds; SbrushError if it is none."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or len(seeds) + last - first >= MOST_SEEDS:
            raise SbrushError(
                f"not a range of seeds: {printable(text)}",
                f"write 7, 1-8 or 1,5,9-12: whole numbers from 0 on, at most {MOST_SEEDS} of them",
                code=2,
            )
        seeds.extend(range(first, last + 1))
    return seeds
