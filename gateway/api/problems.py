"""Error responses: the HTTP status and title of each exception, and the body that describes it.

The body is a problem document (RFC 9457). On the vendor's own paths it is an envelope, because the vendor's
SDKs parse that. No other module maps exceptions to HTTP statuses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from gateway.api.pages import Pages
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
    KeyPairMissing,
    MethodNotAllowed,
    NotFinished,
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
from gateway.upstream.loop_detection import RESPONSE_HEADER

# A subclass without its own row uses the row of its nearest ancestor.
PROBLEMS: Mapping[type[GatewayError], tuple[int, str]] = {
    InvalidTaskId: (400, "Invalid task ID"),
    InvalidParameter: (400, "Invalid parameter"),
    CrossSiteRequest: (403, "Cross-site request refused"),
    PathNotFound: (404, "No such path"),
    MethodNotAllowed: (405, "Method not allowed"),
    NotFinished: (409, "The task has not succeeded"),
    BodyTooLarge: (413, "Body too large"),
    UnsupportedMediaType: (415, "Unsupported media type"),
    TooManyRequests: (429, "Too many requests"),
    HeadersTooLarge: (431, "Headers too large"),
    UpstreamRejected: (502, "The upstream rejected the query"),
    CredentialsRefused: (502, "The upstream did not authorize the query"),
    KeyPairMissing: (502, "The gateway has no credentials"),
    UpstreamForbidden: (502, "The upstream did not authorize the query"),
    UpstreamInvalid: (502, "Invalid response from the upstream"),
    UpstreamUnreachable: (502, "Upstream unreachable"),
    UpstreamThrottled: (503, "Rate limit for upstream calls reached"),
    CircuitOpen: (503, "Circuit breaker open: the upstream has been failing"),
    Overloaded: (503, "Gateway overloaded"),
    UpstreamTimeout: (504, "Upstream timeout"),
    GatewayError: (500, "Internal error"),
}

_RETRY_AFTER_STATUSES = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_DEFAULT_RETRY_AFTER_SECONDS = 1.0  # for errors without a `retry_after`
_FAILED_CALL = 20  # the `status` of an envelope that reports a failure
INTERNAL_ERROR = GatewayError("internal error; see the log of the gateway for this request ID")


class Problems:
    """Makes the responses for exceptions. On `vendor_paths` their body is an envelope.

    A browser that opens a path that does not exist receives one of the `pages`.
    """

    def __init__(self, vendor_paths: Collection[str], pages: Pages | None = None) -> None:
        self._vendor_paths = frozenset(vendor_paths)
        self._pages = pages

    def response(self, scope: Scope, exc: Exception) -> Response:
        """Return the response for an exception. The code of an unexpected exception is `internal`."""
        headers: dict[str, str] = {}
        if isinstance(exc, HTTPException):
            headers.update(exc.headers or {})
            # Starlette joins the methods of a set, whose order differs between processes.
            if "Allow" in headers:
                headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
            exc = _routing_error(exc)
        error = exc if isinstance(exc, GatewayError) else INTERNAL_ERROR
        scope["state"]["code"] = error.code  # for the request log
        status, title = status_and_title(error)
        if status in _RETRY_AFTER_STATUSES:
            headers["Retry-After"] = str(math.ceil(error.retry_after or _DEFAULT_RETRY_AFTER_SECONDS))
        elif isinstance(error, NotFinished) and error.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        headers["Cache-Control"] = "no-store"
        if status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            headers["Accept-Encoding"] = "identity"  # RFC 9110, 15.5.16
        if route_path(scope).startswith("/scc/"):  # so that a gateway recognizes errors of a gateway, too
            headers.update([RESPONSE_HEADER])
        if route_path(scope) in self._vendor_paths:
            return Response(render_json(_error_envelope(error)), status, headers, "application/json")
        if self._pages is not None and isinstance(error, PathNotFound):
            page = self._pages.not_found(scope)
            if page is not None:
                return Response(page, status, {**self._pages.headers, **headers}, "text/html")
        problem = problem_document(error, status, title, request_id=scope["state"]["request_id"])
        return Response(render_json(problem), status, headers, "application/problem+json")


def status_and_title(error: GatewayError) -> tuple[int, str]:
    """Return the HTTP status of an error, and the title of its problem document."""
    return next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)


def problem_document(error: GatewayError, status: int, title: str, *, request_id: str) -> dict[str, Any]:
    """Return the problem document (RFC 9457), with its extension members."""
    problem: dict[str, Any] = {
        "type": f"urn:sd-gateway:problem:{error.code}",
        "title": title,
        "status": status,
        "detail": str(error),
        "code": error.code,
        "requestId": request_id,
    }
    if isinstance(error, UpstreamError) and error.detail is not None:
        problem["upstream"] = _upstream_member(error.detail)
    if isinstance(error, NotFinished):
        problem["taskStatus"] = error.task_status
    return problem


def _upstream_member(detail: UpstreamDetail) -> dict[str, Any]:
    """Return what the upstream reported, with the member names of its envelopes."""
    return {
        "invokeId": detail.invoke_id,
        "requestId": detail.request_id,
        "errCode": detail.err_code,
        "errMessage": detail.err_message,
        "subErrCode": detail.sub_err_code,
        "subErrMessage": detail.sub_err_message,
    }


def _error_envelope(error: GatewayError) -> dict[str, Any]:
    """Return an error in the form of the vendor's envelope."""
    return {
        "status": _FAILED_CALL,
        "apiInvokeId": None,
        "data": None,
        "subErrCode": None,
        "subErrMessage": None,
        "errCode": error.code,
        "errMessage": str(error),
        "startTime": None,
        "endTime": None,
    }


def _routing_error(exc: HTTPException) -> GatewayError:
    """Return the error for an exception of Starlette's router."""
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed("this path does not support this method")
    return PathNotFound("no such path; /openapi.json lists those that exist")
