"""Speed and memory, measured side by side in one run. Nothing in the package imports from here."""

from sbrush.console import quiet_libraries

quiet_libraries()
