"""The clamped CLIP loss (SwiftBrush v2): what the CLIP model sees, and where its gradient goes."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.metrics.clip import ClipScorer
from sbrush.models.load import load_teacher
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.alignment import Alignment
from sbrush.training.loop import distill
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import AlignmentRequest, ExecutionOptions, Intervals, RunRequest

TEXTS = ["a cat", "a dog", "a red fish", "a blue car on a mint background"]
PROMPTS = make_prompts(TEXTS, "four")
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=4, batch=4, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4,
    clip_weight=0.8, clip_tau=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """Latents of 4 x 16 x 16 to images of 32 x 32, as the tiny teacher's."""
    folder = tmp_path_factory.mktemp("tiny-vae")
    build_tiny_vae(folder)
    return folder


def build_tiny_vae(folder, *, blocks=2, latent_channels=4):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks, decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks, num_decoder_blocks=(1,) * blocks, latent_channels=latent_channels,
    ).save_pretrained(folder)  # fmt: skip


def aligned(teacher, clip_folder, tiny_vae=None):
    return Alignment.load(teacher, AlignmentRequest(clip_folder, tiny_vae=tiny_vae), device="cpu")


@pytest.mark.parametrize("tiny", [False, True])
def test_cosines_are_those_of_the_decoded_images_as_open_clip_prepares_them(tiny_teacher, clip_folder, tiny_vae, tiny):
    teacher = load_teacher(str(tiny_teacher))
    x0 = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    vae = AutoencoderTiny.from_pretrained(tiny_vae) if tiny else teacher.vae
    with torch.no_grad():
        images = vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5
        ours = aligned(teacher, clip_folder, tiny_vae if tiny else None).cosines(x0, TEXTS)
    scorer = ClipScorer.load(clip_folder)
    prepared = torch.stack([scorer.prepare(p) for p in (images.clamp(0, 1) * 255).round().to(torch.uint8)])
    theirs = scorer.scores(prepared, TEXTS, prefix="")
    assert theirs.std() > 0.02 and torch.allclose(ours, theirs, atol=5e-3)  # theirs are of rounded images


@pytest.mark.parametrize("execution", [{}, {"micro_batches": 2}])
def test_its_gradient_is_added_to_the_students_and_reaches_nothing_else(tiny_teacher, clip_folder, tiny_vae, execution):
    def gradient(recipe):
        teacher = load_teacher(str(tiny_teacher))
        alignment = aligned(teacher, clip_folder, tiny_vae)
        made = VSD(
            teacher,
            recipe,
            seed=3,
            accelerator=Accelerator(cpu=True),
            execution=ExecutionOptions(**execution),
            alignment=alignment,
        )
        seen = []
        made.student_optimizer.step = lambda: seen.extend(p.grad.clone() for p in made.trained.values())
        metrics = made.step(1, ShuffledPrompts(PROMPTS, 3))
        assert not any(p.requires_grad for network in alignment.networks for p in network.parameters())
        return made, torch.cat([g.flatten() for g in seen]), metrics

    unclipped = dataclasses.replace(SMALL, clip=1e9)
    made, with_loss, metrics = gradient(unclipped)
    _, without, other = gradient(dataclasses.replace(unclipped, clip_weight=0.0))
    assert "clip_cosine" not in other

    # The student's own images of step 1, and the loss's gradient by its weights, from torch alone.
    shuffled = ShuffledPrompts(PROMPTS, 3)
    texts = [shuffled[i] for i in range(4)]
    z = StepNoise(3, 1, range(4), torch.device("cpu")).normal(made.teacher.latent_shape)
    fresh = load_teacher(str(tiny_teacher))
    unet = fresh.unet.requires_grad_(True)
    t = torch.full((4,), 999)
    alpha, sigma = fresh.scheduler.alphas_cumprod[999].sqrt(), (1 - fresh.scheduler.alphas_cumprod[999]).sqrt()
    x0 = (z - sigma * unet(z, t, fresh.encode(texts)["tokens"]).sample) / alpha
    cosines = aligned(fresh, clip_folder, tiny_vae).cosines(x0, texts)
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad((0.9 - cosines).relu().sum() / 4, list(unet.parameters()))]
    )
    assert (cosines < 0.9).all() and metrics["clip_cosine"] == pytest.approx(cosines.mean().item(), abs=1e-4)
    weight = 0.8 * 3 / 4  # step 1 of 4
    assert expected.norm() > 1e-3 * without.norm()
    assert (with_loss - without - weight * expected).norm() < 1e-3 * weight * expected.norm()


def run(teacher, out, recipe=SMALL, **options):
    made = prepare(RunRequest(
        recipe, PROMPTS, out=out, teacher=str(teacher), seed=3, device="cpu", precision="float32",
        every=Intervals(log=1, grid=0, checkpoint=1), alignment=AlignmentRequest(**options),
    ))  # fmt: skip
    return distill(made)


def test_a_run_logs_the_cosine_and_is_another_with_another_clip_model(tmp_path, tiny_teacher, clip_folder, tiny_vae):
    assert run(tiny_teacher, tmp_path / "run", clip_weights=clip_folder, tiny_vae=tiny_vae)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["clip_cosine"] is None for entry in entries] == [False, False, False, True]  # its weight ends at 0
    with pytest.raises(SbrushError, match="another configuration: clip was"):
        run(tiny_teacher, tmp_path / "run", clip_weights=clip_folder)
    build_tiny_vae(tmp_path / "other")
    (tmp_path / "other" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SbrushError, match="cannot load the tiny VAE"):
        run(tiny_teacher, tmp_path / "new", clip_weights=clip_folder, tiny_vae=tmp_path / "other")


@pytest.mark.parametrize("made", [{"blocks": 3}, {"latent_channels": 8}])
def test_a_tiny_vae_of_other_latents_is_refused(tmp_path, tiny_teacher, clip_folder, made):
    build_tiny_vae(tmp_path, **made)
    with pytest.raises(SbrushError, match="into images"):
        aligned(load_teacher(str(tiny_teacher)), clip_folder, tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--clip-loss", "0.1"], "the CLIP loss needs a CLIP model"),
        (["--clip-loss", "0.1", "--clip-weights", "nowhere"], "no CLIP model nowhere"),
        (["--clip-weights", "nowhere"], "which is off"),
        (["--tiny-vae", "nowhere"], "which is off"),
        (["--clip-loss", "0.1", "--clip-model", "ViT-none", "--dry-run"], "open_clip has no model ViT-none"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_a_hint(prompt_file, tiny_teacher, tmp_path, flags, says):
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", "--batch", 2, "--steps", 1, *flags
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == 2 and len(lines) == 2 and says in lines[0], done.stderr
    assert not (tmp_path / "run").exists()


def test_its_weight_falls_to_nothing_along_the_run():
    assert [SMALL.clip_weight_at(step) for step in (1, 2, 4)] == pytest.approx([0.6, 0.4, 0])
