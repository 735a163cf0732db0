"""One distillation method a file; the loop knows none of them by name."""

from sbrush.training.methods.dreambooth import DreamBooth
from sbrush.training.methods.guided import Guided
from sbrush.training.methods.lcm import LCM
from sbrush.training.methods.method import Machine, Method, Rehearsal, split_batch
from sbrush.training.methods.vsd import VSD

METHODS: dict[str, type[Method]] = {"vsd": VSD, "lcm": LCM, "guided": Guided, "dreambooth": DreamBooth}
"""A recipe's `method` -> what trains it."""

__all__ = ["LCM", "METHODS", "VSD", "DreamBooth", "Guided", "Machine", "Method", "Rehearsal", "split_batch"]
