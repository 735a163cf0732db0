"""A folder of images that another tool made, to be measured: sampling/image_folder.py's, with COCO's captions besides.

An image's caption is found by the first of these rules that applies; the report states which one it was:

    --captions with file names   a table with a column file_name (or filename, file, image) beside the captions
    --captions                   line i is the caption of the i-th image by the numbers in the names
    a table beside the images    captions.* or metadata.* as CSV, TSV or JSON, as Hugging Face's imagefolder has it
    captions.txt                 line i is the caption of the i-th image by the numbers in the names
    a text beside each image     0001.txt is the caption of 0001.png
    COCO's names                 COCO_val2014_000000391895.png, or its number: the caption of that image of COCO
    numbers                      sample_17.png has COCO's caption 17, counted from 0

image_folder.py says which number counts, and what is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from sbrush.console import SbrushError, printable
from sbrush.evaluate.coco.protocols import Coco
from sbrush.sampling.image_folder import ImageFolder
from sbrush.sampling.naming import ELSE, by_number, composed, numbers_of

COCOS = "COCO's own"  # captions


@dataclass(frozen=True)
class Gallery(ImageFolder):
    """The images of a folder; their captions, if none lie beside them, may be COCO's."""

    source: str = COCOS

    def with_coco(self, coco: Coco, *, captioned: bool) -> Gallery:
        """The same with COCO's captions, by file names or numbers.

        Not `captioned`, no score depends on a caption, and names that tell nothing are no error.
        """
        try:
            return self._of_coco(coco)
        except SbrushError:
            if captioned:
                raise
            return replace(self, captions=coco.captions, rule="file names; no score depends on the captions")

    def _of_coco(self, coco: Coco) -> Gallery:
        known = {composed(file.stem): place for place, file in enumerate(coco.files)}
        places = [known.get(composed(file.stem)) for file in self.files]
        found = [place for place in places if place is not None]
        if found and len(found) < len(places):
            odd = self.files[places.index(None)]
            raise SbrushError(
                f"{printable(odd.parent)} has names of COCO's images, and {printable(odd.name)}",
                f"move it elsewhere; or {ELSE}",
                code=2,
            )
        if found:
            return self._at(coco, found, "COCO's file names, in the annotation file's order")
        numbers = numbers_of(self.files)
        if numbers is None:
            raise SbrushError(
                f"nothing tells which caption {printable(self.files[0].name)} is of",
                f"number the images; or {ELSE}",
                code=2,
            )
        ids = {int(part): place for place, file in enumerate(coco.files) for part in re.findall(r"\d+", file.stem)[-1:]}
        if max(numbers, default=0) >= len(ids) and all(
            number in ids for number in numbers
        ):  # as no caption's number is
            return self._at(
                coco, [ids[number] for number in numbers], "COCO's image numbers, in the annotation file's order"
            )
        files = by_number(self.files, numbers)
        return replace(self, files=files, captions=coco.captions, rule="the numbers in the file names, from 0")

    def _at(self, coco: Coco, places: list[int], rule: str) -> Gallery:
        """The images of COCO's at `places`, one for each file, in COCO's order."""
        if twice := [place for place, times in Counter(places).items() if times > 1]:
            name = printable(coco.files[twice[0]].stem)
            raise SbrushError(f"two images are named for COCO's {name}", "move one of them elsewhere", code=2)
        ordered = sorted(zip(places, self.files, strict=True))
        first = [place for place, _ in ordered] == list(range(len(ordered)))
        return Gallery(
            [file for _, file in ordered],
            [coco.captions[place] for place, _ in ordered],
            COCOS if first else f"{COCOS}, of the images that the files are named for",
            rule,
        )
