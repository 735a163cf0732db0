"""The adapter: whatever a teacher's architecture, core.py sees encode, denoise, decode, a schedule and a prediction.

`Model` is Stable Diffusion 1.x and 2.x; sdxl.py is another. One more architecture is one more class like these and a
line in load.FAMILIES. A teacher that predicts something else than epsilon or v turns it into one of them in `predict`:
a flow-matching network u(x, s) = eps - x0 on x = (1 - s) x0 + s eps is, on x_t = x / sqrt((1 - s)^2 + s^2), the
v prediction sigma_t-weighted mix of x0 = x - s u and eps = x + (1 - s) u (tests/test_models.py does so).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from sbrush.console import SbrushError
from sbrush.core import Conditioning, NoiseSchedule, Prediction
from sbrush.device import send
from sbrush.models.control import ControlNet, residuals
from sbrush.models.ladder import Ladder
from sbrush.models.latents import for_decoder, for_encoder, to_images
from sbrush.models.lora_request import AddedLora
from sbrush.models.negative_attention import NegativePrompt, guided_away
from sbrush.models.schedule import as_ddim
from sbrush.models.tokenizers import tokenize, truncated_prompts
from sbrush.models.vae_source import Decoder

# Pixels decoded at once, two images of 512 x 512: enough for any card, and three quarters of a GiB. Of 64 a layer
# would have 2^32 values, more than cuDNN counts.
DECODED = 1 << 19
VALUES = 4096  # of each tensor, in a fingerprint
GUIDANCE = 7.5  # the scale of models that name none: Stable Diffusion's own


@dataclass
class Model:
    """A text-to-image latent diffusion model in memory: a teacher or a student, Stable Diffusion 1.x or 2.x.

    `about` is its sbrush.json (empty for models made elsewhere), `index` its model_index.json; `folders` says where
    each part was read from, `sources` which other files its weights come from. A student's one step is at
    `start_timestep` (None: T), where x_t is `noise_scale` z; one of several steps has a `ladder`. `loras` are in its
    weights, see lora.add_loras. `decoder` turns latents into images in place of `vae`. `controls` steer the UNet where
    its conditioning has control images.

    Away from what: a student's attention from its `negative` prompt, a teacher's guidance from its `null_prompt`.
    """

    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    parts: ClassVar[dict[str, tuple[str, str]]] = {
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
    }
    none: ClassVar[dict[str, Any]] = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }  # what model_index.json says of parts that a student has not

    name: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    folders: dict[str, Path]
    about: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)
    start_timestep: int | None = None
    noise_scale: float = 1.0
    ladder: Ladder | None = None
    negative: NegativePrompt | None = None
    null_prompt: str = ""
    loras: tuple[AddedLora, ...] = ()
    decoder: Decoder | None = None
    controls: tuple[ControlNet, ...] = ()

    def as_student(self, scheduler: SchedulerMixin, about: dict[str, Any]) -> Self:
        """This model as a student that is sampled with `scheduler`; `about` is its sbrush.json."""
        ladder = Ladder.read(scheduler, about.get("steps"))
        return replace(self, about=about, scheduler=as_ddim(scheduler), ladder=ladder)

    @property
    def sampler(self) -> SchedulerMixin:
        """The scheduler with which plain diffusers draws this student's images."""
        return self.ladder.scheduler if self.ladder else self.scheduler

    @property
    def runtime(self) -> str | None:
        """The library that draws, if it is not torch; see sampling/opening.py."""
        return None

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell models apart: a hash over values of every tensor, and over how a step is taken."""
        schedule = sorted((key, value) for key, value in self.scheduler.config.items() if not key.startswith("_"))
        step: tuple[object, ...] = (self.start_timestep, self.noise_scale, self.about.get("reparameterised", True))
        if self.guidance_input is not None:
            step += (self.guidance_input,)
        if self.ladder:
            step += (self.sampler_name, self.sampler.config.get("original_inference_steps"))
        if self.decoder:
            step += (self.decoder.sha256,)
        whole = hashlib.sha256(repr((schedule, step)).encode())
        for network in self.networks:
            for tensor in network.state_dict().values():
                some = tensor.flatten()[:: max(1, tensor.numel() // VALUES)]
                whole.update(some.float().cpu().numpy().tobytes())
        return whole.hexdigest()[:16]

    @property
    def step_choices(self) -> tuple[int, ...]:
        """The numbers of steps that it can take as a student."""
        return self.ladder.choices if self.ladder else (1,)

    @property
    def fresh_noise(self) -> bool:
        """Whether each of its steps as a student takes fresh noise."""
        return self.ladder is not None and self.ladder.fresh

    @property
    def sampler_name(self) -> str:
        """Its class, as diffusers calls it."""
        return type(self.sampler).__name__

    def rungs(self, steps: int | None = None) -> tuple[int, ...]:
        """The timesteps of a student's steps from noise on. `steps` None: as many as it was trained for.

        SbrushError if it cannot take so many.
        """
        if self.ladder:
            return self.ladder.rungs(steps)
        if steps not in (None, 1):
            raise SbrushError(
                f"this student takes 1 step, not {steps}",
                "leave out --steps, or train one of several: sbrush distill --student-steps 4",
                code=2,
            )
        return (len(self.scheduler.alphas_cumprod) - 1 if self.start_timestep is None else self.start_timestep,)

    @classmethod
    def student_index(cls, scheduler: str = "DDIMScheduler") -> dict[str, Any]:
        """The model_index.json of a student that has a `scheduler` of that class."""
        parts = {part: list(kind) for part, kind in cls.parts.items()} | {"scheduler": ["diffusers", scheduler]}
        return {"_class_name": cls.pipeline, "_diffusers_version": "0.35.0", **dict(sorted((parts | cls.none).items()))}

    @property
    def prediction(self) -> Prediction:
        """What `predict` returns."""
        return cast(Prediction, self.scheduler.config.prediction_type)

    @property
    def schedule(self) -> NoiseSchedule:
        """alpha_t and sigma_t, on the device that the UNet is on now."""
        return NoiseSchedule.from_alphas_cumprod(self.scheduler.alphas_cumprod).to(self.device)

    @property
    def guidance_input(self) -> float | None:
        """The guidance scale that the UNet is given as input; None: it takes none."""
        if getattr(self.unet.config, "time_cond_proj_dim", None) is None:
            return None
        return float(self.about.get("guidance", GUIDANCE))

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Every part that has weights."""
        return *(encoder for _, encoder in self.text_parts), self.vae, self.unet

    @property
    def decoding_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """The VAE that turns latents into images: its own, unless `decoder` is another."""
        return self.decoder.network if self.decoder else self.vae

    @property
    def text_parts(self) -> tuple[tuple[CLIPTokenizer, PreTrainedModel], ...]:
        """Each tokenizer with its encoder; the encoders' widths, side by side, are that of "tokens"."""
        return ((self.tokenizer, self.text_encoder),)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    @property
    def decoded_at_once(self) -> int:
        """Images, see DECODED."""
        height, width = self.image_size
        return max(1, DECODED // (height * width))

    @property
    def longest_prompt(self) -> int:
        """In tokens, start and end included."""
        return self.text_parts[0][0].model_max_length

    def truncated_prompts(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than a text encoder reads, so that their ends are cut off."""
        return truncated_prompts(self.text_parts, texts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """What the UNet is told of each text: "tokens" [B, L, D] in the text encoder's dtype; see with_guidance.

        Longer prompts lose their tail, as everywhere.
        """
        tokens = tokenize(self.tokenizer, texts)
        where = self.text_encoder.device  # which a run with a text cache leaves on the CPU
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = send(tokens.attention_mask, where)
        encoded = self.text_encoder(send(tokens.input_ids, where), attention_mask=mask)
        return self.with_guidance({"tokens": encoded.last_hidden_state.to(self.device)})

    def with_guidance(self, conditioning: Conditioning) -> Conditioning:
        """The same and, for a UNet that takes a guidance scale as input, "guidance" [B, D]: see guidance_embedding.

        The scale is the one that the model's sbrush.json records, as diffusers' guidance_scale counts it. Most UNets
        take none, and what they are told stays as it is.
        """
        if self.guidance_input is None:
            return conditioning
        w = torch.full((len(conditioning["tokens"]),), self.guidance_input - 1, device=self.device)
        return conditioning | {"guidance": guidance_embedding(w, self.unet.config.time_cond_proj_dim)}

    def null(self) -> Conditioning:
        """What guidance moves away from: the `null_prompt`, which is the empty one as a rule. A batch of one."""
        return self.encode([self.null_prompt])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of a `network` of this architecture, wrapped or not: [B, C, H, W], see `prediction`.

        Of several networks, one that takes a guidance scale as input finds its embedding in "guidance" [B, D].
        """
        steering = residuals(self.controls, x_t, t, conditioning)
        return network(x_t, t, conditioning["tokens"], **embedded_guidance(conditioning), **steering).sample

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own UNet as a core.Denoiser, in the UNet's own dtype."""
        dtype = self.unet.dtype
        with guided_away(self.unet, self.negative):
            return self.predict(
                self.unet, x_t.to(dtype), t, {name: value.to(dtype) for name, value in conditioning.items()}
            )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] to latents at the UNet's scale, float32 [B, C, H', W'] on the VAE's device.

        Of the VAE's distribution this is the mean: its deviation is next to nothing.
        """
        parts = images.to(self.vae.device).split(self.decoded_at_once)
        means = [self.vae.encode((part.float() / 127.5 - 1).to(self.vae.dtype)).latent_dist.mode() for part in parts]
        return for_encoder(self.vae, torch.cat(means).float())

    @torch.no_grad()
    def decode(self, x0: Tensor, *, truncate: bool = False) -> Tensor:
        """Latents [B, C, H, W] to images: uint8 [B, 3, H', W'] on the CPU.

        Rounded as diffusers rounds; or with `truncate` cut to whole numbers, as DMD2's evaluation does. Raises
        FloatingPointError if the decoder overflows in float16.
        """
        vae = self.decoding_vae
        parts = for_decoder(vae, x0).to(vae.dtype).split(self.decoded_at_once)
        images, finite = [], []
        for part in parts:
            pixels = vae.decode(part).sample.float()
            if vae.dtype == torch.float16:  # read below: here the host would wait for the device
                finite.append(pixels.isfinite().all())
            images.append(to_images(pixels, truncate=truncate))
        if finite and not torch.stack(finite).all():
            raise FloatingPointError(f"the decoder of {self.name} overflows in float16")
        return torch.cat(images).cpu()


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sines and cosines of 1000 w, at frequencies from 1 to 1/10000: guidance weights [B] to float32 [B, width].

    w counts from 0, no guidance: diffusers' pipelines embed guidance_scale - 1 like this, for a UNet that has
    time_cond_proj_dim.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * w.float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def embedded_guidance(conditioning: Conditioning) -> dict[str, Tensor]:
    """The embedding of a guidance scale, if there is one, as diffusers' UNets take it."""
    return {"timestep_cond": conditioning["guidance"]} if "guidance" in conditioning else {}
