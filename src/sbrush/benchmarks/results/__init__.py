"""The table of all methods side by side on the built-in world. `make results` is the only way in, see __main__.py."""
