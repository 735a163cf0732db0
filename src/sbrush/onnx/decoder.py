"""VAEs that decode in place of a student's own, as graphs: those of the built-in world come with sbrush."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from sbrush.models.parts import DIFFUSERS, digest_of, network_files, read_json
from sbrush.models.vae_source import BUILT_IN_TINY, TINY, Decoder, local_vae
from sbrush.onnx.graphs import GRAPHS, INDEX, configuration_digest, open_graph, read_weights

DECODER, TINY_DECODER = "vae_decoder", "tiny_vae_decoder"  # graphs' names
VAE_FACTS = ("scaling_factor", "latents_mean", "latents_std")  # of a VAE's configuration: what models/latents.py reads


@dataclass(frozen=True)
class GraphDecoder:
    """A decoder ready to run. `vae`: what its configuration says of its latents. `files`: what it was read from."""

    about: Decoder
    session: onnxruntime.InferenceSession
    vae: dict[str, Any]
    files: tuple[Path, ...]


def find_decoder(vae: str, about: dict[str, Any]) -> GraphDecoder | None:
    """The decoder of `vae`, as load_vae.with_vae takes it, if there is a graph of it; else None.

    `about`: the sbrush.json of the student, which has to be one of the built-in world. SbrushError if a folder holds no
    VAE, or damaged files.
    """
    folder = BUILT_IN_TINY if vae == TINY else local_vae(vae)
    if folder is None or about.get("world") != "stickers":
        return None
    config, graphs = read_json(folder / "config.json"), read_json(GRAPHS / INDEX)
    digest, files = configuration_digest(config), network_files(folder, DIFFUSERS)
    part = next((part for part in (TINY_DECODER, DECODER) if graphs[part]["configuration"] == digest), None)
    if part is None or len(files) != 2:  # config.json and one file of weights
        return None
    session = open_graph(GRAPHS / f"{part}.onnx", read_weights(files[-1], graphs[part]["weights"]))
    sha256 = digest_of({file.name: file for file in files})[:16]
    return GraphDecoder(
        Decoder(vae, sha256), session, {key: config[key] for key in VAE_FACTS if key in config}, tuple(files)
    )
