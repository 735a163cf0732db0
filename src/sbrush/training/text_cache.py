"""Text embeddings on disk, so that a run needs no text encoder beside the networks that it trains.

In half precision, every position: those after a prompt's end carry values of their own, which the UNet reads. A
prompt of SD 2.1 takes 154 KiB, so 1.4 million take 206 GiB; rows are read as a step needs them. What is saved is the
encoder's memory and a hundredth of a step's FLOPs: by default prompts are encoded as they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sbrush.console import SbrushError, count, info, printable
from sbrush.core import Conditioning
from sbrush.device import send
from sbrush.models.model import Model
from sbrush.models.parts import digest_of_parts
from sbrush.prompts import Prompts
from sbrush.storage.files import check_room, size_text
from sbrush.storage.shards import Shards

BATCH = 50  # divides shards.BLOCK


class TextCache:
    """The conditioning of each prompt of a list, in a folder of its own within `folder`."""

    def __init__(self, folder: Path, teacher: Model, prompts: Prompts) -> None:
        self._folder, self._teacher, self._prompts = folder, teacher, prompts

    @cached_property
    def shards(self) -> Shards:
        """The rows, under a key of all that they depend on."""
        teacher, prompts = self._teacher, self._prompts
        encoders = [part for part in teacher.parts if part.startswith(("text_encoder", "tokenizer"))]
        digest = digest_of_parts({part: teacher.folders[part] for part in encoders})
        key = f"{digest} {prompts.sha256} {teacher.text_encoder.dtype}"
        folder = self._folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        return Shards(folder, len(prompts), elsewhere="--text-cache", unit="prompts")

    def fill(self, accelerator: Accelerator) -> None:
        """Encodes what is missing, split among all processes; logs its size and checks that there is room for it.

        SbrushError if there is none, or if a value is too large for half precision.
        """
        if accelerator.is_main_process and (missing := self.shards.missing):
            size = missing * row_bytes(self._teacher.encode([""]))
            self.shards.folder.mkdir(parents=True, exist_ok=True)
            info(f"text embeddings of {count(missing, 'prompt')}: {size_text(size)} in {printable(self.shards.folder)}")
            hint = "leave out --text-cache: prompts are then encoded at every step"
            check_room(self.shards.folder, size, "the text embeddings", hint)
        accelerator.wait_for_everyone()
        here = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        self.shards.fill("encoding prompts", self._encoded, **here)
        accelerator.wait_for_everyone()

    def conditioning(self, places: Sequence[int]) -> Conditioning:
        """What Model.encode gives for the prompts at these places of the list, rounded to half precision."""
        dtype, device = self._teacher.text_encoder.dtype, self._teacher.device
        return {name: send(rows.to(dtype), device) for name, rows in self.shards.take(places).items()}

    def _encoded(self, blocks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
        for block in blocks:
            for first in range(block.start, block.stop, BATCH):
                conditioning = self._teacher.encode(self._prompts.texts[first : min(first + BATCH, block.stop)])
                rows = {name: value.half().cpu() for name, value in conditioning.items()}
                if not all(value.isfinite().all() for value in rows.values()):
                    raise SbrushError(
                        "the text encoder's values are too large for half precision",
                        "leave out --text-cache: prompts are then encoded at every step",
                    )
                yield rows


def row_bytes(conditioning: Conditioning) -> int:
    """What one prompt takes on disk; `conditioning`: of a batch of one."""
    return sum(2 * torch.Size(value.shape).numel() for value in conditioning.values())
