"""`sbrush eval`: which images are measured, by which protocol, and the report.

Only `cli` and `benchmarks` import from here."""
