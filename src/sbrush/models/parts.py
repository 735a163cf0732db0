"""The files of a model's parts: which ones of a folder are read, and what is wrong with those that cannot be.

What is read is what belongs to a model: its digest, its copy in a student's folder and every check are of these files
and no others. What else lies beside them (a variant in half precision, .DS_Store, macOS's ._model.safetensors, notes)
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, info, printable

TOKENIZER = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # what each library calls a network's weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(file: Path) -> dict[str, Any]:
    """A small JSON object; ValueError if it is none."""
    if file.stat().st_size > 2**20:
        raise ValueError(f"{file.parent.name}/{file.name} is larger than 1 MiB")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent.name}/{file.name} is no JSON object")
    return content


def part_files(folder: Path, part: str, *, weights: bool = True) -> list[Path]:
    """The files of a model folder's part that are read, sorted. SbrushError if one lies elsewhere or is missing."""
    here = folder / part
    if part.startswith("tokenizer"):
        return _inside(here, [here / name for name in TOKENIZER])
    if part == "scheduler":
        return _inside(here, [here / "scheduler_config.json"])
    return network_files(here, weights_name(part), weights=weights)


def network_files(folder: Path, name: str, *, weights: bool = True) -> list[Path]:
    """The same of a network's folder, whose weights the library calls `name` (DIFFUSERS or TRANSFORMERS)."""
    return _inside(folder, [folder / "config.json", *(weights_files(folder, name) if weights else ())])


def weights_name(part: str) -> str:
    """What the weights of a part are called, without what follows the first dot."""
    return TRANSFORMERS if part.startswith("text_encoder") else DIFFUSERS


def weights_files(folder: Path, name: str) -> list[Path]:
    """The files that a network's weights are read from, and the index that names them; empty if there are none.

    Where a whole file and an index of several lie side by side, diffusers reads the latter and transformers the former.
    """
    whole, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    order = (index, whole) if name == DIFFUSERS else (whole, index)
    found = next((file for file in order if file.is_file()), None)
    if found is None or found == whole:
        return [whole] if found else []
    refuse_pointer(index)
    shown = printable(index)
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("it names no files beside it")
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise SbrushError(
            f"{shown} is no index of weights: {printable(problem)}", "fetch it again", code=2
        ) from problem
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SbrushError(
            f"{printable(folder)} lacks {len(missing)} of its {len(names)} files of weights: {printable(missing[0])}",
            "it was copied or fetched in part: fetch the missing files",
            code=2,
        )
    return [index, *(folder / name for name in names)]


def check_part(folder: Path, part: str, parts: Iterable[str], *, weights: bool = True) -> None:
    """SbrushError if a model folder lacks a part, or what is read of it, or holds weights only in a form not read."""
    here, shown = folder / part, printable(folder)
    if not here.is_dir():
        raise SbrushError(
            f"{shown} is no Stable Diffusion model: it has no {part}/",
            "a model folder has model_index.json and " + ", ".join(f"{p}/" for p in parts),
            code=2,
        )
    if part.startswith("tokenizer"):
        if not any(all((here / name).is_file() for name in names) for names in (TOKENIZER[:1], TOKENIZER[1:3])):
            raise SbrushError(
                f"{shown}/{part} has no vocabulary: every prompt would be the same to it",
                "it needs vocab.json and merges.txt, or tokenizer.json, of the model that it was made from",
                code=2,
            )
    elif not (config := here / f"{'scheduler_' if part == 'scheduler' else ''}config.json").is_file():
        raise SbrushError(f"{shown}/{part} has no {config.name}", "fetch or export the model again", code=2)
    if part.startswith("text_encoder") and (here / "adapter_config.json").is_file():
        raise SbrushError(
            f"{shown}/{part} holds a PEFT adapter, which transformers would load in place of the text encoder",
            "merge it into the text encoder, or take adapter_config.json away",
            code=2,
        )
    for file in part_files(folder, part, weights=weights):
        refuse_pointer(file)
    if weights and part != "scheduler" and not part.startswith("tokenizer"):
        _check_weights(here, shown, part)


