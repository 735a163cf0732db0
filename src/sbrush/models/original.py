"""The names that Stable Diffusion's first code gave its tensors: one table for reading single files and writing them.

    ours, diffusers' and transformers'                theirs
    down_blocks.1.resnets.0.conv1.weight              input_blocks.4.0.in_layers.2.weight
    decoder.mid_block.attentions.0.to_q.weight        decoder.mid.attn_1.q.weight, a 1 x 1 convolution
    text_model.encoder.layers.0.self_attn.q_proj ...  transformer.resblocks.0.attn.in_proj_weight: q, k and v in one

Text encoders have two layouts: OpenAI's CLIP keeps transformers' names, open_clip has its own. ComfyUI, A1111 and
diffusers know the encoder's architecture by its layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."  # SD 1.x and 2.x
XL_TEXT = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}

UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_LAYERS = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")


class Original(NamedTuple):
    """A tensor of theirs, and the tensors of ours that it holds: several are stacked along the first axis.

    `form`: "as ours"; "convolution": a matrix of ours is 1 x 1 there; "transposed": a matrix, the other way round.
    """

    name: str
    ours: tuple[str, ...]
    form: Literal["as ours", "convolution", "transposed"] = "as ours"

    def pack(self, ours: Callable[[str], Tensor]) -> Tensor:
        """Their tensor of ours."""
        tensors = [ours(name) for name in self.ours]
        value = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.form == "transposed":
            return value.T
        return value[:, :, None, None] if self.form == "convolution" and value.ndim == 2 else value

    def unpack(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensors of theirs."""
        value = theirs.T if self.form == "transposed" else theirs
        if self.form == "convolution" and value.ndim > 2:
            value = value.reshape(value.shape[:2])
        return dict(zip(self.ours, value.chunk(len(self.ours)), strict=True))


def unet_entries(names: Iterable[str]) -> list[Original]:
    """The table of a UNet's tensors `names`. ValueError if one has no name in the original layout."""
    names = list(names)
    resnets = _blocks(names, "resnets")
    attentions, downsamplers = (_blocks(names, kind) for kind in ("attentions", "downsamplers"))
    first, place = dict[str, int](), {"down": 1, "up": 0}
    for block in sorted(resnets, key=lambda b: (b.split("_")[0], int(b.split(".")[1]))):
        side = block.split("_")[0]
        first[block] = place[side]
        place[side] += resnets[block] + (block in downsamplers)

    def renamed(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        if stem in UNET_ENDS:
            return f"{UNET_ENDS[stem]}.{leaf}"
        if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, at, rest = middle.groups()
            home = f"middle_block.{2 * int(at) + (kind == 'attentions')}"
        elif inside := re.fullmatch(r"((?:down|up)_blocks\.\d+)\.(\w+)\.(\d+)\.(.+)", name):
            block, kind, at, rest = inside.groups()
            side = "input" if block.startswith("down") else "output"
            if kind == "downsamplers":
                return f"input_blocks.{first[block] + resnets[block]}.0.op.{leaf}"
            if kind == "upsamplers":
                last = first[block] + resnets[block] - 1
                return f"output_blocks.{last}.{1 + (block in attentions)}.conv.{leaf}"
            home = f"{side}_blocks.{first[block] + int(at)}.{int(kind == 'attentions')}"
        else:
            raise ValueError(f"{name} has no name in Stable Diffusion's original layout")
        if kind == "resnets":
            inner, _, leaf = rest.rpartition(".")
            rest = f"{UNET_RESNET[inner]}.{leaf}"
        return f"{home}.{rest}"

    return [Original(UNET + renamed(name), (name,)) for name in names]


def vae_entries(names: Iterable[str], prefix: str = VAE) -> list[Original]:
    """The table of an autoencoder's tensors. Its decoder's blocks are counted from the image there, not from here."""
    names = list(names)
    levels = 1 + max((int(m[1]) for name in names if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name))), default=0)

    def entry(name: str) -> Original:
        theirs = name
        for ours, own in VAE_LAYERS.items():
            theirs = theirs.replace(ours, own)
        theirs = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", theirs)
        theirs = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", theirs)
        theirs = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", theirs)
        if found := re.fullmatch(r"(.*)mid_block\.attentions\.(\d+)\.(.+)\.(weight|bias)", theirs):
            side, at, layer, leaf = found.groups()
            theirs = f"{side}mid.attn_{int(at) + 1}.{VAE_ATTENTION[layer]}.{leaf}"
            if layer != "group_norm" and leaf == "weight":
                return Original(prefix + theirs, (name,), "convolution")
        return Original(prefix + theirs, (name,))

    return [entry(name) for name in names]


def clip_entries(names: Iterable[str], home: str, *, bare: bool = False) -> list[Original]:
    """The table of a text encoder as OpenAI's CLIP is laid out; `bare`: as some older files have it."""
    return [
        Original(f"{home}transformer.{name.removeprefix('text_model.') if bare else name}", (name,)) for name in names
    ]


def open_clip_entries(names: Iterable[str], home: str) -> list[Original]:
    """The table of a text encoder as open_clip lays it out. ValueError if a name has none there."""
    entries, own = list[Original](), f"{home}model."
    for name in names:
        if name == "text_projection.weight":
            entries.append(Original(f"{own}text_projection", (name,), "transposed"))
        elif name in OPEN_CLIP_ENDS:
            entries.append(Original(own + OPEN_CLIP_ENDS[name], (name,)))
        elif found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, layer, leaf = found.groups()
            block = f"{own}transformer.resblocks.{block}"
            if layer in OPEN_CLIP_LAYER:
                entries.append(Original(f"{block}.{OPEN_CLIP_LAYER[layer]}.{leaf}", (name,)))
            elif layer == "self_attn.q_proj":
                together = tuple(name.replace("q_proj", which) for which in QKV)
                entries.append(Original(f"{block}.attn.in_proj_{leaf}", together))
            elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):  # which are with q_proj
                raise ValueError(f"{name} has no name in open_clip's layout")
        else:
            raise ValueError(f"{name} has no name in open_clip's layout")
    return entries


def _blocks(names: Iterable[str], kind: str) -> dict[str, int]:
    """How many modules of a kind each block of a UNet has: {"down_blocks.0": 2}."""
    found: dict[str, int] = {}
    for name in names:
        if m := re.match(rf"((?:down|up)_blocks\.\d+)\.{kind}\.(\d+)\.", name):
            found[m[1]] = max(found.get(m[1], 0), int(m[2]) + 1)
    return found
