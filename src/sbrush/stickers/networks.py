"""The built-in world's networks, untrained: tokenizer, teacher in Stable Diffusion's own format, and judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sbrush.stickers.world import IMAGE_SIZE, all_captions

CONTEXT = 16  # tokens; the longest caption takes 10
WIDTH = 128  # of a token's embedding
LATENT = 16  # latent pixels a side

JUDGE = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 0, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
}


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learnt from the world's words, so that each of them is one token.

    Any other text falls to smaller pieces, bytes at the smallest. The end token has the highest id, as CLIP needs.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    words = sorted({word for c in all_captions(held_out=True) for word in c.text.split()})
    # Each word in another number: the trainer breaks ties by chance, and token ids must be the same in every training.
    bpe.train_from_iterator((word for i, word in enumerate(words) for _ in range(1000 + 7 * i)), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae() -> AutoencoderKL:
    """64 x 64 RGB to 4 x 16 x 16 latents and back."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Captions to [B, 16, 128]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """The teacher's denoiser, 4.1 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v prediction, steps that start at T."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # as in every Stable Diffusion folder; without effect on trailing steps
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_judge(tokenizer: CLIPTokenizer) -> tuple[Any, dict[str, Any]]:
    """The judge, a small open_clip model, and the configuration that open_clip loads it with."""
    import open_clip

    config: dict[str, Any] = json.loads(json.dumps(JUDGE))
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    return open_clip.CLIP(**config["model_cfg"]), config
