"""Error answers, in one form that the clients of both APIs read."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(
    status: int,
    message: str,
    hint: str,
    *,
    parameter: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """What went wrong and what to do: `error` as OpenAI's clients read it, `detail` as A1111's.

    `parameter`: the field of the request that is wrong; `code`: a word for programs.
    """
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": f"{message}. {hint[:1].upper()}{hint[1:]}.", "type": kind, "param": parameter, "code": code}
    return JSONResponse({"error": body, "detail": body["message"]}, status, headers)
