"""Model folders of Stable Diffusion's own sizes with random weights: speed, memory and loading depend on no more.

    python -m sbrush.benchmarks.full_size sd21 FOLDER     SD 2.1-base: 866 M UNet, 512 px, epsilon; 2.6 GB in float16
    python -m sbrush.benchmarks.full_size sd21-v FOLDER   SD 2.1: 768 px, v prediction
    python -m sbrush.benchmarks.full_size sd15 FOLDER     SD 1.5: 860 M UNet, 512 px, epsilon
    python -m sbrush.benchmarks.full_size sdxl FOLDER     SD XL with a transformer layer where it has up to ten; 1024 px

The tokenizer is the built-in world's, for the real one's words cannot be made up.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sbrush.console import info
from sbrush.models.model import Model
from sbrush.models.sdxl import ModelXL
from sbrush.stickers.networks import build_tokenizer
from sbrush.storage.files import write_json

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 1), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
UNETS["sd21-v"] = UNETS["sd21"] | {"sample_size": 96}
Size = StrEnum("Size", {name: name for name in UNETS})  # type: ignore[misc]
TEXT = {  # width, layers, heads, activation
    "sd15": (768, 12, 12, "quick_gelu"), "sd21": (1024, 23, 16, "gelu"), "sd21-v": (1024, 23, 16, "gelu"),
    "sdxl": (768, 12, 12, "quick_gelu"),
}  # fmt: skip


def make(name: str, folder: Path, *, latent: int | None = None) -> Path:
    """The folder, its weights in float16. `latent`: its images' side in latents, if not that of its kind.

    A smaller one leaves every weight as it is and makes a step quick.
    """
    torch.manual_seed(0)
    side = latent or UNETS[name]["sample_size"]
    tokenizer = build_tokenizer(folder / "tokenizer")
    _text_encoder(CLIPTextModel, tokenizer, *TEXT[name]).save_pretrained(folder / "text_encoder")
    if name == "sdxl":
        tokenizer.save_pretrained(folder / "tokenizer_2")
        second = _text_encoder(CLIPTextModelWithProjection, tokenizer, 1280, 32, 20, "gelu", projection=1280)
        second.save_pretrained(folder / "text_encoder_2")
    unet: Any = UNet2DConditionModel(**UNETS[name] | {"sample_size": side})
    unet.half().save_pretrained(folder / "unet")
    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        sample_size=8 * side, scaling_factor=0.13025 if name == "sdxl" else 0.18215,
    )  # fmt: skip
    vae.half().save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, prediction_type="v_prediction" if name == "sd21-v" else "epsilon",
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    write_json(folder / "model_index.json", (ModelXL if name == "sdxl" else Model).student_index())
    return folder


def make_tiny_vae(folder: Path) -> Path:
    """The folder, with an AutoencoderTiny of TAESD's shapes."""
    vae: Any = AutoencoderTiny()
    vae.half().save_pretrained(folder)
    return folder


@contextmanager
def or_made(folder: str | None, size: str | None) -> Iterator[str | None]:
    """`folder`; or one of this size, made for as long as the context lasts."""
    if size is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        info(f"making random weights of {size}'s shapes ...")
        yield str(make(size, Path(temporary)))


def _text_encoder(
    kind: Any, tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, activation: str, projection: int = 512
) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=activation, max_position_embeddings=77, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).half()


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
