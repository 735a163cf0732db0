"""AUTOMATIC1111's API: `POST /sdapi/v1/txt2img` and what its front ends ask before it.

Those front ends always send steps, a guidance scale and a sampler, which are a many-step model's. A student takes its
own, and the answer says so in `info` under `notes`. What would change the image and cannot be done is refused.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from sbrush.console import SbrushError
from sbrush.sampling.images import parameters
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.serving.engine import Drawn
from sbrush.serving.openai_api import check_size
from sbrush.serving.requests import LONGEST_PROMPT, MOST_IMAGES, image_requests
from sbrush.serving.service import Service, encode, note_headers

SAMPLER = "sbrush"
NOTED = 10  # fields without effect that a note names
REFUSED = (
    "enable_hr", "tiling", "restore_faces", "script_name", "alwayson_scripts", "styles", "init_images",
    "refiner_checkpoint", "subseed_strength", "firstpass_image",
)  # fmt: skip
ACCEPTED = (
    "send_images",
    "override_settings_restore_afterwards",
    "sampler_index",
    "seed_resize_from_h",
    "seed_resize_from_w",
)


class Txt2ImgBody(BaseModel):
    """What A1111's front ends send. Fields that are not listed have no effect, which the answer's notes tell."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(description="What the images show.")
    negative_prompt: str | None = Field("", max_length=LONGEST_PROMPT, description="If the student takes one.")
    seed: int | None = Field(-1, ge=-1, le=LARGEST_SEED, description="Of the first image. -1: by chance.")
    steps: int | None = Field(None, description="The student's own, if it does not take so many.")
    cfg_scale: float | None = Field(None, description="Without effect.")
    width: int | None = Field(None, description="The student's own.")
    height: int | None = Field(None, description="The student's own.")
    batch_size: int | None = Field(1, ge=1, le=MOST_IMAGES, description="Images.")
    n_iter: int | None = Field(1, ge=1, le=MOST_IMAGES, description="Times that many.")
    sampler_name: str | None = Field(None, max_length=256, description="The student's own.")
    save_images: bool | None = Field(False, description="Nothing is saved on the server.")


def create_router(service: Service) -> APIRouter:
    """The routes under /sdapi/v1."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

    @router.post("/txt2img", summary="Images of a prompt")
    async def txt2img(body: Txt2ImgBody) -> JSONResponse:
        _check(service, body)
        steps = body.steps if body.steps in service.steps else None
        seed = None if body.seed in (None, -1) else body.seed
        count = (body.batch_size or 1) * (body.n_iter or 1)
        settings = service.check_settings(steps, body.negative_prompt if service.takes_negative else None)
        drawn = await service.draw(image_requests(body.prompt, seed, count, settings))
        notes = _notes(service, body)
        images = [base64.b64encode(await encode(one)).decode("ascii") for one in drawn]
        info = json.dumps(_info(service, body, drawn, notes))
        answer = {"images": images, "parameters": body.model_dump(include=set(Txt2ImgBody.model_fields)), "info": info}
        return JSONResponse(answer, headers=note_headers(drawn, notes))

    @router.get("/options", summary="The settings that can be read")
    async def options() -> dict[str, Any]:
        return _options(service)

    @router.post("/options", summary="Takes the settings as they are: there is one student")
    async def set_options(wanted: dict[str, Any]) -> None:
        own = _options(service)
        for name, value in wanted.items():
            if name not in own or own[name] != value:
                raise SbrushError(
                    f"the option {name[:64]!r} cannot be changed", "start sbrush serve with another --student", code=2
                )

    @router.get("/sd-models", summary="The student")
    async def models() -> list[dict[str, Any]]:
        own = _options(service)
        return [
            {
                "title": own["sd_model_checkpoint"], "model_name": service.student.name,
                "filename": service.student.name, "hash": own["sd_checkpoint_hash"][:10], "sha256": None,
                "config": None,
            }
        ]  # fmt: skip

    @router.get("/samplers", summary="The student's own steps")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": SAMPLER, "aliases": [], "options": {}}]

    return router


def _options(service: Service) -> dict[str, Any]:
    return {
        "sd_model_checkpoint": service.student.name, "sd_checkpoint_hash": service.artist.drawn_by["weights"],
        "samples_format": "png", "enable_pnginfo": True,
    }  # fmt: skip


def _check(service: Service, body: Txt2ImgBody) -> None:
    """SbrushError if something is asked for that would change the image and cannot be done."""
    extra = body.model_extra or {}
    if refused := next((name for name in REFUSED if extra.get(name)), None):
        raise SbrushError(f"{refused} cannot be done by this server", "leave it out", code=2)
    width, height = service.size
    check_size(
        service, f"{width if body.width is None else body.width}x{height if body.height is None else body.height}"
    )
    overridden = extra.get("override_settings") or {}
    if not isinstance(overridden, dict) or any(_options(service).get(name) != it for name, it in overridden.items()):
        raise SbrushError("override_settings cannot change anything here", "leave it out", code=2)


def _notes(service: Service, body: Txt2ImgBody) -> list[str]:
    """What was asked for and has no effect."""
    notes = []
    if body.steps is not None and body.steps not in service.steps:
        notes.append(f"drawn in {service.usual_steps} steps: this student does not take {body.steps}")
    given = {
        "negative_prompt": bool(body.negative_prompt) and not service.takes_negative,
        "cfg_scale": body.cfg_scale not in (None, 1),
        "sampler_name": body.sampler_name not in (None, "", SAMPLER), "save_images": bool(body.save_images),
    }  # fmt: skip
    extra = [name for name, value in (body.model_extra or {}).items() if value and name not in ACCEPTED]
    names = [name for name, is_given in given.items() if is_given]
    names += [name[:64] for name in extra if re.fullmatch(r"\w+", name) and name != "override_settings"]
    if names:
        more = f" and {len(names) - NOTED} others" if len(names) > NOTED else ""
        notes.append(f"without effect: {', '.join(names[:NOTED])}{more}")
    return notes


def _info(service: Service, body: Txt2ImgBody, drawn: list[Drawn], notes: list[str]) -> dict[str, Any]:
    """What A1111 tells of the images, with `notes`."""
    records = [one.record for one in drawn]
    width, height = service.size
    return {
        "prompt": body.prompt, "all_prompts": [body.prompt] * len(drawn),
        "negative_prompt": records[0].get("negative", ""),
        "all_negative_prompts": [record.get("negative", "") for record in records], "seed": records[0]["seed"],
        "all_seeds": [record["seed"] for record in records], "width": width, "height": height,
        "sampler_name": SAMPLER, "cfg_scale": records[0]["guidance"], "steps": records[0]["steps"],
        "batch_size": body.batch_size or 1, "sd_model_name": service.student.name,
        "sd_model_hash": records[0]["weights"], "infotexts": [parameters(record) for record in records],
        "index_of_first_image": 0, "notes": list(dict.fromkeys([*notes, *(n for one in drawn for n in one.notes)])),
    }  # fmt: skip
