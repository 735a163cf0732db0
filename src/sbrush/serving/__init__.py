"""A warm student for other programs: the engine, `sbrush serve` and what it answers.

Only `cli` and `benchmarks` import from here."""
