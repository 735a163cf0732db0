"""Models in, students out: loading, refusing, the LoRA on the shared base, the folder that plain diffusers loads."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import build_tiny_teacher
from sbrush.console import SbrushError
from sbrush.models.card import about_student, model_card
from sbrush.models.export import export_student
from sbrush.models.format_cards import lora_card
from sbrush.models.ladder import Sampling
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.unet import add_lora, attend_explicitly, lora_parameters, set_role
from sbrush.sampling import generation
from sbrush.training.recipes import RECIPES

ABOUT = {
    "version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
    "prompts": {"count": 3, "sha256": "0"},
}  # fmt: skip


def exported(teacher, folder, t_init=None):
    export_student(
        folder, teacher, teacher.unet, about=ABOUT, scheduler=Sampling().scheduler(teacher.scheduler, t_init)
    )
    return folder


@pytest.mark.parametrize("half", [False, True])  # of half a teacher's weights, as most folders on the Hub have them
@pytest.mark.parametrize("t_init", [None, 750, 1])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_student_folder_gives_the_same_image_in_plain_diffusers(tmp_path, prediction, t_init, half):
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    source = build_tiny_teacher(tmp_path / "teacher", prediction=prediction)
    if half:
        for kind, part in ((CLIPTextModel, "text_encoder"), (AutoencoderKL, "vae")):
            kind.from_pretrained(source / part).half().save_pretrained(source / part)
    teacher = load_teacher(str(source))
    folder = exported(teacher, tmp_path / "student", t_init)
    for file in folder.rglob("*.safetensors"):  # plain diffusers takes each part in its own number format
        assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {torch.float32}, file
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a red cat",
        num_inference_steps=1,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    (ours,) = generation.student_images(load_student(str(folder)), ["a red cat"], [5])
    difference = (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours[0].float()).abs()
    assert difference.max() <= 1
    assert ours.float().std() > 5  # not a flat image, which would agree with anything


def test_the_teachers_own_scheduler_would_not_do(tmp_path, tiny_teacher):
    from diffusers import StableDiffusionPipeline

    folder = exported(load_teacher(str(tiny_teacher)), tmp_path / "student")
    shutil.copytree(tiny_teacher / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a cat", num_inference_steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(5), output_type="np"
    ).images[0]
    (ours,) = generation.student_images(load_student(str(folder)), ["a cat"], [5])
    assert (torch.from_numpy(theirs * 255).permute(2, 0, 1) - ours[0].float()).abs().max() > 5


def test_a_student_folder_states_what_it_is(tmp_path, tiny_teacher):
    folder = exported(load_teacher(str(tiny_teacher)), tmp_path / "student")
    about = json.loads((folder / "sbrush.json").read_text())
    assert about["format"] == 1 and about["teacher"] == "tiny"
    card = (folder / "README.md").read_text()
    assert "library_name" in card and "license" in card and "num_inference_steps=1" in card
    assert not list(folder.rglob("*.bin")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["tiny_teacher", "tiny_xl"])
def test_the_lines_in_a_card_run(tmp_path, request, kind, monkeypatch):
    folder = exported(load_teacher(str(request.getfixturevalue(kind))), tmp_path / "student")
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("path/to/this/folder", str(folder)), {})
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (32, 32)


def test_a_card_states_the_licence_of_all_that_a_student_was_made_of(tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    own = {"license": "other", "license_name": "sai-nc", "license_link": "https://x.y", "safety_checker": True}
    guide, init = (dataclasses.replace(teacher, about=about) for about in (own, {"license": "cc-by-nc-4.0"}))
    recipe = dataclasses.asdict(RECIPES["swiftbrush"])
    config = {
        "teacher": "t",
        "seed": 0,
        "sampling": {"steps": 1},
        "prompts": {"count": 1, "sha256": "0"},
        "init": "runs/first",
    }
    alone = dataclasses.replace(guide, about=about_student(config, recipe, guide))
    card = model_card(alone)
    assert 'license: "other"\nlicense_name: "sai-nc"\nlicense_link: "https://x.y"' in card
    assert "sai-nc (https://x.y)" in card and "came with a safety checker" in card
    assert "sai-nc" in lora_card(alone) and "DDIMScheduler.from_pretrained" in lora_card(alone)
    card = model_card(dataclasses.replace(guide, about=about_student(config, recipe, guide, init)))
    assert 'license: "other"\n---' in card and "cc-by-nc-4.0; sai-nc" in card and "runs/first" in card


def test_a_folder_of_a_variant_alone_is_named(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(SbrushError, match="variant") as refused:
        load_teacher(str(folder))
    assert "rename it to diffusion_pytorch_model.safetensors" in refused.value.hint


def test_an_export_replaces_an_older_one_whole(tmp_path, tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    folder = exported(teacher, tmp_path / "student")
    (folder / "stale.txt").write_text("old")
    exported(teacher, folder)
    assert not (folder / "stale.txt").exists() and (folder / "unet").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_student_of_a_newer_format_is_refused(tmp_path, tiny_teacher):
    folder = exported(load_teacher(str(tiny_teacher)), tmp_path / "student")
    (folder / "sbrush.json").write_text(json.dumps(ABOUT | {"format": 2}))
    with pytest.raises(SbrushError, match="format 2"):
        load_student(str(folder))


def test_explicit_attention_is_the_same_function_and_left_to_small_images(tiny_teacher):
    model = load_teacher(str(tiny_teacher))
    x, t, conditioning = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), model.encode(["a cat", "a dog"])
    before = model.denoise(x, t, conditioning)
    fused = set(map(type, model.unet.attn_processors.values()))
    attend_explicitly(model.unet)
    assert torch.allclose(model.denoise(x, t, conditioning), before, atol=1e-5)
    assert set(map(type, model.unet.attn_processors.values())).isdisjoint(fused)
    large = load_teacher(str(tiny_teacher)).unet
    large.register_to_config(sample_size=64)
    attend_explicitly(large)
    assert set(map(type, large.attn_processors.values())) == fused


def test_lora_starts_as_no_change_and_alone_is_trainable(tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    x, t, conditioning = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), teacher.encode(["a cat", "a dog"])
    before = teacher.denoise(x, t, conditioning)
    parameters = add_lora(teacher.unet, "lora_teacher", rank=4, alpha=8, targets="to_q to_v", seed=0)
    assert torch.equal(teacher.denoise(x, t, conditioning), before)
    trainable = {name for name, p in teacher.unet.named_parameters() if p.requires_grad}
    assert trainable == set(lora_parameters(teacher.unet, "lora_teacher")) and len(parameters) == len(trainable) > 0
    assert all(".to_q." in name or ".to_v." in name for name in trainable)
    for parameter in parameters.values():
        parameter.data.normal_()
    assert not torch.allclose(teacher.denoise(x, t, conditioning), before, atol=1e-3)
    set_role(teacher.unet, "teacher")
    assert torch.equal(teacher.denoise(x, t, conditioning), before)  # the teacher is still there, in the same weights
    set_role(teacher.unet, "lora_teacher")
    assert {name for name, p in teacher.unet.named_parameters() if p.requires_grad} == trainable


def test_lora_on_all_layers_covers_convolutions_and_is_fixed_by_its_seed(tiny_teacher):
    one, two = load_teacher(str(tiny_teacher)), load_teacher(str(tiny_teacher))
    for model, seed in ((one, 1), (two, 1)):
        torch.manual_seed(99 if model is two else 5)
        add_lora(model.unet, "lora_teacher", rank=2, alpha=2, targets="all", seed=seed)
    a, b = lora_parameters(one.unet, "lora_teacher"), lora_parameters(two.unet, "lora_teacher")
    assert any("conv1" in name for name in a) and any("to_k" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_digest_knows_one_weight_from_another(tmp_path, tiny_teacher):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    assert digest(load_teacher(str(copy))) == digest(load_teacher(str(tiny_teacher)))
    other = build_tiny_teacher(tmp_path / "other", seed=1)
    assert digest(load_teacher(str(other))) != digest(load_teacher(str(tiny_teacher)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_schedule_that_ends_in_pure_noise_is_for_v_prediction_only(tmp_path, prediction):
    folder = build_tiny_teacher(tmp_path / "teacher", prediction=prediction)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    if prediction == "epsilon":
        with pytest.raises(SbrushError, match="ends in pure noise"):
            load_teacher(str(folder))
    else:
        (image,) = generation.student_images(load_student(str(folder)), ["a cat"], [5])
        assert image.float().std() > 5


def remove_part(folder):
    shutil.rmtree(folder / "vae")


def only_pickles(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def cut_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def break_config(folder):
    (folder / "unet" / "config.json").write_text("{")


def other_prediction(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_part, "has no vae/"),
        (only_pickles, "only pickled weights"),
        (cut_weights, "cannot load"),
        (break_config, "cannot load"),
        (other_prediction, "predicts sample"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(tmp_path, tiny_teacher, damage, said):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    damage(folder)
    with pytest.raises(SbrushError) as refusal:
        load_teacher(str(folder))
    assert said in str(refusal.value) and "\n" not in str(refusal.value) and refusal.value.hint


@pytest.mark.parametrize(
    ("source", "said"),
    [("no/such/folder", "no model folder"), ("nowhere", "no model folder"), ("../x y", "no model folder")],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(source, said):
    with pytest.raises(SbrushError, match=said):
        load_teacher(source)


def hub_error(name):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("what the Hub's client says")
    return kind("what the Hub's client says", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("source", "raised", "offline", "said", "hint"),
    [
        ("some/one", "LocalEntryNotFoundError", True, "HF_HUB_OFFLINE is set", "hf download some/one --include"),
        ("some/one", "LocalEntryNotFoundError", False, "does not answer", "'*.safetensors'"),
        ("some/one", "OfflineModeIsEnabled", True, "HF_HUB_OFFLINE is set", "local folder"),
        ("some/one", "GatedRepoError", False, "is gated", "accept its licence at https://huggingface.co/some/one"),
        ("some/one", "RepositoryNotFoundError", False, "has no some/one", "if it is private, `hf auth login`"),
        ("some/one", "DisabledRepoError", False, "cannot fetch some/one", "check the name"),
        ("stabilityai/stable-diffusion-2-1-base", "RepositoryNotFoundError", False, "cannot fetch", "sd2-community/"),
        ("stabilityai/stable-diffusion-2-1", "LocalEntryNotFoundError", True, "cannot fetch", "sd2-community/"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(monkeypatch, source, raised, offline, said, hint):
    import huggingface_hub

    def refuse(*_, **__):
        raise hub_error(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(SbrushError) as refusal:
        load_teacher(source)
    assert said in str(refusal.value) and hint in refusal.value.hint


@pytest.mark.parametrize(
    ("card", "checker", "said"),
    [
        ("---\nlicense: openrail++\n---\n# x\n", ["stable_diffusion", "Checker"], ("openrail++", "came with a safety")),
        ("no front matter", [None, None], ("not stated in its folder", "came without a safety checker")),
        ("---\nlicense: [broken\n---\n", None, ("not stated in its folder", "may have had a safety checker")),
        ("---\n- a list\n---\n", None, ("not stated in its folder", "may have had")),
    ],
)
def test_the_teachers_licence_and_safety_checker_are_carried_into_the_card(tmp_path, tiny_teacher, card, checker, said):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "README.md").write_text(card)
    index = json.loads((folder / "model_index.json").read_text())
    del index["safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index | ({"safety_checker": checker} if checker else {})))
    teacher = load_teacher(str(folder))
    text = model_card(dataclasses.replace(teacher, about=ABOUT | teacher.about))
    assert all(part in text for part in said)


def test_a_folder_of_an_unknown_family_is_refused_by_name(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(SbrushError, match="is a FluxPipeline") as refused:
        load_teacher(str(folder))
    assert "StableDiffusionXLPipeline" in refused.value.hint
