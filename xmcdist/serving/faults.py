"""Errors as every answer tells them: ``{"error": {"type", "message", "field"?}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi import Request, Response
from starlette.exceptions import HTTPException

__all__ = ["Fault", "fault_response", "http_fault", "unforeseen"]

_TYPES = {404: "not_found", 405: "method_not_allowed"}


class Fault(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        kind: a short name for programs, which stays the same.
        message: what is wrong and what to do, for people.
        field: of the request, ``texts[3]``.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field = status, kind, message, field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        error = {"type": self.kind, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        # In ASCII: what a client sent, and is quoted, can then hold nothing that cannot be encoded.
        body = json.dumps({"error": error})
        return Response(body, self.status, self.headers, "application/json")


async def fault_response(_: Request, fault: Exception) -> Response:
    """Handler of `Fault`."""
    assert isinstance(fault, Fault)
    return fault.response()


async def http_fault(request: Request, error: Exception) -> Response:
    """Handler of what the framework itself refuses: unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:200]!r}; /openapi.json lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "another method")
        message = f"{request.method[:20]} is not answered at {request.url.path!r}; use {allowed}"
    kind = _TYPES.get(error.status_code, "http_error")
    return Fault(error.status_code, kind, message, headers=error.headers).response()


async def unforeseen(_: Request, __: Exception) -> Response:
    """Handler of everything else; the traceback goes to the log, never to a client."""
    return Fault(500, "internal", "the server met an error of its own; its log tells which").response()
