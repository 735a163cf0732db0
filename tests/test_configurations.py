"""Every field of a model's configurations has a rule; what is accepted draws what diffusers' own pipeline draws."""

import inspect
import json
import random
import shutil
import warnings

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sbrush.console import SbrushError
from sbrush.models import configurations as tables
from sbrush.models.load import load_shapes, load_student, load_teacher
from sbrush.models.model import Model
from sbrush.models.schedule import read_scheduler, scheduler_class
from sbrush.models.sdxl import ModelXL
from sbrush.sampling.generation import student_images, teacher_images
from test_models import exported

PARTS = {
    "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}  # fmt: skip


def fields(kind):
    """Those of a class's own signature."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}


def scheduler_fields():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    kinds = [kind for name in names if (kind := scheduler_class({"_class_name": name}))]
    assert len(kinds) > 15
    return set().union(*map(fields, kinds))


PIPELINES = {
    "StableDiffusionPipeline": diffusers.StableDiffusionPipeline,
    "StableDiffusionXLPipeline": diffusers.StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_tables_know_every_field_that_diffusers_and_transformers_have(pipeline):
    """Fails when one of them gains a field: it must be honoured, shown to be without effect, or refused."""
    known = tables.TABLES[pipeline]
    family = {"StableDiffusionPipeline": Model, "StableDiffusionXLPipeline": ModelXL}[pipeline]
    assert fields(UNet2DConditionModel) <= known["unet"].keys()
    assert fields(AutoencoderKL) <= known["vae"].keys()
    assert scheduler_fields() <= known["scheduler"].keys()
    for part in (part for part in known if part.startswith("text_encoder")):
        assert set(CLIPTextConfig().to_dict()) <= known[part].keys()
    assert fields(PIPELINES[pipeline].__init__) <= {*known["index"], *family.parts}


def test_the_table_of_tiny_autoencoders_is_whole():
    assert fields(AutoencoderTiny) <= tables.TINY_VAE.keys()


# What the published folders say, which must go on being accepted.
PUBLISHED = {
    "unet": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "freq_shift": 0},
    "vae": {"_class_name": "AutoencoderKL", "_name_or_path": "../sdxl-vae/", "force_upcast": True, "sample_size": 1024},
    "text_encoder": {
        "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
        "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "initializer_factor": 1.0, "pad_token_id": 1,
        "model_type": "clip_text_model", "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
    },
    "scheduler": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1,
        "skip_prk_steps": True, "trained_betas": None, "clip_sample": False, "use_karras_sigmas": False,
        "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
    },
    "index": {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "requires_safety_checker": True,
        "feature_extractor": ["transformers", "CLIPImageProcessor"], "force_zeros_for_empty_prompt": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    },
}  # fmt: skip


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("part", PUBLISHED)
def test_what_published_folders_say_is_accepted(pipeline, part):
    tables.check_fields(PUBLISHED[part], tables.TABLES[pipeline][part], "it")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rebuilt(folder, part, **changes):
    """A part of a folder with another configuration, and weights for it."""
    kind = PARTS[part]
    torch.manual_seed(1)
    if part.startswith("text"):
        network = kind(CLIPTextConfig(**(CLIPTextConfig.from_pretrained(folder / part).to_dict() | changes)))
    else:
        network = kind.from_config({**kind.load_config(folder / part), **changes})
    for name, parameter in network.named_parameters():  # norms and biases too, which begin without effect
        parameter.data += 0.1 * torch.randn(parameter.shape) * (1 if "norm" in name or "bias" in name else 0)
    network.save_pretrained(folder / part)


@pytest.mark.parametrize(
    ("tiny", "file", "change"),
    [
        ("tiny_teacher", "unet", {"time_cond_proj_dim": 8}),
        ("tiny_teacher", "unet", {"num_class_embeds": 3}),
        ("tiny_teacher", "unet", {"class_embed_type": "timestep"}),
        ("tiny_teacher", "unet", {"class_embeddings_concat": True}),
        ("tiny_teacher", "unet", {"addition_embed_type": "text"}),
        ("tiny_teacher", "unet", {"addition_embed_type": "text_time"}),
        ("tiny_xl", "unet", {"addition_embed_type": None}),
        ("tiny_teacher", "unet", {"encoder_hid_dim": 16}),
        ("tiny_teacher", "unet", {"encoder_hid_dim_type": "text_proj"}),
        ("tiny_teacher", "unet", {"attention_type": "gated"}),
        ("tiny_teacher", "unet", {"time_embedding_type": "fourier"}),
        ("tiny_teacher", "unet", {"num_attention_heads": 2}),
        ("tiny_teacher", "unet", {"dual_cross_attention": True}),
        ("tiny_teacher", "unet", {"dropout": 0.1}),
        ("tiny_teacher", "unet", {"a_field_of_tomorrow": 1}),
        ("tiny_teacher", "vae", {"shift_factor": 0.1}),
        ("tiny_teacher", "vae", {"latents_mean": [0.1] * 4}),
        ("tiny_teacher", "vae", {"in_channels": 4}),
        ("tiny_teacher", "text_encoder", {"architectures": ["T5EncoderModel"]}),
        ("tiny_teacher", "text_encoder", {"model_type": "bert"}),
        ("tiny_teacher", "text_encoder", {"return_dict": False}),
        ("tiny_xl", "text_encoder_2", {"torchscript": True}),
        ("tiny_teacher", "scheduler", {"beta_schedule": "sigmoid"}),
        ("tiny_teacher", "scheduler", {"thresholding": True}),
        ("tiny_teacher", "scheduler", {"use_flow_sigmas": True}),
        ("tiny_teacher", "scheduler", {"timestep_type": "continuous"}),
        ("tiny_xl", "scheduler", {"clip_sample": True}),
        ("tiny_teacher", "index", {"requires_aesthetics_score": True}),
        ("tiny_xl", "index", {"add_watermarker": True}),
        ("tiny_teacher", "index", {"clip_skip": 2}),
        ("tiny_teacher", "index", {"vae": ["diffusers", "AutoencoderTiny"]}),
        ("tiny_teacher", "index", {"tokenizer": ["transformers", "T5Tokenizer"]}),
        ("tiny_teacher", "index", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}),
        ("tiny_teacher", "index", {"text_encoder": [None, None]}),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else value,
)  # fmt: skip
def test_what_would_be_passed_over_is_refused_by_name(tmp_path, request, tiny, file, change):
    folder = shutil.copytree(request.getfixturevalue(tiny), tmp_path / "teacher")
    names = {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    edit(folder / names.get(file, f"{file}/config.json"), **change)
    may_be_a_student = "time_cond_proj_dim" in change  # of a latent consistency model
    for load in (load_teacher, load_shapes, *(() if may_be_a_student else (load_student,))):  # before anything is built
        with pytest.raises(SbrushError) as refused:
            load(str(folder))
        assert next(iter(change)) in str(refused.value) and refused.value.code == 2
        assert "damaged" not in refused.value.hint


@pytest.mark.parametrize(
    ("tiny", "file", "change", "said"),
    [
        (
            "tiny_teacher",
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.001] * 700},
            "700 steps, its scheduler",
        ),
        ("tiny_xl", "vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean and latents_std without the other"),
        ("tiny_xl", "vae/config.json", {"latents_mean": [0.1] * 3, "latents_std": [1.0] * 4}, "3 means or deviations"),
        ("tiny_teacher", "vae/config.json", {"scaling_factor": None}, "scaling factor of None"),
        ("tiny_teacher", "unet/config.json", {"sample_size": None}, "of what size its latents are"),
        (
            "tiny_teacher",
            "tokenizer/tokenizer_config.json",
            {"fast_tokenizer_files": ["tokenizer.4.json"]},
            "tokenizer",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_not_called_damaged(tmp_path, request, tiny, file, change, said):
    folder = shutil.copytree(request.getfixturevalue(tiny), tmp_path / "teacher")
    edit(folder / file, **change)
    with pytest.raises(SbrushError, match=said) as refused:
        load_teacher(str(folder))
    assert "half copied" not in refused.value.hint and refused.value.code == 2


def test_a_students_scheduler_that_leaves_noise_is_refused_and_a_teachers_is_replaced(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", final_sigmas_type="sigma_min")
    assert load_teacher(str(folder))
    with pytest.raises(SbrushError, match="final_sigmas_type"):
        load_student(str(folder))


def test_a_width_of_text_for_each_block_is_accepted_if_all_are_the_text_encoders(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "unet" / "config.json", cross_attention_dim=[16, 16])
    ours, theirs = (next(student_images(load_student(str(f)), ["a cat"], [1])) for f in (folder, tiny_teacher))
    assert torch.equal(ours, theirs)


def test_a_field_that_is_not_known_but_null_turns_nothing_on(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "unet" / "config.json", a_field_of_tomorrow=None)
    assert load_shapes(str(folder))


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_a_scheduler_whose_own_default_is_not_accepted_is_refused_by_name(tmp_path, tiny_teacher, name):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(SbrushError, match="snr_shift_scale"):
        load_teacher(str(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [{"trained_betas": [0.001] * 700}, {"rescale_betas_zero_snr": True}, {}])
def test_the_noise_schedule_is_that_of_every_class_that_is_accepted(change):
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")):
        kind = scheduler_class({"_class_name": name})
        if kind is None or name.startswith("CogVideoX") or not change.keys() <= fields(kind):
            continue
        if name == "RePaintScheduler" and change:  # which cannot read its own configuration from a file
            continue
        config = {"_class_name": name, "num_train_timesteps": len(change.get("trained_betas", range(1000)))} | change
        ours, theirs = read_scheduler(config, "it"), kind.from_config(config)
        # Some take 2^-24 for the zero at the end.
        assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, atol=1e-7), name


def test_the_schedulers_class_is_the_indexs_as_in_diffusers(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler", timestep_spacing="trailing")
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert load_student(str(folder)).noise_scale == pytest.approx(0.99767, abs=1e-4)


def test_an_sdxl_unet_for_other_sizes_or_text_is_refused_at_loading(tmp_path, tiny_xl):
    folder = shutil.copytree(tiny_xl, tmp_path / "teacher")
    rebuilt(folder, "unet", projection_class_embeddings_input_dim=5 * 8 + 20)  # a refiner's, with five numbers
    with pytest.raises(SbrushError, match="takes 60 values of size and text, not 68"):
        load_teacher(str(folder))


# Other values for what is honoured, each for a tiny network of two levels. None: held fixed in these folders, for it
# must fit the other parts or the weights' shapes are checked elsewhere.
UNETS = {
    "sample_size": [8, 16, [8, 16]],
    "center_input_sample": [True], "flip_sin_to_cos": [False], "freq_shift": [1], "block_out_channels": [[8, 24]],
    "down_block_types": [["CrossAttnDownBlock2D", "DownBlock2D"], ["AttnDownBlock2D", "CrossAttnDownBlock2D"]],
    "up_block_types": [["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], ["CrossAttnUpBlock2D", "AttnUpBlock2D"]],
    "mid_block_type": [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"], "only_cross_attention": [True],
    "layers_per_block": [2, [1, 2]], "downsample_padding": [0], "mid_block_scale_factor": [1.5],
    "act_fn": ["gelu", "mish"], "norm_num_groups": [2, 8], "norm_eps": [1e-3],
    "transformer_layers_per_block": [2, [1, 2]], "reverse_transformer_layers_per_block": [[1, 2]],
    "attention_head_dim": [4, [2, 4]], "use_linear_projection": [True],
    "upcast_attention": [True], "resnet_time_scale_shift": ["scale_shift"], "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [1.5], "time_embedding_dim": [24], "time_embedding_act_fn": ["silu"],
    "timestep_post_act": ["silu"], "conv_in_kernel": [1], "conv_out_kernel": [1],
    "mid_block_only_cross_attention": [True], "cross_attention_norm": ["layer_norm"],
    "in_channels": None, "out_channels": None, "cross_attention_dim": None,
    "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None,
}  # fmt: skip
VAES = {
    "scaling_factor": [0.13025, 1.7], "layers_per_block": [2], "act_fn": ["gelu"], "norm_num_groups": [2],
    "block_out_channels": [[8, 16]], "use_quant_conv": [False], "use_post_quant_conv": [False],
    "mid_block_add_attention": [False], "latents_mean": [[0.3, -0.2, 0.1, 0.5]], "latents_std": [[0.5, 2.0, 1.0, 3.0]],
    "force_upcast": [False, True], "down_block_types": None, "up_block_types": None, "latent_channels": None,
}  # fmt: skip
TEXTS = {
    "intermediate_size": [48], "num_hidden_layers": [2, 3], "num_attention_heads": [4], "hidden_act": ["gelu"],
    "layer_norm_eps": [1e-3], "use_attention_mask": [True],
    "vocab_size": None, "hidden_size": None, "max_position_embeddings": None, "projection_dim": None,
}  # fmt: skip
SCHEDULERS = {
    "num_train_timesteps": [500], "beta_start": [0.001], "beta_end": [0.02], "trained_betas": [[0.001] * 700],
    "prediction_type": ["v_prediction"], "rescale_betas_zero_snr": [True],
}  # fmt: skip
IRRELEVANT = {
    "unet": {"addition_embed_type_num_heads": 2, "decay": 0.9999, "power": 0.6},
    "vae": {"sample_size": 8},
    "text_encoder": {"attention_dropout": 0.5, "output_attentions": True, "initializer_range": 3.0, "temperature": 2.0},
    "scheduler": {
        "set_alpha_to_one": True, "clip_sample_range": 0.1, "use_karras_sigmas": True, "solver_order": 3,
        "timestep_spacing": "linspace", "original_inference_steps": 20,
    },
    "index": {"safety_checker": [None, None], "requires_safety_checker": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "values"),
    [(tables.UNET_XL, UNETS), (tables.VAE_XL, VAES), (tables.TEXT, TEXTS), (tables.SCHEDULER, SCHEDULERS)],
)
def test_the_random_draw_goes_over_all_that_is_honoured(table, values):
    assert {name for name, rule in table.items() if rule is tables.HONOURED} == values.keys()


def drawn(chance, values, count):
    """So many fields with another value each."""
    free = [name for name, choices in values.items() if choices]
    return {name: chance.choice(values[name]) for name in chance.sample(free, min(count, len(free)))}


def draw_folder(folder, chance, *, xl):
    """Changes a folder's configurations at random, with weights for them; what was changed."""
    changes = {"unet": drawn(chance, UNETS, chance.randrange(5)), "vae": drawn(chance, VAES, 2)}
    for part in ("text_encoder", "text_encoder_2")[: 1 + xl]:
        changes[part] = drawn(chance, TEXTS, 2)
    changes["scheduler"] = drawn(chance, SCHEDULERS, 1)
    unet, vae = changes["unet"], changes["vae"]
    if not xl or ("latents_mean" in vae) != ("latents_std" in vae):
        if xl:
            vae |= {"latents_mean": VAES["latents_mean"][0], "latents_std": VAES["latents_std"][0]}
        else:
            vae.pop("latents_mean", None), vae.pop("latents_std", None)
    if xl and isinstance(unet.get("sample_size"), list):
        unet["sample_size"] = 8  # diffusers' pipeline for XL takes squares alone
    if "reverse_transformer_layers_per_block" in unet:
        unet["transformer_layers_per_block"] = [2, 1]
    if "trained_betas" in changes["scheduler"]:
        changes["scheduler"]["num_train_timesteps"] = len(SCHEDULERS["trained_betas"][0])
    if changes["scheduler"].get("rescale_betas_zero_snr"):
        changes["scheduler"]["prediction_type"] = "v_prediction"
    if xl and changes["text_encoder_2"].get("num_hidden_layers") is None:
        changes["text_encoder_2"]["num_hidden_layers"] = 2
    for part, change in changes.items():
        if part == "scheduler":
            edit(folder / part / "scheduler_config.json", **change, **IRRELEVANT[part])
        else:
            rebuilt(folder, part, **change)
            edit(folder / part / "config.json", **IRRELEVANT[part.removesuffix("_2")])
    if xl and chance.random() < 0.5:
        changes["index"] = {"force_zeros_for_empty_prompt": False}
    edit(folder / "model_index.json", **changes.get("index", {}), **IRRELEVANT["index"])
    return changes


def theirs(folder, kind, *, steps, guidance):
    """What diffusers' own pipeline draws, its sampler set to ours: DDIM from T on, to the image."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    own = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **own)
    made = pipe(
        "a red cat", num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    return torch.from_numpy(made.images[0] * 255).round().permute(2, 0, 1)


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about odd configurations
@pytest.mark.parametrize("number", range(16))
def test_a_folder_drawn_at_random_gives_the_image_of_diffusers_own_pipeline(tmp_path, tiny_teacher, tiny_xl, number):
    chance = random.Random(number)
    xl = number % 2 == 1
    folder = shutil.copytree(tiny_xl if xl else tiny_teacher, tmp_path / "teacher")
    changes = draw_folder(folder, chance, xl=xl)
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(folder, kind, steps=3, guidance=2.5)
        (ours,) = teacher_images(load_teacher(str(folder)), ["a red cat"], [5], steps=3, guidance=2.5)
        assert ours[0].shape == expected.shape, changes
        assert (ours[0] - expected).abs().max() <= 1, changes
        # And as a student that was exported from it, in one step.
        teacher = load_teacher(str(folder))
        exported(teacher, tmp_path / "student")
        expected = theirs(tmp_path / "student", kind, steps=1, guidance=1)
        (ours,) = student_images(load_student(str(tmp_path / "student")), ["a red cat"], [5])
        assert (ours[0] - expected).abs().max() <= 1, changes


def test_the_mean_and_deviation_of_latents_change_an_sdxl_image(tmp_path, tiny_xl):
    """So that the equality above is no accident."""
    folder = shutil.copytree(tiny_xl, tmp_path / "teacher")
    edit(folder / "vae" / "config.json", latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.5, 2.0, 1.0, 3.0])
    latents = torch.randn(2, 4, 16, 16)
    one, other = (load_teacher(str(path)).decode(latents).float() for path in (tiny_xl, folder))
    assert (one - other).abs().max() > 5


def test_the_clamped_clip_loss_decodes_as_images_are_decoded(tmp_path, tiny_xl, clip_folder):
    from sbrush.metrics.clip import ClipScorer
    from sbrush.training.alignment import Alignment
    from sbrush.training.request import AlignmentRequest

    folder = shutil.copytree(tiny_xl, tmp_path / "teacher")
    mean, std = [0.3, -0.2, 0.1, 0.5], [0.5, 2.0, 1.0, 3.0]
    edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    teacher, x0 = load_teacher(str(folder)), torch.randn(2, 4, 16, 16)
    latents = x0 * torch.tensor(std).view(1, 4, 1, 1) / 0.18215 + torch.tensor(mean).view(1, 4, 1, 1)
    with torch.no_grad():
        images = (teacher.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        expected = ClipScorer.load(clip_folder).cosines(images, ["a cat", "a dog"])
        ours = Alignment.load(teacher, AlignmentRequest(clip_folder), device="cpu").cosines(x0, ["a cat", "a dog"])
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_an_sdxl_autoencoder_that_overflows_decodes_in_float32(tmp_path, tiny_xl, upcast, dtype):
    folder = shutil.copytree(tiny_xl, tmp_path / "teacher")
    edit(folder / "vae" / "config.json", force_upcast=upcast)
    model = load_teacher(str(folder), dtype=torch.float16)
    model.decode(torch.randn(1, 4, 16, 16))
    assert model.vae.dtype == dtype


@pytest.mark.parametrize(
    ("version", "size", "drawn"),
    [("0.8.0", 16, 64), ("0.8.1.dev0", 32, 64), ("0.8.0", 96, 96), ("0.9.0.dev0", 16, 16), ("0.10.2", 16, 16)],
)
def test_a_unet_from_before_diffusers_0_9_draws_the_size_of_its_pipeline(tmp_path, tiny_teacher, version, size, drawn):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit(folder / "unet" / "config.json", _diffusers_version=version, sample_size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.config.sample_size == drawn
    for load in (load_teacher, load_shapes):
        assert load(str(folder)).latent_shape == (4, drawn, drawn)
    teacher = load_teacher(str(folder))
    exported(teacher, tmp_path / "student")
    assert load_student(str(tmp_path / "student")).latent_shape == (4, drawn, drawn)
