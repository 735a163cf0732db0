"""The OpenAI images API: `POST /v1/images/generations`, so that its clients and front ends work unchanged."""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from sbrush.console import SbrushError
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.serving.requests import MOST_IMAGES, image_requests
from sbrush.serving.service import QUALITY, Service, encode, note_headers

WITHOUT_EFFECT = ("quality", "style", "moderation")


class GenerationBody(BaseModel):
    """What OpenAI's clients send, and `seed` and `steps`, which they can add as extra fields."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field(description="What the images show.")
    model: str | None = Field(None, max_length=256, description="Any name: there is one student.")
    n: int | None = Field(1, ge=1, le=MOST_IMAGES, description="Images, with the seeds that follow each other.")
    size: str | None = Field("auto", max_length=32, description="auto, or the student's own size, such as 512x512.")
    response_format: Literal["b64_json"] | None = Field(None, description="Images come within the answer.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field("png", description="PNG alone holds metadata.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP, of 100.")
    background: Literal["auto", "opaque"] | None = Field(None, description="No image is transparent.")
    stream: Literal[False] | None = Field(None, description="Images come whole.")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Of the first image. None: by chance.")
    steps: int | None = Field(None, description="None: as many as the student was trained for.")
    quality: str | None = Field(None, max_length=32, description="Without effect.")
    style: str | None = Field(None, max_length=32, description="Without effect.")
    moderation: str | None = Field(None, max_length=32, description="Without effect.")


def create_router(service: Service) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/images/generations", summary="Images of a prompt")
    async def generations(body: GenerationBody) -> JSONResponse:
        check_size(service, body.size)
        requests = image_requests(body.prompt, body.seed, body.n or 1, service.check_settings(body.steps))
        drawn = await service.draw(requests)
        kind = body.output_format or "png"
        quality = QUALITY if body.output_compression is None else body.output_compression
        files = [await encode(one, kind, quality) for one in drawn]
        data = [
            {"b64_json": base64.b64encode(file).decode("ascii"), "seed": one.record["seed"]}
            for file, one in zip(files, drawn, strict=True)
        ]
        answer = {
            "created": int(time.time()),
            "data": data,
            "output_format": kind,
            "size": "{}x{}".format(*service.size),
        }
        return JSONResponse(answer, headers=note_headers(drawn, _notes(service, body)))

    @router.get("/models", summary="The student")
    async def models() -> dict[str, Any]:
        about = {"id": service.student.name, "object": "model", "created": 0, "owned_by": "sbrush"}
        return {"object": "list", "data": [about]}

    return router


def check_size(service: Service, size: str | None) -> None:
    """SbrushError if images of a size such as "512x512" are asked for, and it is not the student's."""
    own = "{}x{}".format(*service.size)
    if size not in (None, "", "auto", own):
        raise SbrushError(
            "this student does not draw images of that size",
            f"its images are {own} pixels; leave the size out, or ask for that",
            code=2,
        )


def _notes(service: Service, body: GenerationBody) -> list[str]:
    """What was asked for and has no effect."""
    given = [name for name in WITHOUT_EFFECT if getattr(body, name) not in (None, "auto", "standard")]
    notes = [f"without effect: {', '.join(given)}"] if given else []
    if body.model not in (None, "", service.student.name):
        notes.append(f"drawn by {service.student.name}: there is no other model")
    return notes
