"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from sbrush.core import Conditioning
from sbrush.device import send
from sbrush.models.control import residuals
from sbrush.models.model import Model, embedded_guidance
from sbrush.models.tokenizers import tokenize


@dataclass(kw_only=True)
class ModelXL(Model):
    """A teacher or a student in Stable Diffusion XL's format."""

    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    parts: ClassVar[dict[str, tuple[str, str]]] = Model.parts | {
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    }
    none: ClassVar[dict[str, Any]] = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": True,
    }

    tokenizer_2: CLIPTokenizer
    text_encoder_2: CLIPTextModelWithProjection

    @property
    def text_parts(self) -> tuple[tuple[CLIPTokenizer, PreTrainedModel], ...]:
        return *super().text_parts, (self.tokenizer_2, self.text_encoder_2)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """ "tokens" [B, L, D1 + D2], of both encoders' last layers but one, and "pooled" [B, D2], of the second."""
        hidden = []
        for tokenizer, encoder in self.text_parts:
            ids = send(tokenize(tokenizer, texts).input_ids, encoder.device)
            encoded = encoder(ids, output_hidden_states=True)
            hidden.append(encoded.hidden_states[-2].to(self.device))
        return self.with_guidance({"tokens": torch.cat(hidden, dim=-1), "pooled": encoded.text_embeds.to(self.device)})

    def null(self) -> Conditioning:
        """Zeros for the empty prompt where the folder says so, as the published teachers' do. A batch of one."""
        conditioning = self.encode([self.null_prompt])
        if self.null_prompt or not self.index.get("force_zeros_for_empty_prompt", True):
            return conditioning
        return {name: torch.zeros_like(value) for name, value in conditioning.items()}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As Model.predict; the network is told besides that it draws a whole, uncropped image of its own size."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": self._time_ids.to(x_t.device).expand(len(x_t), 6)}
        steering = residuals(self.controls, x_t, t, conditioning, added)
        return network(
            x_t, t, conditioning["tokens"], added_cond_kwargs=added, **embedded_guidance(conditioning), **steering
        ).sample

    @cached_property
    def _time_ids(self) -> Tensor:
        """Height and width, upper left corner, height and width: float32 [6]."""
        height, width = self.image_size
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def decode(self, x0: Tensor, *, truncate: bool = False) -> Tensor:
        """As Model.decode; an autoencoder that overflows in float16 (`force_upcast`) decodes in float32 then."""
        if (vae := self.decoding_vae).dtype == torch.float16 and vae.config.force_upcast:
            vae.float()
        return super().decode(x0, truncate=truncate)
