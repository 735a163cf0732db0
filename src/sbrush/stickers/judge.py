"""The judge: a small CLIP model that tells what a sticker's image shows. Trained apart from the teacher.

`Judge` is a small open_clip model: its image tower gives the features of FID, precision and recall; its two towers
together say which caption is true. `pixel_attributes` is a plain count of pixels, a check on it that knows no network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sbrush.console import SbrushError
from sbrush.device import send
from sbrush.stickers.draw import INK, WHITE
from sbrush.stickers.world import ATTRIBUTES, BACKGROUNDS, COLOURS, IMAGE_SIZE, Caption

WEIGHTS = Path(__file__).parent / "weights"

FOREGROUND = 40.0  # RGB distance from the background: less than white on cream (49), more than an autoencoder's noise


class Judge:
    """The judge's two towers and its tokenizer; made by `Judge.load`.

    `width` is the number of features of an image, `digest` the SHA-256 of the weights, in hexadecimal.
    """

    def __init__(self, net: Any, tokenizer: Any, config: dict[str, Any], digest: str) -> None:
        self._net = net.float().eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._context: int = config["model_cfg"]["text_cfg"]["context_length"]
        self._mean = torch.tensor(config["preprocess_cfg"]["mean"]).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(config["preprocess_cfg"]["std"]).view(1, 3, 1, 1) * 255
        self._device = next(net.parameters()).device
        self._scale = [numbers.to(self._device) for numbers in (self._mean, self._std)]
        self.width: int = config["model_cfg"]["embed_dim"]
        self.digest = digest

    @classmethod
    def load(
        cls, folder: Path | None = None, tokenizer_folder: Path | None = None, device: str | torch.device = "cpu"
    ) -> Judge:
        """The judge in `folder` (open_clip_config.json, open_clip_model.safetensors), by default the shipped one.

        `tokenizer_folder` holds its CLIPTokenizer, by default the shipped teacher's. Stored in float16, it computes in
        float32. Raises SbrushError if something is missing or damaged.
        """
        folder, tokenizer_folder = folder or WEIGHTS / "judge", tokenizer_folder or WEIGHTS / "teacher" / "tokenizer"
        config_file, weights_file = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
        for part in (config_file, weights_file, tokenizer_folder / "vocab.json", tokenizer_folder / "merges.txt"):
            if not part.is_file():
                raise SbrushError(f"the judge lacks {part}", "install sbrush again, or run `make teach`")
        import open_clip
        from transformers import CLIPTokenizer

        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            net = open_clip.CLIP(**config["model_cfg"])
            net.load_state_dict(load_file(weights_file))
            tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
            digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
            return cls(net.to(device), tokenizer, config, digest)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
            why = (str(problem).splitlines() or [type(problem).__name__])[0]
            hint = "install sbrush again, or run `make teach`"
            raise SbrushError(f"the judge in {folder} is damaged: {why}", hint) from problem

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The image tower's output before normalisation: uint8 [B, 3, 64, 64] to float32 [B, width], on the CPU.

        Raises ValueError for any other shape or dtype.
        """
        _check(images)
        x = ((images.float() - self._mean) / self._std).to(self._device)
        out: Tensor = self._net.encode_image(x)
        return out.float().cpu()

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Zero-shot: for each attribute, which of its values in ATTRIBUTES the image shows, as indices int64 [B].

        `features`: float32 [B, width], from `features`. A value is offered as the caption that names nothing else.
        """
        seen = F.normalize(features, dim=-1)
        return {name: (seen @ said.T).argmax(dim=1) for name, said in self._single.items()}

    def clip_score(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image with its caption, -1 to 1: float32 [B].

        `features`: float32 [B, width], from `features`; `captions`: B texts.
        """
        if len(captions) != len(features):
            raise ValueError(f"{len(features)} images cannot be scored against {len(captions)} captions")
        texts = list(dict.fromkeys(captions))
        said = torch.cat([self._said(texts[i : i + 256]) for i in range(0, len(texts), 256)]) if texts else features
        row = {text: i for i, text in enumerate(texts)}
        return (F.normalize(features, dim=-1) * said[[row[text] for text in captions]]).sum(dim=-1)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Of both: uint8 [B, 3, 64, 64] and B captions to float32 [B]."""
        return self.clip_score(self.features(images), captions)

    @property
    def network(self) -> torch.nn.Module:
        """Both towers."""
        return cast(torch.nn.Module, self._net)

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines through which images, float32 [B, 3, 64, 64] of 0 to 1, can be trained: float32 [B]."""
        mean, std = self._scale
        seen = self._net.encode_image((255 * images - mean) / std, normalize=True)
        with torch.no_grad():
            said = self._net.encode_text(send(self._tokens(list(captions)), self._device), normalize=True)
        return (seen.float() * said.float()).sum(dim=-1)

    @cached_property
    def _single(self) -> dict[str, Tensor]:
        """The captions that name one attribute alone, as unit vectors: [values, width] for each attribute."""
        return {
            name: self._said([Caption(**{name: value}).text for value in values]) for name, values in ATTRIBUTES.items()
        }

    @torch.inference_mode()
    def _said(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts, float32 [len(texts), width], on the CPU."""
        out: Tensor = self._net.encode_text(self._tokens(texts).to(self._device), normalize=True)
        return out.float().cpu()

    def _tokens(self, texts: list[str]) -> Tensor:
        return self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        ).input_ids


def foreground(images: Tensor) -> tuple[Tensor, Tensor]:
    """The background's colour, the median of the outermost pixels, and where an image differs from it.

    uint8 [B, 3, 64, 64] to float32 [B, 3] (0 to 255) and bool [B, 64, 64].
    """
    _check(images)
    x = images.float()
    edge = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, 1:-1, 0], x[:, :, 1:-1, -1]], dim=-1)  # [B, 3, 252]
    background = edge.median(dim=-1).values
    return background, (x - background[:, :, None, None]).norm(dim=1) > FOREGROUND


def pixel_attributes(images: Tensor) -> dict[str, Tensor]:
    """Colour and background by counting pixels: indices into ATTRIBUTES' values, int64 [B] each.

    The background is the nearest to the outermost pixels' median. The colour is that to which most pixels of the
    foreground are nearest, among the colours, their shades, ink and white. `images`: uint8 [B, 3, 64, 64].
    """
    border, inside = foreground(images)
    backgrounds, bodies = (torch.tensor(list(names.values())).float() for names in (BACKGROUNDS, COLOURS))
    ink, white = torch.tensor(INK).float(), torch.tensor(WHITE).float()
    shades = torch.cat([bodies.lerp(ink, 0.35), bodies.lerp(white, 0.55)])  # as the pen mixes them
    palette = torch.cat([bodies, shades, ink[None], white[None]])  # [32, 3]
    nearest = torch.cdist(images.float().permute(0, 2, 3, 1)[inside], palette).argmin(dim=1)
    row = inside.nonzero()[:, 0]  # of each foreground pixel, its image
    counts = torch.bincount(row * len(palette) + nearest, minlength=len(images) * len(palette))
    body = counts.view(len(images), -1)[:, : len(bodies)]
    return {"colour": body.argmax(dim=1), "background": torch.cdist(border, backgrounds).argmin(dim=1)}


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        shape = list(images.shape)
        raise ValueError(f"images must be uint8 [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], not {images.dtype} {shape}")


def main(
    renders: Annotated[
        int, typer.Option(help="Unseen renders to judge, rounded up to a multiple of 250.", min=1)
    ] = 10_000,
) -> None:
    """Print how often the shipped judge, and the check on pixels, are right on unseen renders."""
    from torchvision.transforms.functional import pil_to_tensor

    from sbrush.console import out
    from sbrush.stickers.draw import draw
    from sbrush.stickers.world import random_sticker, stream

    total, judge = -(-renders // 250) * 250, Judge.load()
    right = dict.fromkeys([*ATTRIBUTES, "colour by pixels", "background by pixels"], 0)
    for first in range(0, total, 250):
        stickers = [random_sticker(stream("judge-10k", i), held_out=True) for i in range(first, first + 250)]
        seen = torch.stack([pil_to_tensor(draw(sticker)) for sticker in stickers])
        judged = judge.classify(judge.features(seen))
        judged |= {f"{name} by pixels": values for name, values in pixel_attributes(seen).items()}
        for name, values in judged.items():
            attribute = name.split()[0]
            true = [ATTRIBUTES[attribute].index(getattr(sticker, attribute)) for sticker in stickers]
            right[name] += int((values == torch.tensor(true)).sum())
    for name, count in right.items():
        out(f"{name}: right on {count} of {total}")


if __name__ == "__main__":
    typer.run(main)
