"""Maps exceptions to HTTP error responses: the only table of HTTP statuses.

An error is a problem document (RFC 9457). On the vendor's own paths it is the vendor's envelope, which the
vendor's SDKs parse.
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
    CircuitOpen,
    CredentialsRefused,
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
    UpstreamDetail,
    UpstreamError,
    UpstreamForbidden,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.domain.snapshot import render_json

# A subclass without its own row uses the row of its nearest ancestor.
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
    CredentialsRefused: (502, "The upstream refused the gateway's credentials"),
    UpstreamForbidden: (502, "The upstream refused the gateway's credentials"),
    UpstreamInvalid: (502, "Invalid response from the upstream"),
    UpstreamUnreachable: (502, "Upstream unreachable"),
    UpstreamThrottled: (503, "Rate limited by the upstream"),
    CircuitOpen: (503, "Circuit breaker open: the upstream has been failing"),
    Overloaded: (503, "Gateway overloaded"),
    UpstreamTimeout: (504, "Upstream timeout"),
    GatewayError: (500, "Internal error"),
}

_WITH_RETRY_AFTER = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_RETRY_AFTER_SECONDS = 1.0  # if the error has no value
_FAILURE = 20  # the envelope's `status` of a failed call
INTERNAL_ERROR = GatewayError("internal error; see the log of the gateway for this request ID")


class Problems:
    """Turns exceptions into responses. `vendor_paths` are the paths whose clients parse envelopes."""

    def __init__(self, vendor_paths: Collection[str]) -> None:
        self._vendor_paths = frozenset(vendor_paths)

    def response(self, scope: Scope, exc: Exception) -> Response:
        """Return the response for this exception; an unexpected exception has the code `internal`."""
        headers: dict[str, str] = {}
        if isinstance(exc, HTTPException):
            headers.update(exc.headers or {})
            if "Allow" in headers:  # Starlette joins a set, whose order differs between processes
                headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
            exc = _from_router(exc)
        error = exc if isinstance(exc, GatewayError) else INTERNAL_ERROR
        scope["state"]["code"] = error.code  # for the request log
        status, title = status_and_title(error)
        if status in _WITH_RETRY_AFTER:
            headers["Retry-After"] = str(math.ceil(error.retry_after or _RETRY_AFTER_SECONDS))
        headers["Cache-Control"] = "no-store"
        if status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            headers["Accept-Encoding"] = "identity"  # RFC 9110, 15.5.16
        if route_path(scope) in self._vendor_paths:
            return Response(render_json(_envelope(error)), status, headers, "application/json")
        problem = problem_document(error, status, title, request_id=scope["state"]["request_id"])
        return Response(render_json(problem), status, headers, "application/problem+json")


def status_and_title(error: GatewayError) -> tuple[int, str]:
    """Return the HTTP status and title of an error."""
    return next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)


def problem_document(error: GatewayError, status: int, title: str, *, request_id: str) -> dict[str, Any]:
    """Return the problem document (RFC 9457), with the extensions `code`, `requestId` and `upstream`."""
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
        return MethodNotAllowed("this path does not support this method")
    return PathNotFound("no such path; /openapi.json lists those that exist")
