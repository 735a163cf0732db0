"""What `--vae` names: a VAE that decodes in place of a student's own. Imports nothing heavy: commands ask it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, printable
from sbrush.models.parts import DIFFUSERS, network_files, read_json, refuse_pointer, weights_files
from sbrush.models.source import local_network

TINY = "tiny"
TINY_FOLDER = "tiny_vae"  # of the package's weights
BUILT_IN_TINY = Path(__file__).parent.parent / "stickers" / "weights" / TINY_FOLDER
PUBLISHED = {"StableDiffusionPipeline": "madebyollin/taesd", "StableDiffusionXLPipeline": "madebyollin/taesdxl"}
"""TAESD of each family's latents (MIT licence), by the class of the family's pipeline."""
KINDS = {"AutoencoderTiny": "tiny VAE", "AutoencoderKL": "VAE"}  # diffusers' classes, and what they are called
HINT = "give tiny, a folder with diffusers' AutoencoderTiny or AutoencoderKL, or a Hub id such as madebyollin/taesd"


@dataclass(frozen=True)
class Decoder:
    """A VAE that decodes in place of a model's own. `sha256`: over its files, the first 16 digits.

    `network`: diffusers' AutoencoderTiny or AutoencoderKL; None where an ONNX graph decodes.
    """

    name: str
    sha256: str
    network: Any = None

    @property
    def about(self) -> dict[str, str]:
        """What an image's record and a report say of it."""
        return {"name": self.name, "sha256": self.sha256}


def local_vae(source: str) -> Path | None:
    """The folder of a VAE that is here; None for a Hub id and for "tiny", which is another for each family.

    SbrushError if the folder holds none. A folder of the name "tiny" is "./tiny".
    """
    if source == TINY:
        return None
    try:
        found = local_network(source, "VAE", HINT)
    except SbrushError as problem:
        if Path(source, "model_index.json").is_file() and Path(source, "vae", "config.json").is_file():
            shown = printable(source)
            raise SbrushError(f"{shown} is a whole model, not a VAE", f"its VAE is {shown}/vae", code=2) from problem
        raise
    if found:
        check_vae_folder(found)
    return found


def check_vae_folder(folder: Path, *, weights: bool = True) -> str:
    """Which of KINDS a folder holds; SbrushError if none of them, as far as can be seen without loading it."""
    shown = printable(folder)
    try:
        kind = read_json(folder / "config.json").get("_class_name")
    except (OSError, ValueError, RecursionError) as problem:
        raise SbrushError(f"cannot read {shown}/config.json: {printable(problem)}", HINT, code=2) from problem
    if kind not in KINDS:
        what = f"it is a {printable(kind)}" if isinstance(kind, str) else "its config.json names no class"
        raise SbrushError(f"{shown} is no VAE: {what}", HINT, code=2)
    if weights and not weights_files(folder, DIFFUSERS):
        raise SbrushError(
            f"{shown} has no {DIFFUSERS}.safetensors", "fetch it, or save the VAE as safetensors: nothing else is read",
            code=2,
        )  # fmt: skip
    for file in network_files(folder, DIFFUSERS, weights=weights):
        refuse_pointer(file)
    return kind
