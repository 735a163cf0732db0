"""`sbrush serve`: a student in memory, the page, and the APIs of other programs.

Only `cli` and `benchmarks` import from here."""
