"""Negative prompts in a UNet of diffusers: the attention processor that applies negative.py's formulas.

In plain diffusers, with any student's folder (`tokens`: [1, L, D], what the text encoder makes of the negative prompt):

    pipe.unet.set_attn_processor(negative_processors(pipe.unet, tokens))

Only cross-attention changes. Self-attention keeps its processors, and so does a ControlNet, which is a network of its
own. The projections are called as layers, so that a LoRA in them acts on both prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sbrush.console import SbrushError
from sbrush.models.negative import NegativeGuidance, NegativeMethod

PLAIN = (AttnProcessor, AttnProcessor2_0)
BUILT_IN, SD15, SD21, SDXL = 128, 768, 1024, 2048  # widths of the tokens that a UNet attends to, which tell families
# From the papers: NASA's for SD 1.5 and 2.1, NAG's for SD 1.5 and SDXL. Those that no paper has are the nearest
# family's; the built-in world's are measured, see docs/negative.md.
DEFAULTS: dict[NegativeMethod, dict[int, NegativeGuidance]] = {
    "nag": {
        SD15: NegativeGuidance("nag", 2.0, limit=2.5, blend=0.375),
        SD21: NegativeGuidance("nag", 2.0, limit=2.5, blend=0.375),
        SDXL: NegativeGuidance("nag", 2.0, limit=2.5, blend=0.5),
        BUILT_IN: NegativeGuidance("nag", 4.0, limit=1.0, blend=1.0),
    },
    "nasa": {
        SD15: NegativeGuidance("nasa", 0.1),
        SD21: NegativeGuidance("nasa", 0.2),
        SDXL: NegativeGuidance("nasa", 0.2),
        BUILT_IN: NegativeGuidance("nasa", 0.4),
    },
}


def negative_guidance(
    unet: UNet2DConditionModel, method: NegativeMethod = "nag", scale: float | None = None
) -> NegativeGuidance:
    """A method with its family's numbers; `scale` None is the family's too. A family is told by its tokens' width.

    One that is not known gets Stable Diffusion 1.5's.
    """
    families, width = DEFAULTS[method], unet.config.cross_attention_dim
    found = families.get(width if isinstance(width, int) else SD15, families[SD15])
    return found if scale is None else NegativeGuidance(method, scale, found.limit, found.blend)


class NegativeAttention:
    """An attention processor of cross-attention: what the prompt's tokens give, moved away from the negative prompt's.

    Each layer costs the projections of the negative tokens, once for the whole batch, and a second attention with the
    same queries; there is no second forward of the UNet.
    """

    def __init__(self, tokens: Tensor, guidance: NegativeGuidance) -> None:
        """`tokens`: the negative prompt's, [1, L, D] or one for each image, [B, L, D]; on any device, of any dtype."""
        self.tokens, self.guidance = tokens, guidance

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' AttnProcessor2_0: [B, N, D] of image tokens and [B, L, D'] of text to [B, N, D]."""
        query = _heads(attn, attn.to_q(hidden_states))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, encoder_hidden_states.shape[1], len(query))
            attention_mask = attention_mask.unflatten(0, (len(query), attn.heads))
        positive = _attend(attn, query, encoder_hidden_states, attention_mask)
        negative = _attend(attn, query, self.tokens.to(encoder_hidden_states), None)
        out = attn.to_out[1](attn.to_out[0](self.guidance(positive, negative)))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _attend(attn: Attention, query: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """What the queries find in text tokens, all heads side by side: [B, N, D]."""
    if attn.norm_cross:
        tokens = attn.norm_encoder_hidden_states(tokens)
    key, value = (_heads(attn, project(tokens)) for project in (attn.to_k, attn.to_v))
    if len(key) != len(query):  # one negative prompt for the whole batch, projected once
        key, value = (x.expand(len(query), -1, -1, -1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    """[B, N, heads x d] to [B, heads, N, d]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def negative_processors(
    unet: UNet2DConditionModel, tokens: Tensor, guidance: NegativeGuidance | None = None
) -> dict[str, Any]:
    """The processors for `unet.set_attn_processor`: NegativeAttention in cross-attention, elsewhere what is there.

    `tokens`: see NegativeAttention. `guidance` None is NAG with the family's numbers. Raises SbrushError if another
    program has put processors of its own into the cross-attention, such as IP-Adapter's.
    """
    ours = NegativeAttention(tokens, guidance or negative_guidance(unet))
    processors: dict[str, Any] = dict(unet.attn_processors)
    for name, layer in cross_attention(unet).items():
        if not isinstance(layer.processor, (*PLAIN, NegativeAttention)) or layer.norm_q is not None:
            raise SbrushError(
                f"a negative prompt does not go with the UNet's {type(layer.processor).__name__}",
                "unload the adapter that put it into the attention, or leave the negative prompt out",
            )
        processors[f"{name}.processor"] = ours
    return processors


def cross_attention(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """The layers that attend to the text, by name."""
    layers = {name.removesuffix(".processor"): unet.get_submodule(name.removesuffix(".processor"))
              for name in unet.attn_processors}  # fmt: skip
    return {name: layer for name, layer in layers.items() if layer.is_cross_attention}


@dataclass(frozen=True)
class NegativePrompt:
    """A negative prompt, encoded once to `tokens` [1, L, D], and how a UNet is to be guided away from it."""

    text: str
    tokens: Tensor
    guidance: NegativeGuidance

    @property
    def drawn_by(self) -> dict[str, Any]:
        """What an image depends on besides its prompt, seed and student."""
        return {"negative": self.text, "negative_method": self.guidance.method, "negative_scale": self.guidance.scale}


@contextmanager
def guided_away(unet: UNet2DConditionModel, negative: NegativePrompt | None) -> Iterator[None]:
    """The UNet draws away from the negative prompt as long as this lasts; None changes nothing.

    Its own processors come back, whatever happens.
    """
    if negative is None:
        yield
        return
    layers = {name: layer.processor for name, layer in cross_attention(unet).items()}
    unet.set_attn_processor(negative_processors(unet, negative.tokens, negative.guidance))
    try:
        yield
    finally:
        for name, processor in layers.items():
            unet.get_submodule(name).set_processor(processor)
