"""CLIP score: the cosine of an image and its caption, by an open_clip model. 0 to 1 in practice, not times 100.

HPS v2 (arXiv 2306.09341) is the same by a ViT-H-14 that was trained on people's preferences, without a prefix, of the
image at its own size; times 100 in papers and here. Its two versions' figures do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.func import functional_call

from sbrush.console import SbrushError, info, printable
from sbrush.device import quick_products, send
from sbrush.metrics.clip_weights import check_folder, check_weights, width_mismatch
from sbrush.metrics.conventions import CLIP_PREFIX
from sbrush.models.parts import digest_of, refuse_pointer
from sbrush.sampling.images import to_image

MODEL, PRETRAINED = "ViT-g-14", "laion2b_s12b_b42k"  # what SwiftBrush, DMD2 and SiD-LSG measure with
HPS_MODEL = "ViT-H-14"
FILES = ("open_clip_config.json", "open_clip_model.safetensors")  # of a folder in open_clip's layout


class ClipScorer:
    """An open_clip model with its own preprocessing and tokenizer."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, name: str, digest: str = "") -> None:
        """`digest`: SHA-256 of all that it was loaded from."""
        self.network, self._preprocess, self._tokenizer = model.requires_grad_(False).eval(), preprocess, tokenizer
        self.name, self.digest = name, digest

    @classmethod
    def load(
        cls,
        weights: Path | None = None,
        *,
        model_name: str = MODEL,
        own: bool = False,
        download: bool = False,
        device: str = "cpu",
    ) -> ClipScorer:
        """ViT-g-14 of LAION-2B, or another of open_clip's models, from a file; any from a folder in open_clip's layout.

        `weights`: .safetensors or a state dict for `model_name`, or a folder with open_clip_config.json and
        open_clip_model.safetensors; None takes ViT-g-14's from the Hub's cache, filled only if `download`. `own`: the
        user says that a file is this model's, so that there is no note that its activation is not known.

        SbrushError if it fails, or if a file is known to be another model's: see clip_weights.py.
        """
        source = _source(weights, model_name)
        try:
            if weights is None:
                weights = Path(_cached(download))
            file = weights / FILES[1] if weights.is_dir() else weights
            refuse_pointer(file)
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            if weights.is_dir():
                check_folder(weights, digest)
                # A folder's configuration decides too: how images are resized and normalised.
                digest = digest_of({name: weights / name for name in FILES})
            else:
                check_weights(weights, digest, model_name, own=own)
            given = {} if source != model_name else {"pretrained": str(weights)}
            model, _, preprocess = open_clip.create_model_and_transforms(
                source, device=device, weights_only=True, **given
            )
            tokenizer = open_clip.get_tokenizer(source)
        except SbrushError:
            raise
        except Exception as problem:  # whatever open_clip makes of a file that is none of its own
            wanted = f"{MODEL} {PRETRAINED}" if model_name == MODEL else model_name
            why = width_mismatch(problem, model_name) or f"does not hold a CLIP model ({type(problem).__name__})"
            raise SbrushError(
                f"{printable(weights)} {why}",
                f"it is open_clip's {wanted}, as a state dict or safetensors, or a folder of open_clip's",
            ) from problem
        return cls(model, preprocess, tokenizer, source if source == model_name else weights.name, digest)

    @classmethod
    def shapes(cls, weights: Path | None, *, model_name: str) -> ClipScorer:
        """What `load` gives, its network with shapes and no numbers (device "meta"); no weights are read."""
        source = _source(weights, model_name)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(source, device="meta", load_weights=False)
            return cls(model, preprocess, open_clip.get_tokenizer(source), source)
        except Exception as problem:
            raise SbrushError(
                f"open_clip has no model {printable(weights if source != model_name else model_name)}",
                "a folder of open_clip's, or one of the names that open_clip.list_models() gives",
                code=2,
            ) from problem

    def prepare(self, image: Tensor) -> Tensor:
        """The model's own preprocessing: uint8 [3, H, W] to float32 [3, side, side], on the CPU. Any thread may."""
        ready: Tensor = self._preprocess(to_image(image))
        return ready

    def scores(self, images: Tensor, captions: Sequence[str], prefix: str = CLIP_PREFIX) -> Tensor:
        """Cosines: prepared images float32 [B, 3, side, side] and B captions to float32 [B], -1 to 1, on the CPU.

        On CUDA its products are TF32: strict float32 would take as long as all the rest of the benchmark.
        """
        with torch.inference_mode(), quick_products(next(self.network.parameters()).device):
            return self._cosines(images, captions, prefix).cpu()

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """CLIP scores of images as they come, uint8 [B, 3, H, W]: float32 [B], on the CPU."""
        return self.scores(torch.stack([self.prepare(image) for image in images]), captions)

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines through which images, float32 [B, 3, H, W] of 0 to 1, can be trained: float32 [B], no prefix."""
        *resizing, normalise = self._preprocess.transforms
        for resize in resizing:
            images = resize(images)
        # torchvision's own would wait for the device, to see that no deviation is zero.
        numbers = send(torch.tensor([normalise.mean, normalise.std]), images.device)
        mean, std = numbers.view(2, 1, 3, 1, 1)
        return self._cosines((images - mean) / std, captions, "")

    def _cosines(self, prepared: Tensor, captions: Sequence[str], prefix: str) -> Tensor:
        device = next(self.network.parameters()).device
        images = self.network.encode_image(prepared.to(device), normalize=True)
        texts = self._embed_texts(self._tokenizer([prefix + caption for caption in captions]), device)
        return (images.float() * texts.float()).sum(dim=-1)

    def _embed_texts(self, tokens: Tensor, device: torch.device) -> Tensor:
        """The texts' directions [B, D], of token ids int64 [B, 77] on the CPU.

        CLIP's own text tower reads from left to right and is read at the caption's end: what fills the 77 behind the
        longest one, four fifths of the work with captions of COCO's length, changes nothing and is left out. Tokens
        without numbers (of `shapes`) have no longest caption.
        """
        network = self.network
        own = isinstance(network, CLIP) and network.attn_mask is not None and network.text_pool_type == "argmax"
        if own and not tokens.is_meta:
            length = int(tokens.argmax(dim=1).max()) + 1
            mask, places = network.attn_mask[:length, :length], network.positional_embedding[:length]
            cut = {"attn_mask": mask, "positional_embedding": places}
            _, texts, *_ = functional_call(network, cut, kwargs={"text": tokens[:, :length].to(device)})
            return cast(Tensor, texts)
        return cast(Tensor, network.encode_text(tokens.to(device), normalize=True))


def _source(weights: Path | None, model_name: str) -> str:
    """What open_clip calls the model: a name of its list, or a folder."""
    return f"local-dir:{weights}" if weights and weights.is_dir() else model_name


def _cached(download: bool) -> str:
    """The weights in the Hub's cache, fetched if `download`."""
    from huggingface_hub import hf_hub_download

    repository = f"laion/CLIP-{MODEL}-laion2B-s12B-b42K"
    try:
        return hf_hub_download(repository, "open_clip_pytorch_model.bin", local_files_only=True)
    except Exception as problem:
        if download:
            info(f"fetching {repository} (5.5 GB) into the Hub's cache ...")
            try:
                return hf_hub_download(repository, "open_clip_pytorch_model.bin")
            except Exception as refused:
                first_line = next(iter(str(refused).splitlines()), type(refused).__name__)
                raise SbrushError(
                    f"cannot fetch {repository}: {printable(first_line)}",
                    "the same command goes on where it stopped; or give --clip-weights FILE, or --no-clip-score",
                ) from refused
        raise SbrushError(
            f"the CLIP score needs {MODEL} {PRETRAINED}, which is not in the Hub's cache",
            f"--download fetches {repository} (5.5 GB); or give --clip-weights FILE, or --no-clip-score",
        ) from problem
