"""A tiny Stable Diffusion folder with random weights, and a way to run the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from launch import Done, forget_accelerate, launch

settings.register_profile("here", deadline=None, derandomize=True, max_examples=50)  # the same on any machine
settings.load_profile("here")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compare with what a CPU computes; where there is a GPU, "auto" would be that. CUDA_VISIBLE_DEVICES=0 shows it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def build_tiny_teacher(folder: Path, *, prediction: str = "epsilon", seed: int = 0) -> Path:
    """32 x 32 images, 4 x 16 x 16 latents, a few thousand parameters."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sbrush.models.model import Model
    from sbrush.stickers.networks import build_tokenizer
    from sbrush.storage.files import write_json

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    ).save_pretrained(folder / "vae")  # fmt: skip
    # What Stable Diffusion's own folders carry: steps_offset 1, "leading" spacing, alpha_0 at the end.
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        steps_offset=1, set_alpha_to_one=False, clip_sample=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    write_json(folder / "model_index.json", Model.student_index())
    return folder


def build_tiny_xl(folder: Path, *, seed: int = 0) -> Path:
    """The same in Stable Diffusion XL's format: two text encoders of widths 16 and 24, a pooled embedding, sizes."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    from sbrush.models.sdxl import ModelXL
    from sbrush.storage.files import write_json

    build_tiny_teacher(folder, seed=seed)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=20, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder_2")  # fmt: skip
    torch.manual_seed(seed)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=40, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
    ).save_pretrained(folder / "unet")  # fmt: skip
    write_json(folder / "model_index.json", ModelXL.student_index())
    return folder


def build_clip(folder: Path) -> Path:
    """A tiny model in open_clip's own layout, with the true tokenizer."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from sbrush.storage.files import write_json

    torch.manual_seed(0)
    config = {
        "embed_dim": 16, "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_xl(tmp_path_factory.mktemp("tiny-xl"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_teacher(tmp_path_factory.mktemp("tiny-teacher"))


@pytest.fixture(scope="session")
def tiny_stickers(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A tiny teacher of 64 x 64 images, as the built-in world's protocol takes them."""
    from sbrush.storage.files import write_json

    folder = shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("tiny-stickers") / "teacher")
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "unet" / "config.json", config | {"sample_size": 32})
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat\na red dog\n\na fish\na cat\na blue car on a mint background\n", encoding="utf-8")
    return file


# They start first, so that none is left to one of several workers at the end.
# A process that has played with fake tensors believes in a GPU; its next backward then starts autograd's threads for
# it, after which no forked process may use autograd. So what forks comes before all else.
FORKING = (
    "test_two_processes_make_the_student_of_one_and_one_can_go_on", "test_gradients_of_two_processes_are_those_of_one",
    "test_a_killed_process_ends_the_run_and_leaves_a_checkpoint", "test_a_sweep_and_two_processes",
    "test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all",
    "test_two_runs_in_one_folder_the_second_is_refused", "test_kills_change_nothing",
)  # fmt: skip
LONGEST = (
    "test_a_short_healthy_run_is_silent", "test_kills_change_nothing",
    "test_a_student_shared_out_is_the_same_and_goes_on_in_one_piece",
    "test_a_process_that_is_killed_under_torchrun_ends_the_run",
    "test_compiled_roles_stay_who_they_are_and_are_compiled_once", "test_metrics_are_those_of_the_rows",
    "test_a_home_that_cannot_be_written_to_is_not_needed", "test_faults.py::test_distill",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def late(item: pytest.Item) -> tuple[bool, bool]:
        name = item.nodeid.split("[")[0]
        return not name.endswith(FORKING), not name.endswith(LONGEST)

    items.sort(key=late)


@pytest.fixture
def true_curves() -> None:
    """For a test of a run's curves.png, which is one pixel in other tests."""


@pytest.fixture(autouse=True)
def without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib takes as long for one curves.png as a tiny run for its steps: it is written, and not drawn."""

    def write(log: object, path: Path) -> None:
        from PIL import Image

        from sbrush.storage.files import atomic_write

        with atomic_write(path) as partial:
            Image.new("RGB", (1, 1)).save(partial, "PNG")

    run = sys.modules.get("sbrush.training.run")
    if run and "true_curves" not in request.fixturenames:
        monkeypatch.setattr(run, "draw_curves", write)


@pytest.fixture(autouse=True)
def without_accelerate_state() -> None:
    """No test finds the precision and device that another asked accelerate for, whatever their order."""
    forget_accelerate()


def sbrush(*arguments: object, processes: int = 1, **environment: str) -> Done:
    """`sbrush ARGUMENTS` in this process: no imports to wait for. Where the process itself matters: `process`.

    Text is encoded and decoded again, as by a pipe, in UTF-8 or PYTHONIOENCODING; bytes that are no text come back as
    lone surrogates. Signal handlers and the environment are put back.

    With several `processes` it runs in so many, forked from this one as torchrun would start them: what comes back is
    the highest code, and what all of them wrote, the first one's first.
    """
    from sbrush.cli.app import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sbrush", *map(str, arguments)])
        if processes > 1:
            done = launch(main, processes, **environment)
            out, err = ("".join(getattr(one, stream) for one in done) for stream in ("stdout", "stderr"))
            return Done(max((one.returncode for one in done), key=abs), out, err)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        for name, value in environment.items():
            patch.setenv(name, value)
        forget_accelerate()
        try:
            main()
            code: object = 0
        except SystemExit as left:
            code = left.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            forget_accelerate()
    out, err = (stream.buffer.getvalue().decode(encoding, "surrogateescape") for stream in streams)  # type: ignore[attr-defined]
    return Done(int(code or 0), out, err)  # type: ignore[call-overload]


def process(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sbrush ARGUMENTS` as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "sbrush", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, encoding="utf-8",
    )  # fmt: skip
