"""What ComfyUI's checkpoint loader reads of a file, as data, and the files of full-sized students beside it.

Its sources are comfy/model_detection.py (a UNet's shape, derived from the names and shapes of its tensors),
comfy/supported_models.py (which shape is which model, and how each text encoder's names begin) and
comfy/utils.py (open_clip's names) of github.com/comfyanonymous/ComfyUI. Sizes alone: nothing is computed.
"""

import re

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbrush.models.original import TEXT, XL_TEXT, clip_entries, open_clip_entries, unet_entries, vae_entries
from sbrush.models.single_file import published_name
from test_comfyui import big

UNET, TENSORS = "model.diffusion_model.", {"sd15": 686, "sd21": 686, "sdxl": 1680}  # as in the published files
DETECTED = {  # what model_detection.py is to find; supported_models.py knows a model by it
    "sd15": {
        "context_dim": 768, "model_channels": 320, "use_linear_in_transformer": False, "adm_in_channels": None,
        "in_channels": 4, "out_channels": 4, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sd21": {
        "context_dim": 1024, "model_channels": 320, "use_linear_in_transformer": True, "adm_in_channels": None,
        "in_channels": 4, "out_channels": 4, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "context_dim": 2048, "model_channels": 320, "use_linear_in_transformer": True, "adm_in_channels": 2816,
        "in_channels": 4, "out_channels": 4, "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}  # fmt: skip
# The statistics of this tensor tell SD 2.x's v prediction, which fails without it.
READ_OF_SD2 = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
OPEN_CLIP = {  # names of open_clip's layers, as comfy/utils.py reads them
    "ln_1.weight", "ln_1.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
    "attn.out_proj.bias",
}  # fmt: skip


def packed(entries, part, network):
    """Names and shapes in a file."""
    own = {published_name(part, name): value for name, value in network.state_dict().items()}
    return {entry.name: tuple(entry.pack(own.__getitem__).shape) for entry in entries(list(own))}


def depth_at(shapes, place):
    found = {m[1] for name in shapes if (m := re.match(re.escape(place) + r"\.1\.transformer_blocks\.(\d+)\.", name))}
    return len(found)


def detect(shapes):
    """A UNet's shape by what the loader looks at."""

    def size(name, axis):
        return shapes[UNET + name][axis] if UNET + name in shapes else None

    channels = size("input_blocks.0.0.weight", 0)
    count = len({name.split(".")[3] for name in shapes if name.startswith(f"{UNET}input_blocks.")})
    depths, outputs, multiples, resnets = [], [], [], [0]
    for i in range(count):
        if f"{UNET}input_blocks.{i}.0.op.weight" in shapes:
            resnets.append(0)
        elif f"{UNET}input_blocks.{i}.0.in_layers.0.weight" in shapes:
            resnets[-1] += 1
            multiple = size(f"input_blocks.{i}.0.out_layers.3.weight", 0) // channels
            multiples = [*multiples[: len(resnets) - 1], multiple]
            depths.append(depth_at(shapes, f"{UNET}input_blocks.{i}"))
        outputs.insert(0, depth_at(shapes, f"{UNET}output_blocks.{i}"))
    at = next(i for i in range(count) if f"{UNET}input_blocks.{i}.1.proj_in.weight" in shapes)
    return {
        "context_dim": size(f"input_blocks.{at}.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "model_channels": channels, "in_channels": size("input_blocks.0.0.weight", 1),
        "out_channels": size("out.2.weight", 0), "adm_in_channels": size("label_emb.0.0.weight", 1),
        "use_linear_in_transformer": len(shapes[f"{UNET}input_blocks.{at}.1.proj_in.weight"]) == 2,
        "channel_mult": multiples, "num_res_blocks": resnets, "transformer_depth": depths,
        "transformer_depth_output": outputs, "transformer_depth_middle": depth_at(shapes, f"{UNET}middle_block"),
    }  # fmt: skip


@pytest.mark.parametrize("name", DETECTED)
def test_the_loader_finds_the_unet_that_it_is(name):
    shapes = packed(unet_entries, "unet", big(name))
    assert detect(shapes) == DETECTED[name] and len(shapes) == TENSORS[name]
    assert name != "sd21" or READ_OF_SD2 in shapes


def test_the_loader_finds_the_autoencoder():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    shapes = packed(vae_entries, "vae", vae)
    assert len(shapes) == 248 and all(name.startswith("first_stage_model.") for name in shapes)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["first_stage_model.decoder.up.3.block.0.conv1.weight"] == (512, 512, 3, 3)  # the one next to latents
    assert shapes["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["first_stage_model.post_quant_conv.weight"] == (4, 4, 1, 1)


def text_encoder(kind, width, layers, **options):
    config = CLIPTextConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=width,
        num_attention_heads=width // 64, **options,
    )  # fmt: skip
    with torch.device("meta"):
        return kind(config)


def test_the_loader_finds_the_text_encoders():
    first = text_encoder(CLIPTextModel, 768, 12)
    for home in (TEXT, XL_TEXT["text_encoder"]):  # of SD 1.x, and SDXL's first
        shapes = packed(lambda names, home=home: clip_entries(names, home), "text_encoder", first)
        assert len(shapes) == 196 and all(name.startswith(f"{home}transformer.text_model.") for name in shapes)
        assert shapes[f"{home}transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    second = text_encoder(CLIPTextModelWithProjection, 1280, 32, projection_dim=1280)
    of_sd2 = text_encoder(CLIPTextModel, 1024, 23)
    for part, network, home, width in (
        ("text_encoder_2", second, XL_TEXT["text_encoder_2"], 1280), ("text_encoder", of_sd2, TEXT, 1024),
    ):  # fmt: skip
        shapes = packed(lambda names, home=home: open_clip_entries(names, home), part, network)
        blocks = f"{home}model.transformer.resblocks."
        inner = {re.sub(r"^\d+\.", "", name.removeprefix(blocks)) for name in shapes if name.startswith(blocks)}
        assert inner == OPEN_CLIP and shapes[f"{blocks}0.attn.in_proj_weight"] == (3 * width, width)
        others = {name.removeprefix(f"{home}model.") for name in shapes if not name.startswith(blocks)}
        projection = {"text_projection"} if part == "text_encoder_2" else set()
        assert others - projection == {"positional_embedding", "token_embedding.weight", "ln_final.weight",
                                       "ln_final.bias"}  # fmt: skip
        assert projection <= others
