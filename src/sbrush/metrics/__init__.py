"""One metric per file: features or images in, numbers out. Training's validation and `evaluate` import from here."""
