"""Loads ControlNets: by name, folder or Hub id, checked against the model that they are to steer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel

from sbrush.console import SbrushError, printable
from sbrush.models.checks import check_configuration, read_network, untrained_network
from sbrush.models.configurations import CONTROL
from sbrush.models.control_source import local_control
from sbrush.models.hub import fetch_network
from sbrush.models.model import Model
from sbrush.models.parts import DIFFUSERS, digest_of, network_files, refuse_pointer, weights_files

FITTING = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
"""Settings in which a ControlNet and the UNet beside it must agree."""


def find_control(source: str) -> Path:
    """The folder of a ControlNet: one that comes with sbrush, a folder that is here, or a Hub id, which is fetched."""
    return local_control(source) or fetch_network(source)


def load_control(source: str, model: Model, *, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """A frozen ControlNet on the device of the model that it is to steer; `source` as find_control takes it.

    SbrushError if there is none, if its files are damaged, or if it was made for another model.
    """
    folder, shown = find_control(source), printable(source)
    if not (folder / "config.json").is_file() or not weights_files(folder, DIFFUSERS):
        raise SbrushError(
            f"{shown} is no ControlNet: it lacks config.json or {DIFFUSERS}.safetensors",
            "give a folder that ControlNetModel.save_pretrained wrote, with safetensors",
            code=2,
        )
    try:
        for file in network_files(folder, DIFFUSERS):
            refuse_pointer(file)
        check_configuration(folder / "config.json", CONTROL, "ControlNetModel", shown)
        network: ControlNetModel = read_network(ControlNetModel, folder, torch_dtype=dtype)
    except SbrushError:
        raise
    except Exception as problem:  # whatever diffusers or safetensors make of a damaged file
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(
            f"cannot load the ControlNet {shown}: {printable(first_line)}",
            "the folder may be damaged or half copied; fetch or export it again",
        ) from problem
    check_control(network, model, source)
    return network.to(model.device).requires_grad_(False).eval()


def control_shapes(source: str, model: Model) -> ControlNetModel:
    """A ControlNet that has shapes and no numbers, as its configuration describes it; SbrushError as load_control."""
    folder = local_control(source) or fetch_network(source, weights=False)
    check_configuration(folder / "config.json", CONTROL, "ControlNetModel", printable(source))
    with torch.device("meta"):
        network: ControlNetModel = untrained_network(ControlNetModel, folder)
    check_control(network, model, source)
    return network


def check_control(network: ControlNetModel, model: Model, source: str) -> None:
    """SbrushError if a ControlNet was made for another model than this, or sees other images."""
    for name in FITTING:
        theirs, own = (_plain(getattr(config, name, None)) for config in (network.config, model.unet.config))
        if theirs != own:
            raise SbrushError(
                f"the ControlNet {printable(source)} does not fit {printable(model.name)}: its {name} is "
                f"{printable(theirs)}, that of the UNet {printable(own)}",
                "take one that was trained for the same base: ControlNets of Stable Diffusion 1.5, 2.1 and XL differ",
                code=2,
            )
    scale = 2 ** (len(network.config.conditioning_embedding_out_channels) - 1)
    pixels = model.image_size[0] // model.latent_shape[1]
    if scale != pixels:
        raise SbrushError(
            f"the ControlNet {printable(source)} does not fit {printable(model.name)}: it takes {scale} pixels of a "
            f"control image for one of a latent, the model {pixels}",
            "take one that was trained for the same base",
            code=2,
        )


def digest_of_control(source: str) -> str:
    """SHA-256, in hexadecimal, over a ControlNet's configuration and weights."""
    return digest_of({file.name: file for file in network_files(find_control(source), DIFFUSERS)})


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
