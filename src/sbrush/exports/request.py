"""What an export is to be, checked before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.models.source import local_student
from sbrush.storage.files import check_new

ERROR = 0.1  # of a LoRA that picks its own rank: what it may leave out of the layers that it changes


class Format(StrEnum):
    """Where a student goes."""

    single_file = "single-file"
    lora = "lora"
    onnx = "onnx"
    diffusers = "diffusers"
    hub = "hub"


class Numbers(StrEnum):
    """Number formats of exported weights."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(frozen=True)
class ExportRequest:
    """A student, the format that it is to have, and the folder or repository that it goes to.

    `numbers` None: float16, or for ONNX float32. `rank` and `error`: of a LoRA, the one or the other. `teacher`: of a
    LoRA, what it is for; None: the one that the student names.
    """

    student: str
    format: Format
    out: str
    numbers: Numbers | None = None
    rank: int | None = None
    error: float | None = None
    teacher: str | None = None
    teacher_config: str | None = None
    private: bool = False

    @property
    def folder(self) -> Path:
        """Where files are written."""
        return Path(self.out).expanduser()

    @property
    def stored(self) -> Numbers:
        """The number format of what is written."""
        return self.numbers or (Numbers.float32 if self.format is Format.onnx else Numbers.float16)

    def check(self) -> None:
        """SbrushError if it makes no sense, as far as can be seen without loading the student."""
        self._check_flags()
        self._check_student()
        if self.format is Format.hub:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.out):
                raise SbrushError(
                    f"{printable(self.out)} is no repository's name", "--to hub takes -o OWNER/NAME", code=2
                )
            return
        if self.out.lower().endswith(".safetensors"):
            stem = self.out[: -len(".safetensors")]
            raise SbrushError(
                f"-o names a folder, and {printable(self.out)} is the name of a file",
                f"-o {printable(stem)}; the weights' file gets the folder's name",
                code=2,
            )
        check_new(self.folder, empty=True)

    def _check_flags(self) -> None:
        """SbrushError if a flag is of another format than this."""
        lora = self.format is Format.lora
        given: dict[str, object] = {
            "--rank": self.rank, "--max-error": self.error, "--teacher": self.teacher,
            "--teacher-config": self.teacher_config,
        }  # fmt: skip
        if not lora and (flag := next((flag for flag, value in given.items() if value is not None), None)):
            raise SbrushError(f"{flag} is for --to lora", f"leave it out with --to {self.format}", code=2)
        if self.rank is not None and self.error is not None:
            raise SbrushError("--rank and --max-error are two ways to say one thing", "leave one of them out", code=2)
        if self.private and self.format is not Format.hub:
            raise SbrushError("--private is for --to hub", f"leave it out with --to {self.format}", code=2)
        if self.format is Format.onnx and self.stored is not Numbers.float32:
            raise SbrushError(f"--to onnx writes float32, not {self.stored}", "leave out --precision", code=2)

    def _check_student(self) -> None:
        """SbrushError if the student is itself an ONNX export."""
        local = local_student(self.student) if Path(self.student).expanduser().exists() else None
        if local and (local / "unet" / "model.onnx").is_file():
            raise SbrushError(
                f"{printable(self.student)} was exported to ONNX, which nothing can be exported from",
                "take the student that it was exported from",
                code=2,
            )
