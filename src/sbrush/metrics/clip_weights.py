"""What is known of a file of CLIP weights: a file does not say which activation it was trained with.

OpenAI's, MetaCLIP's and DFN's models compute x sigmoid(1.702 x), QuickGELU, where the others compute GELU. Weights fit
both, and with the wrong one scores are wrong without a sign of it. open_clip has a name for each: ViT-B-32 and
ViT-B-32-quickgelu.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import open_clip

from sbrush.console import SbrushError, info, printable
from sbrush.models.parts import read_json

QUICK = "-quickgelu"
# SHA-256 of files on the Hub, as their pages state them; those that open_clip's own addresses contain need no entry.
PUBLISHED = {
    "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31": "ViT-B-32-quickgelu",  # OpenAI's, safetensors
    "9ecdaef325b20e7283dc6a32f92aa638d100899e4f084c2462d3832eeea0b26e": "ViT-B-32-quickgelu",  # OpenAI's, .bin
    "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f": "ViT-B-16-quickgelu",  # OpenAI's
    "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e": "ViT-L-14-quickgelu",  # OpenAI's
    "ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6": "ViT-B-32",  # LAION-2B's
}


def known_model(digest: str) -> str | None:
    """open_clip's name, activation included, of the model whose published weights have this SHA-256."""
    if digest in PUBLISHED:
        return PUBLISHED[digest]
    for name, tag in open_clip.list_pretrained():
        about = open_clip.get_pretrained_cfg(name, tag)
        # .../<64 digits>/ViT-B-32.pt, or ...-<the first 8>.pt
        found = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pt$", about.get("url", ""))
        if found and digest.startswith(found[1] or found[2]):
            return name.removesuffix(QUICK) + (QUICK if about.get("quick_gelu") else "")
    return None


def check_weights(file: Path, digest: str, model_name: str, *, own: bool) -> None:
    """SbrushError if a file is known to hold another model's weights than `model_name`'s, or code.

    A note if it is not known, and the model has both activations; `own`: it is said to be this model's by its user.
    """
    known, shown = known_model(digest), printable(file)
    if _is_program(file):
        raise SbrushError(
            f"{shown} is a TorchScript archive, which holds code",
            "take the same weights as safetensors: OpenAI's are timm/vit_base_patch32_clip_224.openai and the like",
            code=2,
        )
    if known and known != model_name:
        raise SbrushError(
            f"{shown} holds the weights of {known}, and would be read as {printable(model_name)}",
            f"take {printable(model_name)}'s own weights; `sbrush distill` has --clip-model {known} for these",
            code=2,
        )
    if not known and not own and {model_name, model_name + QUICK} <= set(open_clip.list_models()):
        info(
            f"note: {shown} does not say its activation; {model_name} computes with GELU. "
            f"OpenAI's, MetaCLIP's and DFN's weights need {model_name}{QUICK}"
        )


def check_folder(folder: Path, digest: str) -> None:
    """SbrushError if a folder of open_clip's has another activation than its weights, of this SHA-256, need."""
    known = known_model(digest)
    if known is None:
        return
    config = read_json(folder / "open_clip_config.json")
    quick = bool(config.get("model_cfg", config).get("quick_gelu"))
    if quick != known.endswith(QUICK):
        raise SbrushError(
            f"{printable(folder)} holds the weights of {known}, but its configuration names another activation",
            f'set "quick_gelu" to {str(not quick).lower()} in the model_cfg of its open_clip_config.json',
            code=2,
        )


def _is_program(file: Path) -> bool:
    """Whether a file is an archive of TorchScript, which torch would run."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def width_mismatch(problem: Exception, model_name: str) -> str | None:
    """What torch says of the first tensor of another shape, in a few words; None if the problem is another."""
    found = re.search(r"size mismatch for (\S+):.*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", str(problem))
    if found is None:
        return None
    return f"holds another model than {model_name}: its {found[1]} is {found[2]}, not {found[3]}"
