"""A student whose networks are ONNX graphs. It draws on a CPU with onnxruntime: diffusers and transformers, which take
several seconds to import, are not needed.

`find` looks whether a student can be drawn with like this: one that `sbrush export --to onnx` wrote, or one of the
built-in world, whose graphs come with sbrush and take the weights of its folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnxruntime
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sbrush.console import SbrushError, printable
from sbrush.core import Conditioning, NoiseSchedule, Prediction
from sbrush.models.latents import for_decoder, to_images
from sbrush.models.parts import part_files, read_json
from sbrush.models.source import BUILT_IN_STUDENTS, built_in_student, local_student
from sbrush.onnx.decoder import DECODER, VAE_FACTS, GraphDecoder, find_decoder
from sbrush.onnx.graphs import GRAPHS, INDEX, WEIGHTS, configuration_digest, open_graph, read_weights

PARTS = {"text_encoder": "text_encoder", "unet": "unet", DECODER: "vae"}  # a graph's name, its part's
GRAPH = "model.onnx"
FACTS = "onnx"  # in a sbrush.json: what an exported student's drawing needs, see Facts
DECODED = 1 << 19  # pixels decoded at once


@dataclass(frozen=True)
class Facts:
    """What drawing needs to know besides the networks, as an exported sbrush.json has it under FACTS.

    `rungs`: the timesteps for each number of steps that the student takes. `fresh`: whether each step takes fresh
    noise. `vae`: of its configuration, what models/latents.py reads.
    """

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    alphas_cumprod: tuple[float, ...]
    prediction: Prediction
    rungs: dict[int, tuple[int, ...]]
    trained: int
    fresh: bool
    sampler: str
    vae: dict[str, Any]
    noise_scale: float = 1.0

    @classmethod
    def read(cls, written: dict[str, Any]) -> Facts:
        """From JSON. KeyError, TypeError or ValueError if it is not what `written_as` gave."""
        values = dict(written)
        values |= {name: tuple(values[name]) for name in ("latent_shape", "image_size", "alphas_cumprod")}
        values["rungs"] = {int(steps): tuple(map(int, rungs)) for steps, rungs in values["rungs"].items()}
        return cls(**values)


class OnnxModel:
    """What sampling needs of a student, see sampling.generation.Drawer. Runs on the CPU in float32.

    `about`: its sbrush.json. `sessions`: by the names of PARTS. `decoder`: the VAE that decodes, if not its own.
    """

    runtime: str | None = "onnx"
    guidance_input: float | None = None
    negative: None = None  # its attention is what it is
    start_timestep: int | None = None
    loras: tuple[()] = ()
    device = torch.device("cpu")

    def __init__(
        self,
        name: str,
        about: dict[str, Any],
        facts: Facts,
        sessions: dict[str, onnxruntime.InferenceSession],
        tokenizer: Path,
        files: Iterable[Path],
        decoder: GraphDecoder | None = None,
    ) -> None:
        if decoder:
            facts, sessions = replace(facts, vae=decoder.vae), sessions | {DECODER: decoder.session}
            files = (*files, *decoder.files)
        self.name, self.about, self.facts = name, about, facts
        self.latent_shape, self.image_size, self.noise_scale = facts.latent_shape, facts.image_size, facts.noise_scale
        self.prediction, self.sampler_name = facts.prediction, facts.sampler
        self.fresh_noise, self.step_choices = facts.fresh, tuple(facts.rungs)
        self._sessions, self._files = sessions, tuple(files)
        self.decoder = decoder.about if decoder else None
        self._tokenizer, self.longest_prompt = _read_tokenizer(tokenizer)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """alpha_t and sigma_t."""
        return NoiseSchedule.from_alphas_cumprod(torch.tensor(self.facts.alphas_cumprod))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell models apart: a hash over its files."""
        whole = hashlib.sha256(repr(self.facts).encode())
        for file in self._files:
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()[:16]

    def rungs(self, steps: int | None = None) -> tuple[int, ...]:
        """As Model.rungs."""
        rungs = self.facts.rungs.get(steps or self.facts.trained)
        if rungs is None:
            taken = " or ".join(map(str, self.facts.rungs))
            raise SbrushError(
                f"this student takes {taken} step{'s' * (taken != '1')}, not {steps}",
                "leave out --steps, or train one of several: sbrush distill --student-steps 4",
                code=2,
            )
        return rungs

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Int64 [B, L], filled up and cut to the length that the text encoder reads."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))])

    def truncated_prompts(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the text encoder reads, so that their ends are cut off."""
        return sum(bool(encoding.overflowing) for encoding in self._tokenizer.encode_batch(list(texts)))

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """As Model.encode."""
        return {"tokens": self._run("text_encoder", input_ids=self.token_ids(texts))}

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As Model.denoise; `t` is the same for all samples."""
        return self._run("unet", sample=x_t, timestep=t[0], encoder_hidden_states=conditioning["tokens"])

    def encode_images(self, images: Tensor) -> Tensor:
        """As Model.encode_images; but an exported student has no encoder."""
        raise SbrushError("a student of ONNX graphs starts from noise alone", "--runtime torch", code=2)

    def decode(self, x0: Tensor, *, truncate: bool = False) -> Tensor:
        """As Model.decode."""
        height, width = self.image_size
        latents = for_decoder(SimpleNamespace(config=SimpleNamespace(**self.facts.vae)), x0)
        parts = latents.split(max(1, DECODED // (height * width)))
        return torch.cat([to_images(self._run(DECODER, latent_sample=p), truncate=truncate) for p in parts])

    def _run(self, part: str, **inputs: Tensor) -> Tensor:
        outputs = self._sessions[part].run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(outputs[0])


def is_exported(source: str | None) -> bool:
    """Whether a student is a folder that `sbrush export --to onnx` wrote, which torch cannot read."""
    local = None if source is None or built_in_student(source) else local_student(source)
    return local is not None and (local / "unet" / GRAPH).is_file()


def find(source: str | None, vae: str | None = None) -> OnnxModel | None:
    """The student `source`, as load_student takes it, if its graphs are at hand; None if it has none.

    `vae`: the VAE that decodes in place of its own, as load_vae.with_vae takes it; None too if that has no graph.
    SbrushError if it has, and they are damaged.
    """
    if own := built_in_student(source):
        folder, name = WEIGHTS / BUILT_IN_STUDENTS[own], f"{own} student (built in)"
    else:
        assert source is not None
        local = local_student(source)
        if local is None:
            return None
        folder, name = local, source
    if (folder / "unet" / GRAPH).is_file():
        return _exported(folder, name, vae)
    return _of_the_built_in_world(folder, name, vae)


def _exported(folder: Path, name: str, vae: str | None) -> OnnxModel:
    """The student in a folder that export.py wrote."""
    try:
        about = read_json(folder / "sbrush.json")
        facts = Facts.read(about[FACTS])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise SbrushError(
            f"{printable(name)} has ONNX graphs and no sbrush.json that says how to draw with them",
            "export it again: sbrush export STUDENT --to onnx -o FOLDER",
        ) from problem
    other = find_decoder(vae, about) if vae else None
    if vae and other is None:
        raise SbrushError(
            f"{printable(name)} was exported to ONNX with its own VAE, and there is no graph of {printable(vae)}",
            "leave out --vae, or take the student that it was exported from",
            code=2,
        )
    own = [part for part in PARTS if not (other and part == DECODER)]
    sessions = {part: open_graph(folder / part / GRAPH) for part in own}
    files = [file for part in own for file in sorted((folder / part).iterdir()) if file.is_file()]
    return OnnxModel(name, about, facts, sessions, folder / "tokenizer", files, other)


def _of_the_built_in_world(folder: Path, name: str, vae: str | None) -> OnnxModel | None:
    """A one-step student of the built-in architecture, with the graphs that come with sbrush; None if it is another."""
    places = {
        part: folder if (folder / part).is_dir() or folder.parent != WEIGHTS else WEIGHTS / "teacher"
        for part in (*PARTS.values(), "tokenizer", "scheduler")
    }
    try:
        about, unet, own_vae = (
            read_json(folder / "sbrush.json"), read_json(places["unet"] / "unet" / "config.json"),
            read_json(places["vae"] / "vae" / "config.json"),
        )  # fmt: skip
        scheduler = read_json(places["scheduler"] / "scheduler" / "scheduler_config.json")
        facts = _facts(about, unet, own_vae, scheduler)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whatever it is: loading it with torch says so
    if facts is None or not (places["tokenizer"] / "tokenizer" / "tokenizer.json").is_file():
        return None
    graphs = read_json(GRAPHS / INDEX)
    for part, own in PARTS.items():
        if configuration_digest(read_json(places[own] / own / "config.json")) != graphs[part]["configuration"]:
            return None
    other = find_decoder(vae, about) if vae else None
    if vae and other is None:
        return None
    weights = {part: part_files(places[own], own)[-1] for part, own in PARTS.items() if not (other and part == DECODER)}
    sessions = {
        part: open_graph(GRAPHS / f"{part}.onnx", read_weights(file, graphs[part]["weights"]))
        for part, file in weights.items()
    }
    files = [*weights.values(), places["tokenizer"] / "tokenizer" / "tokenizer.json"]
    return OnnxModel(name, about, facts, sessions, places["tokenizer"] / "tokenizer", files, other)


def _facts(about: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> Facts | None:
    """Those of a student of the built-in world; None if it does not draw in one step of a schedule written out."""
    betas = scheduler.get("trained_betas")
    plain = scheduler["_class_name"] == "DDIMScheduler" and not scheduler.get("rescale_betas_zero_snr")
    if about.get("world") != "stickers" or about.get("steps", 1) != 1 or not betas or not plain:
        return None
    alphas_cumprod = (1 - torch.tensor(betas, dtype=torch.float32)).cumprod(0)  # as diffusers' schedulers have it
    size, channels = unet["sample_size"], unet["in_channels"]
    pixels = size * 2 ** (len(vae["block_out_channels"]) - 1)
    return Facts(
        (channels, size, size), (pixels, pixels), tuple(alphas_cumprod.tolist()),
        cast(Prediction, scheduler["prediction_type"]), {1: (len(betas) - 1,)}, 1, False, "DDIMScheduler",
        {key: vae[key] for key in VAE_FACTS if key in vae},
    )  # fmt: skip


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """A tokenizer that fills texts up and cuts them as transformers' does, and the length that it cuts at."""
    try:
        config = read_json(folder / "tokenizer_config.json")
        length, pad = int(config["model_max_length"]), config["pad_token"]
        pad = pad if isinstance(pad, str) else pad["content"]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pad_id = tokenizer.token_to_id(pad)
    except Exception as problem:  # tokenizers raises bare Exceptions
        raise SbrushError(
            f"cannot read {printable(folder)}: {printable(problem)}", "export the student again"
        ) from problem
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad)
    return tokenizer, length
