"""Loads VAEs that decode instead of a student's own, checked against the student."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging

from sbrush.console import SbrushError, printable
from sbrush.models.checks import check_configuration, read_network, untrained_network
from sbrush.models.configurations import TABLES, TINY_VAE
from sbrush.models.hub import fetch_network
from sbrush.models.model import Model
from sbrush.models.parts import DIFFUSERS, digest_of, network_files
from sbrush.models.vae_source import BUILT_IN_TINY, HINT, KINDS, PUBLISHED, TINY, Decoder, check_vae_folder, local_vae

Vae: TypeAlias = AutoencoderKL | AutoencoderTiny
CLASSES = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}


def with_vae(model: Model, source: str | None) -> Model:
    """The model, decoding with another VAE: "tiny", a folder or a Hub id. None gives it back as it is.

    Its own VAE encodes still, where an image starts from another one. SbrushError if there is no such VAE, if its files
    are damaged, or if it was made for other latents.
    """
    if source is None:
        return model
    name, folder = find_vae(source, model)
    network = read_vae(folder, model, dtype=model.vae.dtype).to(model.vae.device)
    sha256 = digest_of({file.name: file for file in network_files(folder, DIFFUSERS)})[:16]
    return replace(model, decoder=Decoder(name, sha256, network.requires_grad_(False).eval()))


def find_vae(source: str, model: Model) -> tuple[str, Path]:
    """Its name, and its folder; "tiny" is the built-in one or the published one of the model's latents.

    SbrushError if it cannot be had, or is known to be of other latents: the files of TAESD do not say which.
    """
    if folder := local_vae(source):
        return source, folder
    own = PUBLISHED[model.pipeline]
    if source == TINY:
        if model.about.get("world") == "stickers":
            return TINY, BUILT_IN_TINY
        source = own
    elif source in PUBLISHED.values() and source != own:
        raise SbrushError(
            f"{source} is not for the latents of {printable(model.name)}", f"--vae tiny takes {own}", code=2
        )
    folder = fetch_network(source)
    check_vae_folder(folder)
    return source, folder


def read_vae(
    folder: Path,
    model: Model,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    hint: str = HINT,
) -> Vae:
    """The VAE in a folder, of a class in `kinds`; without `weights` it has shapes and no numbers (device "meta").

    SbrushError if there is none, if its files are damaged, or if it does not go with the model's latents.
    """
    shown = printable(folder)
    if not (folder / "config.json").is_file():
        raise SbrushError(f"{shown} holds no VAE", hint, code=2)
    found = check_vae_folder(folder, weights=weights)
    kind = found if found in kinds else kinds[0]
    table = TINY_VAE if kind == "AutoencoderTiny" else TABLES[model.pipeline]["vae"]
    try:
        check_configuration(folder / "config.json", table, kind, shown)
        if weights:
            with _quietly():
                vae: Vae = read_network(CLASSES[kind], folder, torch_dtype=dtype)
        else:
            with _quietly(), torch.device("meta"):
                vae = untrained_network(CLASSES[kind], folder)
    except SbrushError:
        raise
    except Exception as problem:  # whatever diffusers or safetensors make of a damaged file
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(f"cannot load the {KINDS[kind]} {shown}: {printable(first_line)}", hint) from problem
    _check_fit(vae, model, shown)
    return vae


@contextmanager
def _quietly() -> Iterator[None]:
    """diffusers warns of a setting that it writes itself into every AutoencoderTiny's configuration."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_fit(vae: Vae, model: Model, shown: str) -> None:
    """SbrushError if a VAE was made for other latents than the model's."""
    config, own = vae.config, model.vae.config
    tiny = isinstance(vae, AutoencoderTiny)
    blocks = config.decoder_block_out_channels if tiny else config.block_out_channels
    scale = (config.upsampling_scaling_factor if tiny else 2) ** (len(blocks) - 1)
    latents, pixels = model.latent_shape, model.image_size[0] // model.latent_shape[1]
    hint = f"take one that was made for this family of models; --vae tiny is {PUBLISHED[model.pipeline]} for it"
    if model.about.get("world") == "stickers":
        hint = "the built-in world's own is --vae tiny"
    if (config.latent_channels, scale) != (latents[0], pixels):
        raise SbrushError(
            f"{shown} turns latents of {config.latent_channels} channels into images {scale} times as wide; those of "
            f"{printable(model.name)} have {latents[0]} and become {pixels} times as wide",
            hint,
            code=2,
        )
    factors = (own.scaling_factor, 1.0) if tiny else (own.scaling_factor,)
    if not any(math.isclose(config.scaling_factor, factor) for factor in factors):
        expected = " or ".join(f"{factor:g}" for factor in factors)
        raise SbrushError(
            f"{shown} has a scaling factor of {config.scaling_factor:g}; with the latents of {printable(model.name)} "
            f"goes {expected}",
            hint,
            code=2,
        )
    statistics = [[getattr(one, name, None) for name in ("latents_mean", "latents_std")] for one in (config, own)]
    if not tiny and statistics[0] != statistics[1]:
        raise SbrushError(f"{shown} has other latents_mean and latents_std than {printable(model.name)}", hint, code=2)
