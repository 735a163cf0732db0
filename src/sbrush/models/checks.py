"""Folders from elsewhere: looked at before anything is built by them, read as safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, printable
from sbrush.models.model import Model

COUNTS = re.compile(r"(^|_)num_|layers|_channels|_(size|dim|heads)$")  # settings that count something


def check_part(folder: Path, part: str, parts: Iterable[str], *, weights: bool = True) -> None:
    """SbrushError if a model folder lacks a part, or holds its weights, if they are wanted, only as a pickle."""
    here = folder / part
    shown = printable(folder)
    if not here.is_dir():
        raise SbrushError(
            f"{shown} is no Stable Diffusion model: it has no {part}/",
            "a model folder has model_index.json and " + ", ".join(f"{p}/" for p in parts),
            code=2,
        )
    if part in ("tokenizer", "tokenizer_2", "scheduler") or not weights:
        return
    found = list(here.glob("*.safetensors"))
    if found and all(re.search(r"\.(fp16|bf16|non_ema)\.", file.name) for file in found):
        raise SbrushError(
            f"{shown}/{part} holds a variant of the weights alone, {printable(found[0].name)}",
            f"rename it to {printable(re.sub(r'[.](fp16|bf16|non_ema)[.]', '.', found[0].name))}, if it is to be read",
            code=2,
        )
    if not found:
        pickled = any(here.glob("*.bin")) or any(here.glob("*.ckpt"))
        raise SbrushError(
            f"{shown}/{part} holds {'only pickled weights' if pickled else 'no weights'}",
            "sbrush reads safetensors only: save the model again with safe_serialization=True"
            if pickled
            else f"it needs {part}/*.safetensors",
            code=2,
        )


def read_json(file: Path) -> dict[str, Any]:
    """A small JSON object; ValueError if it is none."""
    if file.stat().st_size > 2**20:
        raise ValueError(f"{file.parent.name}/{file.name} is larger than 1 MiB")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent.name}/{file.name} is no JSON object")
    return content


def check_configuration(folder: Path) -> None:
    """ValueError if a part's configuration files hold numbers, lists or kinds that no such model has.

    A folder may come from anywhere: what it says is looked at before anything is built by it.
    """
    for file in folder.glob("*config.json"):
        config = read_json(file)
        if "quantization_config" in config:
            raise ValueError(f"{folder.name} is quantised")
        for key, value in config.items():
            values = value if isinstance(value, list) else [value]
            if COUNTS.search(key) and any(isinstance(v, bool) for v in values):
                raise ValueError(f"{printable(key)} of {folder.name} is no number")
            numbers = [v for v in values if isinstance(v, int | float)]
            most = 1000 if "layers" in key else 1_000_000
            if len(values) > (100_000 if key == "trained_betas" else 100) or any(
                not abs(n) <= most for n in numbers if key != "model_max_length"
            ):
                raise ValueError(f"{printable(key)} of {folder.name} is out of all proportion")


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
    return network


def untrained_network(kind: Any, folder: Path) -> Any:
    """The network that a folder's configuration describes, its weights not read."""
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(folder, local_files_only=True))
    return kind(kind.config_class.from_pretrained(folder, local_files_only=True))


def check_fit(model: Model) -> None:
    """ValueError if a model's parts are not such that they can work together."""
    unet, vae = model.unet.config, model.vae.config
    alphas = model.scheduler.alphas_cumprod
    sizes = model.latent_shape
    falling = bool((alphas >= 0).all() and (alphas <= 1).all() and (alphas.diff() <= 0).all())  # NaN is none of these
    if not falling or len(alphas) < 2:
        raise ValueError("its noise schedule does not go from image to noise")
    if not all(isinstance(n, int) and 0 < n <= 1024 for n in sizes):
        raise ValueError(f"latents of {sizes} are none")
    if unet.in_channels != vae.latent_channels or unet.out_channels != unet.in_channels:
        raise ValueError(f"the UNet has {unet.in_channels} channels, the autoencoder {vae.latent_channels}")
    if not 0 < float(vae.scaling_factor) < 1000:
        raise ValueError(f"a scaling factor of {vae.scaling_factor}")
    for tokenizer, encoder in model.text_parts:
        if max(tokenizer.get_vocab().values()) >= encoder.config.vocab_size:
            raise ValueError("the tokenizer has words that the text encoder does not know")
        if tokenizer.model_max_length > encoder.config.max_position_embeddings:
            tokenizer.model_max_length = encoder.config.max_position_embeddings  # a folder that does not say how long
    width = sum(encoder.config.hidden_size for _, encoder in model.text_parts)
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"the UNet takes text embeddings of width {unet.cross_attention_dim}, the text encoder makes {width}"
        )
    if not 0 <= float(model.about.get("guidance", 0)) < 1000:
        raise ValueError(f"a guidance scale of {model.about['guidance']}")


def model_files(folder: Path) -> list[Path]:
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


def digest_of(files: Mapping[str, Path]) -> str:
    """SHA-256, in hexadecimal, over files and what they are called, in the mapping's order."""
    whole = hashlib.sha256()
    for name, file in files.items():
        whole.update(name.encode())
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()
