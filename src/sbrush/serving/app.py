"""The routes of `sbrush serve`: the page, its own API, the APIs of other programs, health and counters."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import sbrush
from sbrush.console import SbrushError
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.serving import a1111_api, openai_api
from sbrush.serving.address import Access
from sbrush.serving.answers import error
from sbrush.serving.engine import Busy, Replaced, Stopped
from sbrush.serving.guard import Guard
from sbrush.serving.requests import LONGEST_PROMPT, Turn, image_requests
from sbrush.serving.service import Service, encode, note_headers

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "The image, with its metadata"},
    204: {"description": "A newer turn took its place"},
}


class DrawBody(BaseModel):
    """An image that follows the typing."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="What the image shows.")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="None: one by chance.")
    steps: int | None = Field(None, description="None: as many as the student was trained for.")
    negative: str | None = Field(None, max_length=LONGEST_PROMPT, description="What it is not to show.")
    client: str | None = Field(None, min_length=1, max_length=64, description="A name that the client makes up.")
    turn: int = Field(0, ge=0, le=2**53, description="A higher one drops what this client's lower ones wait for.")


def create_app(service: Service, access: Access) -> Guard:
    """The whole server as an ASGI app."""
    app = FastAPI(
        title="sbrush", version=sbrush.__version__, docs_url=None, redoc_url=None,
        description="Images of a student of one step or a few. Everything stays on this machine.",
    )  # fmt: skip
    _add_page(app)
    _add_own(app, service)
    app.include_router(openai_api.create_router(service))
    app.include_router(a1111_api.create_router(service))
    _add_errors(app)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["X-Sbrush-Seeds", "X-Sbrush-Notes"],
        )  # fmt: skip
    return Guard(app, access, service.counters)


def read_page() -> dict[str, tuple[bytes, str]]:
    """The page's three files as they come with the package: content and media type, by path."""
    folder = resources.files("sbrush.serving") / "page"
    return {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}


def _add_page(app: FastAPI) -> None:
    for path, (content, kind) in read_page().items():
        app.add_route(path, _constant(content, f"{kind}; charset=utf-8"), include_in_schema=False)


def _constant(content: bytes, kind: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=kind)


def _add_own(app: FastAPI, service: Service) -> None:
    @app.get("/api/info", summary="What the student can do")
    async def info() -> dict[str, Any]:
        return service.about()

    @app.post(
        "/api/draw", summary="One image, which a newer turn of the same client replaces", response_class=Response,
        responses=DRAWN,
    )  # fmt: skip
    async def draw(body: DrawBody) -> Response:
        turn = Turn(body.client, body.turn) if body.client else None
        requests = image_requests(body.prompt, body.seed, 1, service.check_settings(body.steps, body.negative))
        try:
            drawn = await service.draw(requests, turn)
        except Replaced:
            return Response(status_code=204)
        return Response(await encode(drawn[0]), media_type="image/png", headers=note_headers(drawn))

    @app.get("/health", summary="Whether the server draws")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": service.engine.waiting}

    @app.get("/metrics", summary="Counters in Prometheus's format", response_class=Response)
    async def metrics() -> Response:
        return Response(service.counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    """Every error in the one form of answers.py. None of them repeats what was sent."""

    @app.exception_handler(SbrushError)
    async def wrong(request: Request, problem: SbrushError) -> Response:
        return error(400 if problem.code == 2 else 500, str(problem), problem.hint)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        named = f"{place}: " if place and not place.isdecimal() else ""
        message = first["msg"] if first["type"] != "json_invalid" else "the body is no JSON"
        return error(400, f"{named}{message}", "/openapi.json describes every field", parameter=place or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, problem: HTTPException) -> Response:
        return error(
            problem.status_code, str(problem.detail), "/openapi.json lists what there is", headers=problem.headers
        )

    @app.exception_handler(Busy)
    async def busy(request: Request, problem: Busy) -> Response:
        return error(
            429, "too many images wait already", f"try again in {problem.seconds} s", code="queue_full",
            headers={"retry-after": str(problem.seconds)},
        )  # fmt: skip

    @app.exception_handler(Replaced)
    async def replaced(request: Request, problem: Replaced) -> Response:
        return error(409, "a newer request took its place", "ask again", code="replaced")

    @app.exception_handler(Stopped)
    async def stopped(request: Request, problem: Stopped) -> Response:
        return error(503, "the server stops", "ask again when it has started", headers={"retry-after": "10"})
