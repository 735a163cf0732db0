"""The built-in world: captions and their truth, drawing, and the teacher that is shipped."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import ImageChops
from torchvision.transforms.functional import pil_to_tensor

from sbrush.models.load import BUILT_IN, load_teacher
from sbrush.stickers.draw import draw
from sbrush.stickers.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    KINDS,
    SIZES,
    Caption,
    all_captions,
    random_caption,
    random_sticker,
    stream,
)


def test_the_world_is_as_large_as_promised():
    assert len(KINDS) >= 12 and len(COLOURS) == 10 and len(BACKGROUNDS) == 6 and len(SIZES) == 2
    assert len(HELD_OUT) == len(KINDS) * len(COLOURS) // 10
    assert {kind for kind, _ in HELD_OUT} == set(KINDS) and {colour for _, colour in HELD_OUT} == set(COLOURS)


def test_captions_read_well_and_are_distinct():
    assert Caption("cat", "red", "mint", "small").text == "a small red cat on a mint background"
    assert Caption("fish", "orange").text == "an orange fish" and Caption().text == "a sticker"
    assert Caption(background="night").text == "a sticker on a night background"
    texts = [c.text for c in all_captions(held_out=True)]
    assert len(texts) == len(set(texts)) == 3 * 11 * 13 * 7
    assert all(not c.held_out for c in all_captions())


def test_a_sticker_is_true_of_its_caption_and_never_of_a_held_out_combination_by_chance():
    for i in range(500):
        caption = random_caption(stream("a test", i))
        sticker = random_sticker(stream("another test", i), caption)
        assert sticker.matches(caption)
        assert caption.held_out or (sticker.kind, sticker.colour) not in HELD_OUT
        assert 2 <= sticker.x - sticker.radius and sticker.x + sticker.radius <= IMAGE_SIZE - 2


def test_what_a_caption_leaves_out_is_uniform():
    stickers = [random_sticker(stream("uniform", i), Caption(kind="cat"), held_out=True) for i in range(3000)]
    for name in ("colour", "background", "size"):
        counts = Counter(getattr(s, name) for s in stickers)
        expected = 3000 / len(ATTRIBUTES[name])
        assert set(counts) == set(ATTRIBUTES[name])
        assert max(abs(c - expected) for c in counts.values()) < 5 * expected**0.5


def test_captions_leave_attributes_out_at_random():
    captions = [random_caption(stream("dropped", i)) for i in range(2000)]
    for name, share in (("kind", 0.1), ("colour", 0.4), ("background", 0.4), ("size", 0.4)):
        missing = sum(getattr(c, name) is None for c in captions) / 2000
        assert abs(missing - share) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_is_where_and_as_large_as_the_sticker_says(kind):
    for size in SIZES:
        caption = Caption(kind=kind, colour="purple", background="mint", size=size)
        sticker = random_sticker(stream(f"draw/{kind}", 1), caption)
        image = draw(sticker)
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
        empty = image.copy()
        empty.paste(BACKGROUNDS["mint"], (0, 0, *image.size))
        left, top, right, bottom = ImageChops.difference(image, empty).getbbox()
        extent = max(right - left, bottom - top) / 2
        assert 0.8 * sticker.radius < extent < sticker.radius + 3.5
        assert abs((left + right) / 2 - sticker.x) < 0.2 * sticker.radius + 1
        assert abs((top + bottom) / 2 - sticker.y) < 0.3 * sticker.radius + 1
        assert draw(sticker).tobytes() == image.tobytes()


def test_any_text_tokenizes_and_the_worlds_words_are_one_token_each():
    tokenizer = load_teacher().tokenizer
    assert len(tokenizer) <= 4000
    for caption in all_captions(held_out=True):
        assert len(tokenizer(caption.text).input_ids) == len(caption.text.split()) + 2
    strange = tokenizer("an astronaut 🚀 rîding a ドラゴン \x00").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1] and len(strange) > 12


def test_the_shipped_weights_are_small_and_safetensors_only():
    files = [f for f in BUILT_IN.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if f.suffix == ".safetensors") <= 40_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".md", ".onnx"}
    student = {p.name for p in (BUILT_IN / "student").iterdir() if p.is_dir()}
    assert student == {"unet", "scheduler"}  # text encoder and VAE are stored once


def test_the_teacher_is_a_plain_stable_diffusion_pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BUILT_IN / "teacher")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    image = pipe("a red cat", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.beta_end == 0.012


def test_the_vae_keeps_a_image():
    teacher = load_teacher()
    drawn = [draw(random_sticker(stream("vae-check", i), held_out=True)) for i in range(64)]
    images = torch.stack([pil_to_tensor(image) for image in drawn])
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        latents = teacher.vae.encode(x).latent_dist.mean * teacher.vae.config.scaling_factor
    error = (teacher.decode(latents).float() - images).pow(2).mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() >= 28
    assert 0.8 < latents.std() < 1.2


def test_the_prompt_file_is_what_the_world_prints():
    file = Path(__file__).parent.parent / "prompts" / "stickers.txt"
    assert file.read_text(encoding="utf-8").splitlines() == [c.text for c in all_captions()]
