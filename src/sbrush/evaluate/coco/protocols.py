"""COCO-30K under a named protocol: which captions, which real images, and what both sides go through.

    captions    `images` order of captions_val2014.json; of each image its first annotation in file order
    reference   every image of val2014 that the file names (40,504), not 30,000 of them
    both sides  centre square by the shorter edge, Pillow's Lanczos to 256, uint8; RGB, no turning by EXIF;
                other modes as sampling/open_image.py reads them, transparency over white
    features    Inception pool3, after the protocol's resizing to 299; CLIP score on the same 256 pixels

COCO's own layout is read as it is: ROOT/annotations/captions_val2014.json and ROOT/val2014/*.jpg. Nothing heavy is
imported here, so that a request that cannot work is refused at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sbrush.console import SbrushError, printable
from sbrush.evaluate.coco.download import SOURCE
from sbrush.metrics.conventions import CLIP_PREFIX, NEIGHBOURS, Resize

SIDE = 256

Crop = Literal["half to even", "floor"]
"""Where the centre square begins if the margin is odd: half a pixel is rounded to even, as torchvision's center_crop
does, or down."""

Cast = Literal["round", "truncate"]
"""How a model's pixels become whole numbers."""


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two figures to be comparable."""

    name: str
    compares_with: str  # whose published figures, and what is not known of them
    captions: str | None  # None: the list is in a file of its own
    resize: Resize  # from 256 to Inception's 299
    crop: Crop = "half to even"
    cast: Cast = "round"

    images: int = 30_000
    prefix: str = CLIP_PREFIX
    both_sides: str = (
        f"8-bit RGB over white, not turned by EXIF; centre square by the shorter edge, Lanczos to {SIDE}, uint8"
    )
    reference: str = "all of val2014 that the annotation file names"
    inception: str = "pool3 of the network of 2015-12-05"
    neighbours: int = NEIGHBOURS  # of precision and recall
    precision_and_recall: str = "on the same pool3 features as FID, of RGB images, all real and all generated ones"

    def feature_key(self) -> list[object]:
        """All of the protocol that an image file's Inception features depend on."""
        return [3, SIDE, self.crop, self.resize]  # 3: images of any mode that open_image knows


FIRST = "the first annotation of each of the first images"
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "swiftbrush",
            "SwiftBrush's and SwiftBrush v2's, measured as v2's code does. Which captions gave SwiftBrush's own 16.67 "
            "is not known. v2's own list differs from the first annotations here and there: give it by --captions",
            FIRST,
            "clean",
        ),
        Protocol("gigagan", "GigaGAN's and SiD-LSG's, with GigaGAN's list of 30,000 captions", None, "clean"),
        Protocol(
            "dmd2",
            "DMD2's: GigaGAN's list of 30,000 captions, and pixels cut to whole numbers, not rounded",
            None,
            "clean",
            cast="truncate",
        ),
        Protocol(
            "torchmetrics", "FID by torchmetrics as it has been since 1.8; no paper's", FIRST, "antialias", crop="floor"
        ),
        Protocol(
            "torch-fidelity",
            "FID by torch-fidelity, which resizes as the first FID code did; no paper's",
            FIRST,
            "tensorflow",
            crop="floor",
        ),
    )
}


@dataclass(frozen=True)
class Coco:
    """COCO's validation set: a caption and a file for each image, in the annotation file's order."""

    captions: list[str]
    files: list[Path]

    @staticmethod
    def check(root: Path) -> tuple[Path, Path]:
        """The annotation file and the folder of images; SbrushError if one of them is missing."""
        parts = root / "annotations" / "captions_val2014.json", root / "val2014"
        for part in parts:
            if not part.exists():
                raise SbrushError(
                    f"COCO is not there: no {printable(part)}",
                    f"--download fetches it; or unpack into --coco-root {SOURCE}",
                    code=2,
                )
        return parts

    @classmethod
    def read(cls, root: Path) -> Coco:
        """The set in COCO's own layout. SbrushError if something of it is missing or damaged."""
        annotations, folder = cls.check(root)
        try:
            content = json.loads(annotations.read_text(encoding="utf-8"))
            first: dict[int, str] = {}
            for annotation in content["annotations"]:
                first.setdefault(annotation["image_id"], str(annotation["caption"]).strip())
            images = [image for image in content["images"] if image["id"] in first]
            names = [str(image["file_name"]) for image in images]
            captions = [first[image["id"]] for image in images]
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as problem:
            raise SbrushError(
                f"{printable(annotations)} is damaged ({type(problem).__name__})",
                f"remove it and fetch it again: --download, or {SOURCE}",
            ) from problem
        if strange := next((name for name in names if Path(name).name != name), None):
            raise SbrushError(f"{printable(annotations)} names {printable(strange)}", "it must name files of val2014/")
        return cls(captions, [folder / name for name in names])
