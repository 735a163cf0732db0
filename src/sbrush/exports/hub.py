"""Uploads a student to the Hugging Face Hub, only on request: model folder, card, example images."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from PIL import Image

from sbrush.console import SbrushError, info, printable, progress
from sbrush.models.model import Model
from sbrush.sampling.generation import student_images
from sbrush.sampling.images import image_grid, save_png

EXAMPLES = "examples.png"
SEEDS = range(4)
WORLD = ("a small red cat", "a big blue fish", "a dog on a mint background", "a green car")
PROMPTS = (
    "a photo of a cat in a garden", "a red vintage car on a street", "an astronaut riding a horse, oil painting",
    "a bowl of fruit on a wooden table",
)  # fmt: skip
OWN_FILES = (".gitattributes", "README.md")  # what a new repository may have
SIGN_IN = "`hf auth login` with a token that may write, or set HF_TOKEN"


def check_hub(name: str) -> None:
    """SbrushError if nothing can be uploaded as `name`: no token, no connection, a repository that has a model."""
    if constants.HF_HUB_OFFLINE:
        raise SbrushError("HF_HUB_OFFLINE is set, and --to hub uploads", "unset it, or export to a folder")
    if not get_token():
        raise SbrushError("--to hub needs a token of the Hugging Face Hub, and there is none", SIGN_IN)
    try:
        there = HfApi().list_repo_files(name)
    except RepositoryNotFoundError:
        return
    except Exception as problem:  # no network, a refused token, a wrong name: all come as different exceptions
        raise _explained(name, problem) from problem
    if others := sorted(set(there) - set(OWN_FILES)):
        raise SbrushError(
            f"{printable(name)} on the Hub is not empty: it has {printable(others[0])}",
            "name a new repository with -o",
            code=2,
        )


def example_images(student: Model) -> Image.Image:
    """A grid of the student's images: its prompts in rows, seeds 0 to 3 in columns."""
    prompts = WORLD if student.about.get("world") == "stickers" else PROMPTS
    rows = []
    with progress("drawing examples", len(prompts) * len(SEEDS), unit="images") as bar:
        for prompt in prompts:
            row = torch.cat(list(student_images(student, [prompt] * len(SEEDS), SEEDS)))
            rows.append(list(row))
            bar.advance(len(SEEDS))
    return image_grid(rows, row_labels=prompts, column_labels=[f"seed {seed}" for seed in SEEDS])


def upload(folder: Path, examples: Image.Image, name: str, *, private: bool) -> str:
    """Uploads a student's folder with its examples as one commit; the repository's address.

    SbrushError if it cannot be: then the repository has all that it had before, and nothing of this.
    """
    save_png(folder / EXAMPLES, examples)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").replace("path/to/this/folder", name)
    before, heading, after = text.partition("## Use it with diffusers")
    shown = f"![Prompts in rows, seeds 0 to 3 in columns]({EXAMPLES})\n\n"
    card.write_text(before + shown + heading + after, encoding="utf-8")
    info(f"uploading to {constants.ENDPOINT}/{name} ...")
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Student exported by sbrush")
    except Exception as problem:
        raise _explained(name, problem) from problem
    return f"{constants.ENDPOINT}/{name}"


def _explained(name: str, problem: Exception) -> SbrushError:
    """What went wrong on the way to the Hub, and what to do about it."""
    shown, status = printable(name), None
    if isinstance(problem, HfHubHTTPError):
        status = problem.response.status_code
    if isinstance(problem, HFValidationError):
        return SbrushError(f"{shown} is no name that the Hub takes", "--to hub takes -o OWNER/NAME", code=2)
    if status in (401, 403):
        return SbrushError(f"the Hub does not let you write to {shown}", f"check the owner's name; {SIGN_IN}")
    if status is None:  # httpx's errors, OSError and others
        first_line = next(iter(str(problem).splitlines()), "")
        return SbrushError(
            f"cannot upload to {shown} on the Hub: {type(problem).__name__} {printable(first_line)}".rstrip(),
            "check the connection, then give the same command again",
        )
    return SbrushError(
        f"the Hub refused {shown} with status {status}", "give the same command again later; nothing was half uploaded"
    )
