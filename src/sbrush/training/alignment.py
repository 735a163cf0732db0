"""How well images match their prompts, for the clamped CLIP loss (SwiftBrush v2, arXiv 2408.14176).

Latents are decoded by a VAE and scored by an open_clip model, both frozen; gradients pass through both. At Stable
Diffusion's size the teacher's own decoder costs three UNet forwards an image, and its backward as much; a tiny VAE of
the same latents (diffusers' AutoencoderTiny, such as TAESD) a twentieth of that, which is why SwiftBrush v2 has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from diffusers import AutoencoderTiny
from torch import Tensor, nn

from sbrush.console import SbrushError, info, printable
from sbrush.device import launched
from sbrush.metrics.clip import ClipScorer
from sbrush.models.latents import for_decoder
from sbrush.models.load_vae import Vae, read_vae
from sbrush.models.model import Model
from sbrush.models.parts import DIFFUSERS, digest_of, network_files
from sbrush.stickers.judge import Judge
from sbrush.training.request import AlignmentRequest


class Scorer(Protocol):
    """A CLIP model that images can be trained through: ClipScorer, or the built-in world's judge."""

    @property
    def network(self) -> nn.Module: ...

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines: float32 [B, 3, H, W] of 0 to 1 and B captions to float32 [B]."""


class Alignment:
    """A decoder and a CLIP model; `name` holds their names and digests, for a run's configuration."""

    def __init__(self, clip: Scorer, vae: Vae, name: str) -> None:
        self._clip, self._vae, self.name = clip, vae, name

    @classmethod
    def load(cls, teacher: Model, request: AlignmentRequest, *, device: str) -> Alignment:
        """For `clip_weights` and `clip_model` see ClipScorer.load; `tiny_vae` is a folder in diffusers' format.

        Without `clip_weights` the built-in teacher takes the built-in judge, which also measures its students.

        SbrushError if one of them is missing, damaged, or made for other latents than the teacher's.
        """
        clip_weights, clip_model, tiny_vae = request.clip_weights, request.clip_model, request.tiny_vae
        clip: Scorer
        if judge := _judge(teacher, request, device):
            clip, name = judge, f"built-in judge {judge.digest[:16]}"
            if launched()[0] == 0:
                info("note: the CLIP loss takes the built-in judge, by which `sbrush eval` measures this student too")
        elif clip_weights is None or not clip_weights.exists():
            raise SbrushError(
                f"no CLIP model {printable(clip_weights)}" if clip_weights else "the CLIP loss needs a CLIP model",
                f"--clip-weights: {clip_model}'s as safetensors or a state dict, or a folder of open_clip's",
                code=2,
            )
        else:
            loaded = ClipScorer.load(clip_weights, model_name=clip_model, device=device)
            # A folder's digest says all, whatever it is called; a file's does not say which model it is read as.
            clip, name = loaded, f"{'open_clip' if clip_weights.is_dir() else loaded.name} {loaded.digest[:16]}"
        if tiny_vae is None:
            return cls(clip, teacher.vae, name)
        vae = _tiny(tiny_vae, teacher).to(device).requires_grad_(False).eval()
        files = {file.name: file for file in network_files(tiny_vae, DIFFUSERS)}
        return cls(clip, vae, f"{name}, {digest_of(files)[:16]}")

    @classmethod
    def shapes(cls, teacher: Model, request: AlignmentRequest) -> Alignment:
        """The same, its networks with shapes and no numbers."""
        clip = _judge(teacher, request, "meta") or ClipScorer.shapes(
            request.clip_weights, model_name=request.clip_model
        )
        tiny_vae = request.tiny_vae
        return cls(clip, teacher.vae if tiny_vae is None else _tiny(tiny_vae, teacher, weights=False), "shapes")

    @property
    def networks(self) -> list[nn.Module]:
        """Decoder and CLIP model."""
        return [self._vae, self._clip.network]

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Those that are held for the loss alone; a decoder that is the teacher's own is not."""
        yield from self._clip.network.parameters()
        if isinstance(self._vae, AutoencoderTiny):
            yield from self._vae.parameters()

    def cosines(self, x0: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each latent's image and its prompt: float32 [B, C, H, W] and B prompts to float32 [B]."""
        latents = for_decoder(self._vae, x0).to(self._vae.dtype)
        images = self._vae.decode(latents).sample.float() / 2 + 0.5
        return self._clip.cosines(images.clamp(0, 1), prompts)


def _judge(teacher: Model, request: AlignmentRequest, device: str) -> Judge | None:
    """The built-in judge, if no CLIP model is named and the teacher is of the built-in world."""
    wanted = request.clip_weights is None and teacher.about.get("world") == "stickers"
    return Judge.load(device=device) if wanted else None


def _tiny(folder: Path, teacher: Model, *, weights: bool = True) -> Vae:
    """A tiny VAE; SbrushError if the folder holds none for this teacher's latents."""
    hint = "--tiny-vae takes a folder of diffusers' AutoencoderTiny: config.json and safetensors, such as TAESD's"
    return read_vae(folder, teacher, kinds=("AutoencoderTiny",), weights=weights, hint=hint)
