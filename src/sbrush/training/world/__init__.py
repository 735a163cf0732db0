"""Trains the built-in world from nothing and ships it into `sbrush/stickers/weights`."""

from sbrush.console import quiet_libraries

quiet_libraries()
