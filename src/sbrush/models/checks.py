"""Folders made elsewhere: what they say is checked before anything is built by it, then that all is there and fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from sbrush.console import SbrushError, printable
from sbrush.models.configurations import Table, check_fields, size_as_diffusers_reads
from sbrush.models.model import Model
from sbrush.models.parts import read_json
from sbrush.models.tokenizers import check_tokenizers

COUNTS = re.compile(r"(^|_)num_|layers|_channels|_(size|dim|heads)$")  # settings that count something


def check_index(index: Mapping[str, Any], parts: Mapping[str, tuple[str, str]], table: Table, name: str) -> None:
    """SbrushError if a model_index.json names a part of another class than `parts`, or what the table does not know."""
    where = f"{printable(name)}/model_index.json"
    for part, (library, kind) in parts.items():
        stated = index.get(part, [library, kind])
        if not (isinstance(stated, list) and len(stated) == 2 and all(isinstance(text, str) for text in stated)):
            raise SbrushError(f"{where} has no {part}", "take a whole text-to-image model", code=2)
        if stated[0] != library or (part != "scheduler" and stated[1].removesuffix("Fast") != kind):
            raise SbrushError(
                f"{where} says that its {part} is a {printable(stated[1])} of {printable(stated[0])}, not a {kind}",
                "sbrush distills Stable Diffusion 1.x, 2.x and XL, with CLIP's text encoders",
                code=2,
            )
    check_fields({key: value for key, value in index.items() if key not in parts}, table, where)


def check_configuration(file: Path, table: Table, kind: str, where: str) -> None:
    """SbrushError if a network's config.json is of another class than `kind`, or not as the table has it."""
    config = read_json(file)
    check_proportions(config, where)
    if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):  # text and images together
        config = config["text_config"]
        check_proportions(config, where)
    if config.get("_class_name", kind) != kind:
        raise SbrushError(
            f"{where} is a {printable(config['_class_name'])}, not a {kind}", "take the model's own part", code=2
        )
    check_fields(config, table, where)


def check_proportions(config: Mapping[str, Any], where: str) -> None:
    """SbrushError if a configuration holds numbers, lists or kinds that no such model has.

    A folder may come from anywhere: what it says is looked at before anything is built by it.
    """

    def refuse(what: str) -> SbrushError:
        return SbrushError(f"{where}: {what}", "the file may be damaged; fetch or export it again", code=2)

    if config.get("fast_tokenizer_files"):
        raise SbrushError(
            f"{where} names tokenizer files of several versions", "leave tokenizer.json and take the list out", code=2
        )
    if "quantization_config" in config:
        raise SbrushError(f"{where} is quantised", "take the model in 16 or 32 bits", code=2)
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if COUNTS.search(key) and any(isinstance(v, bool) for v in values):
            raise refuse(f"{printable(key)} is no number")
        numbers = [v for v in values if isinstance(v, int | float)]
        most = 1000 if "layers" in key else 1_000_000
        if len(values) > (100_000 if key == "trained_betas" else 100) or any(
            not abs(n) <= most for n in numbers if key not in ("model_max_length", "lambda_min_clipped")
        ):
            raise refuse(f"{printable(key)} is out of all proportion")


def read_network(kind: Any, folder: Path, **options: Any) -> Any:
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
    return _sized(network)


def untrained_network(kind: Any, folder: Path) -> Any:
    """The network that a folder's configuration describes, its weights not read."""
    if hasattr(kind, "load_config"):
        return _sized(kind.from_config(kind.load_config(folder, local_files_only=True)))
    return kind(kind.config_class.from_pretrained(folder, local_files_only=True))


def _sized(network: Any) -> Any:
    """A network whose configuration states the size that diffusers' pipeline draws at."""
    if isinstance(network, UNet2DConditionModel):
        network.register_to_config(sample_size=size_as_diffusers_reads(network.config))
    return network


def check_fit(model: Model) -> None:
    """SbrushError if a model's parts are not such that they can work together, its tokenizers among them."""
    if why := _network_misfit(model):
        raise SbrushError(
            f"{printable(model.name)}: {printable(why)}",
            "take all parts from one model, with the configurations that came with them",
            code=2,
        )
    check_tokenizers(model)
    guidance = model.about.get("guidance", 0)
    if not isinstance(guidance, int | float) or not 0 <= guidance < 1000:
        raise SbrushError(
            f"{printable(model.name)}/sbrush.json names a guidance scale of {printable(guidance)}",
            "0 to 1000, or none",
            code=2,
        )


def _network_misfit(model: Model) -> str | None:
    """Why the networks and the schedule do not go together; None if they do."""
    unet, vae = model.unet.config, model.vae.config
    alphas = model.scheduler.alphas_cumprod
    falling = bool((alphas >= 0).all() and (alphas <= 1).all() and (alphas.diff() <= 0).all())  # NaN is none of these
    if not falling or len(alphas) < 2:
        return "its noise schedule does not go from image to noise"
    if len(alphas) != model.scheduler.config.num_train_timesteps:
        return f"its noise schedule has {len(alphas)} steps, its scheduler {model.scheduler.config.num_train_timesteps}"
    size = unet.sample_size if isinstance(unet.sample_size, list | tuple) else [unet.sample_size] * 2
    if len(size) != 2 or not all(isinstance(n, int) and 0 < n <= 1024 for n in (unet.in_channels, *size)):
        return f"its UNet does not say of what size its latents are (sample_size {unet.sample_size})"
    if unet.in_channels != vae.latent_channels or unet.out_channels != unet.in_channels:
        return (
            f"its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, "
            f"its autoencoder's latents have {vae.latent_channels}"
        )
    if not isinstance(vae.scaling_factor, int | float) or not 0 < vae.scaling_factor < 1000:
        return f"its autoencoder has a scaling factor of {vae.scaling_factor}"
    if (vae.latents_mean is None) != (vae.latents_std is None):
        return "its autoencoder has one of latents_mean and latents_std without the other"
    for numbers in (vae.latents_mean, vae.latents_std):
        if numbers is not None and len(numbers) != vae.latent_channels:
            return f"its autoencoder has {len(numbers)} means or deviations for {vae.latent_channels} channels"
    width = sum(encoder.config.hidden_size for _, encoder in model.text_parts)
    taken = unet.cross_attention_dim
    if set(taken if isinstance(taken, list | tuple) else [taken]) != {width}:
        return f"its UNet takes text embeddings of width {taken}, its text encoders make {width}"
    if unet.addition_embed_type == "text_time":
        pooled = 6 * (unet.addition_time_embed_dim or 0) + model.text_parts[-1][1].config.projection_dim
        if unet.projection_class_embeddings_input_dim != pooled:
            return f"its UNet takes {unet.projection_class_embeddings_input_dim} values of size and text, not {pooled}"
    return None
