"""A folder's networks by the names that the first Stable Diffusion's code gave them, as single files have them."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
OPEN_CLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding.weight":
    "token_embedding.weight", "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip


def ldm_unet(weights, layers):
    """A UNet's tensors by the names that the first Stable Diffusion's code gave them."""
    with_attention = {m[1] for n in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}

    def renamed(name):
        stem, leaf = name.rsplit(".", 1)
        if stem in UNET_ENDS:
            return f"{UNET_ENDS[stem]}.{leaf}"
        if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
            kind, at, rest = m.groups()
            place = f"middle_block.{2 * int(at) + (kind == 'attentions')}"
        else:
            side, block, kind, at, rest = re.fullmatch(
                r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name
            ).groups()  # fmt: skip
            first = int(block) * (layers + 1) + (side == "down")
            place = f"{'input' if side == 'down' else 'output'}_blocks.{first + int(at)}"
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.op.{leaf}"
            if kind == "upsamplers":
                return f"output_blocks.{first + layers}.{1 + (block in with_attention)}.conv.{leaf}"
            place += ".0" if kind == "resnets" else ".1"
        if kind == "resnets":
            inner, leaf = rest.rsplit(".", 1)
            rest = f"{RESNET[inner]}.{leaf}"
        return f"{place}.{rest}"

    return {f"model.diffusion_model.{renamed(name)}": value for name, value in weights.items()}


def ldm_vae(weights, levels):
    """An autoencoder's tensors by those names; its attention is made of 1 x 1 convolutions there."""
    named = {}
    for name, value in weights.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])", r"\1", name).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        named[f"first_stage_model.{name}"] = value
    return named


def text_weights(folder):
    """A text encoder's tensors; newer transformers leave out a prefix that every published folder has."""
    weights = load_file(folder / "model.safetensors")
    return {n if n.startswith(("text_model.", "text_proj")) else f"text_model.{n}": v for n, v in weights.items()}


def open_clip(weights, prefix):
    """A CLIP text encoder's tensors as open_clip has them: queries, keys and values in one."""
    named = {f"{prefix}logit_scale": torch.tensor(1.0)}
    for name, value in weights.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            named[f"{prefix}text_projection"] = value.T.contiguous()
        elif name in OPEN_CLIP_ENDS:
            named[prefix + OPEN_CLIP_ENDS[name]] = value
        elif m := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            others = [weights["text_model." + name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            named[f"{prefix}transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"] = torch.cat(others)
        elif m := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            if m[2] in OPEN_CLIP:
                named[f"{prefix}transformer.resblocks.{m[1]}.{OPEN_CLIP[m[2]]}.{m[3]}"] = value
    return named


def clip(weights, prefix):
    ids = {f"{prefix}transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    return ids | {f"{prefix}transformer.{name}": value for name, value in weights.items()}


def old_clip(weights, prefix):
    """As some older files have them: without text_model."""
    return {f"{prefix}transformer.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def whole_file(folder, file, text="clip", dtype=None, **extra):
    """A folder's networks as one checkpoint."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    tensors = ldm_unet(unet, config["layers_per_block"]) | ldm_vae(vae, 2)
    one = text_weights(folder / "text_encoder")
    if text == "xl":
        two = text_weights(folder / "text_encoder_2")
        tensors |= clip(one, "conditioner.embedders.0.") | open_clip(two, "conditioner.embedders.1.model.")
    else:
        names, prefix = {
            "clip": (clip, "cond_stage_model."), "old_clip": (old_clip, "cond_stage_model."),
            "open_clip": (open_clip, "cond_stage_model.model."),
        }[text]  # fmt: skip
        tensors |= names(one, prefix)
    if dtype:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in (tensors | extra).items()}, file)
    return file
