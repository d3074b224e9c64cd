"""From the exception tree to what a caller is told: the one table with HTTP statuses.

Outside the drop-in paths an error is a problem document (RFC 9457). On them it is the vendor's
envelope, for that is what its SDKs parse.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from gateway.api.requests import route_path
from gateway.domain.errors import (
    BodyTooLarge,
    CrossSiteRequest,
    GatewayError,
    HeadersTooLarge,
    InvalidParameter,
    InvalidTaskId,
    MethodNotAllowed,
    Overloaded,
    PathNotFound,
    TooManyRequests,
    UnsupportedMediaType,
    UpstreamCredentials,
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamOpen,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import render_json

# Looked up along the class's ancestors: a subclass without a row of its own is told as its parent.
PROBLEMS: Mapping[type[GatewayError], tuple[int, str]] = {
    InvalidTaskId: (400, "Invalid task ID"),
    InvalidParameter: (400, "Invalid parameter"),
    CrossSiteRequest: (403, "Cross-site request refused"),
    PathNotFound: (404, "No such path"),
    MethodNotAllowed: (405, "Method not allowed"),
    BodyTooLarge: (413, "Body too large"),
    UnsupportedMediaType: (415, "Unsupported media type"),
    TooManyRequests: (429, "Too many requests"),
    HeadersTooLarge: (431, "Headers too large"),
    UpstreamRejected: (502, "The upstream rejected the query"),
    UpstreamCredentials: (502, "The upstream refused the gateway's credentials"),
    UpstreamForbidden: (502, "The upstream refused the gateway's credentials"),
    UpstreamInvalid: (502, "The upstream's answer makes no sense"),
    UpstreamUnreachable: (502, "The upstream cannot be reached"),
    UpstreamThrottled: (503, "The upstream asks to slow down"),
    UpstreamOpen: (503, "The upstream is unwell and is not asked for now"),
    Overloaded: (503, "The gateway is overloaded"),
    UpstreamTimeout: (504, "The upstream did not answer in time"),
    GatewayError: (500, "Internal error"),
}

_COME_BACK = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})  # and say when
_RETRY_AFTER_SECONDS = 1.0  # when nobody knows better
_FAILURE = 20  # the vendor's word for it, in an envelope
INTERNAL = GatewayError("the gateway has a bug; its log says more under this request's id")


class Problems:
    """Turns exceptions into answers. `vendor_paths` are those whose callers parse envelopes."""

    def __init__(self, vendor_paths: Collection[str]) -> None:
        self._vendor_paths = frozenset(vendor_paths)

    def answer(self, scope: Scope, exc: Exception) -> Response:
        """Return the answer to a request that met this exception; one that nobody meant is `internal`."""
        all_headers: dict[str, str] = {}
        if isinstance(exc, HTTPException):
            all_headers.update(exc.headers or {})
            exc = _from_router(exc)
        error = exc if isinstance(exc, GatewayError) else INTERNAL
        scope["state"]["code"] = error.code  # for the request's log line
        status, title = lookup(error)
        if status in _COME_BACK:
            all_headers["Retry-After"] = str(math.ceil(error.retry_after or _RETRY_AFTER_SECONDS))
        all_headers["Cache-Control"] = "no-store"
        if status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            all_headers["Accept-Encoding"] = "identity"  # RFC 9110, 15.5.16
        if route_path(scope) in self._vendor_paths:
            return Response(render_json(_envelope(error)), status, all_headers, "application/json")
        problem = document(error, status, title, request_id=scope["state"]["request_id"])
        return Response(render_json(problem), status, all_headers, "application/problem+json")


def lookup(error: GatewayError) -> tuple[int, str]:
    """Return an error's HTTP status and title."""
    return next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)


def document(error: GatewayError, status: int, title: str, *, request_id: str) -> dict[str, Any]:
    """Return the problem document of RFC 9457, with our members `code`, `requestId` and `upstream`."""
    problem: dict[str, Any] = {
        "type": f"urn:sd-gateway:problem:{error.code}",
        "title": title,
        "status": status,
        "detail": str(error),
        "code": error.code,
        "requestId": request_id,
    }
    if isinstance(error, UpstreamError) and error.detail is not None:
        problem["upstream"] = _upstream(error.detail)
    return problem


def _upstream(detail: UpstreamDetail) -> dict[str, Any]:
    return {
        "invokeId": detail.invoke_id,
        "requestId": detail.request_id,
        "errCode": detail.err_code,
        "errMessage": detail.err_message,
        "subErrCode": detail.sub_err_code,
        "subErrMessage": detail.sub_err_message,
    }


def _envelope(error: GatewayError) -> dict[str, Any]:
    return {
        "status": _FAILURE,
        "apiInvokeId": None,
        "data": None,
        "subErrCode": None,
        "subErrMessage": None,
        "errCode": error.code,
        "errMessage": str(error),
        "startTime": None,
        "endTime": None,
    }


def _from_router(exc: HTTPException) -> GatewayError:
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed("this path does not answer to this method")
    return PathNotFound("no such path; /openapi.json lists those that exist")