def _check_weights(here: Path, shown: str, part: str) -> None:
    """SbrushError if a part's weights are not read, saying what is there instead; a note if they are there twice."""
    name = weights_name(part)
    if found := weights_files(here, name):
        whole, index = here / f"{name}.safetensors", here / f"{name}.safetensors.index.json"
        if whole.is_file() and index.is_file():
            info(f"note: {shown}/{part} holds its weights twice; {printable(found[0].name)} is read")
        return
    visible = sorted(f.name for f in here.iterdir() if f.is_file() and not f.name.startswith("."))
    others = [file for file in visible if file.endswith(".safetensors")]
    variants = [(file, kind) for file in others if (kind := _variant(file, name))]
    if variants:
        file, kind = variants[0]
        pieces = re.search(r"-\d+-of-\d+", file)
        hint = f'DiffusionPipeline.from_pretrained(FOLDER, variant="{kind}").save_pretrained(NEW) writes it without'
        if not pieces:
            hint = f"rename it to {name}.safetensors, if it is to be read"
        raise SbrushError(
            f"{shown}/{part} holds a variant of the weights alone, {printable(file)}", printable(hint), code=2
        )
    if others:
        raise SbrushError(
            f"{shown}/{part} has no {name}.safetensors, but {printable(others[0])}",
            f"{name}-00001-of-... needs {name}.safetensors.index.json beside it"
            if re.fullmatch(rf"{name}-\d+-of-\d+\.safetensors", others[0])
            else f"rename it to {name}.safetensors, if these are the weights of its {part}",
            code=2,
        )
    if any(file.endswith(PICKLES) for file in visible):
        raise SbrushError(
            f"{shown}/{part} holds only pickled weights",
            "sbrush reads safetensors only: save the model again with safe_serialization=True",
            code=2,
        )
    hidden = next((f.name for f in here.iterdir() if f.name.startswith(".") and f.name.endswith(".safetensors")), None)
    raise SbrushError(
        f"{shown}/{part} holds no weights",
        f"{printable(hidden)} is a hidden file, as macOS writes one beside each; copy {name}.safetensors itself"
        if hidden
        else f"it needs {name}.safetensors",
        code=2,
    )


def _variant(file: str, name: str) -> str:
    """Which variant ("fp16") of the weights a file is a part of, however it was named; empty if of none."""
    patterns = (r"\.([\w-]+?)(-\d+-of-\d+)?\.safetensors", r"-\d+-of-\d+\.([\w-]+)\.safetensors")
    return next((found[1] for pattern in patterns if (found := re.fullmatch(re.escape(name) + pattern, file))), "")


def refuse_pointer(file: Path) -> None:
    """SbrushError if a file only stands for another: a Git LFS pointer, or the web page that came in its place."""
    with file.open("rb") as opened:
        start = opened.read(64)
    shown = printable(file)
    if start.startswith(POINTER):
        raise SbrushError(
            f"{shown} is a Git LFS pointer, not the file itself",
            "run `git lfs install && git lfs pull` in its folder, or fetch the file itself",
            code=2,
        )
    if file.suffix == ".safetensors" and start.lstrip()[:9].lower() in (b"<!doctype", b"<html><he", b"<html>\n<h"):
        raise SbrushError(f"{shown} is a web page, not weights", "fetch the file itself, not its page", code=2)


def _inside(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Those of the files that there are, sorted. SbrushError if one lies elsewhere: a student is made of copies.

    The Hub's own cache keeps every file elsewhere, within the repository's folder, and links to it.
    """
    home = folder.parent.resolve()
    for above in (home, *home.parents):
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            home = above.parent
    found = sorted(file for file in files if file.is_file())
    for file in found:
        if not file.resolve().is_relative_to(home):
            raise SbrushError(
                f"{printable(file)} is a link to a file outside its model", "put the file itself there", code=2
            )
    return found


def digest_of(files: Mapping[str, Path]) -> str:
    """SHA-256, in hexadecimal, over files and what they are called, in the mapping's order."""
    whole = hashlib.sha256()
    for name, file in files.items():
        whole.update(name.encode())
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def digest_of_parts(folders: Mapping[str, Path], sources: Mapping[str, Path] | None = None) -> str:
    """The digest of a model: of all that is read of its parts, each in its folder, and of `sources` besides."""
    files = {f"{part}/{file.name}": file for part, folder in folders.items() for file in part_files(folder, part)}
    return digest_of(files | dict(sources or {}))
