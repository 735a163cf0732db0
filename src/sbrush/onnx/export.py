"""Students out as ONNX: `sbrush export STUDENT --to onnx`, in the layout that optimum's pipelines load.

    text_encoder/model.onnx     input_ids [B, L]                                   -> last_hidden_state [B, L, D]
    unet/model.onnx             sample, timestep, encoder_hidden_states            -> out_sample [B, C, H, W]
    vae_decoder/model.onnx      latent_sample [B, C, H, W]                         -> sample [B, 3, H', W']

with the configurations, tokenizer and scheduler beside them, and in sbrush.json what `sbrush sample` needs to draw.
Graphs are traced by torch.onnx.export, which wants the packages onnx and onnxscript.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbrush.console import SbrushError, printable
from sbrush.models.model import Model
from sbrush.models.parts import read_json
from sbrush.models.sdxl import ModelXL
from sbrush.models.single_file import published_name
from sbrush.models.vae_source import BUILT_IN_TINY
from sbrush.onnx.decoder import DECODER, TINY_DECODER, VAE_FACTS
from sbrush.onnx.graphs import INDEX, configuration_digest
from sbrush.onnx.model import FACTS, GRAPH, PARTS, Facts
from sbrush.storage.files import atomic_folder, atomic_write, write_json

OPSET = 20
NEEDED = ("onnx", "onnxscript")


class _Traced(nn.Module):
    """A network, called as its graph is to be."""

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class _TextEncoder(_Traced):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids).last_hidden_state


class _UNet(_Traced):
    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _Decoder(_Traced):
    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.network.decode(latent_sample, return_dict=False)[0]


def check_onnx(student: Model | None = None) -> None:
    """SbrushError if ONNX's packages are missing, or a student cannot be exported to it."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SbrushError(
            f"--to onnx needs the {' and '.join(missing)} package{'s' * (len(missing) > 1)}",
            'pip install "sbrush[onnx]"',
        )
    if isinstance(student, ModelXL) or (student and student.guidance_input is not None):
        kind = "of SDXL" if isinstance(student, ModelXL) else "with a guidance input"
        raise SbrushError(
            f"{printable(student.name)} is a student {kind}, and sbrush writes ONNX for Stable Diffusion 1.x and 2.x",
            "--to diffusers or --to single-file",
            code=2,
        )
    if student and getattr(student.text_encoder.config, "use_attention_mask", False):
        raise SbrushError(
            f"the text encoder of {printable(student.name)} masks what fills a prompt up, and its graph would not",
            "--to diffusers",
            code=2,
        )


def export_onnx(student: Model, folder: Path) -> None:
    """Writes a float32 student on the CPU as ONNX, complete or not at all. SbrushError if it cannot be; OSError."""
    check_onnx(student)
    with atomic_folder(folder) as partial:
        for part, own in PARTS.items():
            (partial / part).mkdir()
            program = _trace(part, student)
            program.save(partial / part / GRAPH, external_data=True)
            shutil.copyfile(student.folders[own] / own / "config.json", partial / part / "config.json")
        student.tokenizer.save_pretrained(partial / "tokenizer")
        student.sampler.save_pretrained(partial / "scheduler")
        write_json(partial / "model_index.json", _index(student))
        write_json(partial / "sbrush.json", student.about | {FACTS: dataclasses.asdict(facts_of(student))})


def write_graphs(student: Model, folder: Path) -> None:
    """Writes the architecture of each network without its weights, PART.onnx, and graphs.json: see graphs.py.

    Of a student that decodes with the built-in tiny VAE, that one's decoder too.
    """
    import onnx

    check_onnx(student)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for part, own in (PARTS | ({TINY_DECODER: "vae"} if student.decoder else {})).items():
        proto = _trace(part, student).model_proto
        for node in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
            del node.metadata_props[:]
        for node in proto.graph.node:
            node.doc_string = ""
        for whole in (proto, proto.graph):
            del whole.metadata_props[:]
        del proto.graph.value_info[:]
        home = BUILT_IN_TINY if part == TINY_DECODER else student.folders[own] / own
        config = read_json(home / "config.json")
        index[part] = {"configuration": configuration_digest(config), "weights": _take_weights(proto.graph, own)}
        with atomic_write(folder / f"{part}.onnx") as file:
            onnx.save(proto, file)
    write_json(folder / INDEX, index)


def facts_of(student: Model) -> Facts:
    """What drawing with a student needs to know besides its networks."""
    choices = student.ladder.choices if student.ladder else (1,)
    config = student.vae.config
    vae = {key: config[key] for key in VAE_FACTS if config.get(key) is not None}
    return Facts(
        student.latent_shape, student.image_size, tuple(student.scheduler.alphas_cumprod.tolist()), student.prediction,
        {steps: student.rungs(steps) for steps in choices}, len(student.rungs()), student.fresh_noise,
        student.sampler_name, vae, student.noise_scale,
    )  # fmt: skip


def _trace(part: str, student: Model) -> Any:
    """A network's graph, for any number of samples."""
    batch = {0: torch.export.Dim("batch")}
    ids = student.tokenizer(
        ["a cat", "a dog"], padding="max_length", max_length=student.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    latents = torch.zeros(2, *student.latent_shape)
    width = student.unet.config.cross_attention_dim
    traced: dict[str, tuple[_Traced, dict[str, Tensor], str]] = {
        "text_encoder": (_TextEncoder(student.text_encoder), {"input_ids": ids}, "last_hidden_state"),
        "unet": (
            _UNet(student.unet),
            {
                "sample": latents, "timestep": torch.tensor(student.rungs()[0]),
                "encoder_hidden_states": torch.zeros(2, ids.shape[1], width),
            },
            "out_sample",
        ),
        DECODER: (_Decoder(student.vae), {"latent_sample": latents}, "sample"),
        TINY_DECODER: (_Decoder(student.decoding_vae), {"latent_sample": latents}, "sample"),
    }  # fmt: skip
    network, inputs, output = traced[part]
    shapes = {name: batch if value.dim() else None for name, value in inputs.items()}
    with _quietly():
        return torch.onnx.export(
            network.eval(), kwargs=inputs, dynamo=True, optimize=False, dynamic_shapes=shapes, opset_version=OPSET,
            input_names=list(inputs), output_names=[output], verbose=False,
        )  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """torch.onnx tells of much that concerns its own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _take_weights(graph: Any, part: str) -> list[str]:
    """Takes the weights out of a graph and gives them the names that files have; these names, in order."""
    from onnx import TensorProto

    weights = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    names = {tensor.name: published_name(part, tensor.name.removeprefix("network.")) for tensor in weights}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in weights:
        tensor.name = names[tensor.name]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "weights"
    return list(names.values())


def _index(student: Model) -> dict[str, Any]:
    """model_index.json as optimum's and diffusers' ONNX pipelines read it."""
    parts = {part: ["diffusers", "OnnxRuntimeModel"] for part in PARTS}
    return {
        "_class_name": "OnnxStableDiffusionPipeline", "_diffusers_version": "0.35.0", **parts,
        "scheduler": ["diffusers", student.sampler_name], "tokenizer": ["transformers", "CLIPTokenizer"],
        **student.none,
    }  # fmt: skip
