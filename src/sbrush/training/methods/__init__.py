"""One distillation method a file; the loop knows none of them by name."""

from sbrush.training.methods.method import Machine, Method, Rehearsal, split_batch
from sbrush.training.methods.vsd import VSD

METHODS: dict[str, type[Method]] = {"vsd": VSD}
"""A recipe's `method` -> what trains it."""

__all__ = ["METHODS", "VSD", "Machine", "Method", "Rehearsal", "split_batch"]
