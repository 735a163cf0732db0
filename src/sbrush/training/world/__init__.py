"""Trains the built-in world from nothing and ships it into `sbrush/stickers/weights`."""
