"""The exception hierarchy of the gateway.

    GatewayError
    ├── RequestError                the caller must change the request or its rate
    │   ├── InvalidTaskId
    │   ├── InvalidParameter
    │   ├── PathNotFound
    │   ├── MethodNotAllowed
    │   ├── NotFinished
    │   ├── CrossSiteRequest
    │   ├── BodyTooLarge
    │   ├── UnsupportedMediaType
    │   ├── HeadersTooLarge
    │   └── TooManyRequests
    ├── Overloaded                  one of the gateway's own limits is reached
    └── UpstreamError               the upstream or the connection to it failed
        ├── UpstreamRejected        an envelope that reports a failure
        ├── CredentialsRefused      credentials rejected or missing: base class of the next five
        │   ├── KeyPairRefused      key, signature or permission rejected
        │   ├── KeyPairMissing      no key pair: no request was sent
        │   ├── TimestampRefused    timestamp rejected
        │   ├── NonceRefused        nonce rejected; a retry with a new one succeeds
        │   └── QuotaExhausted      quota exhausted, or a bill unpaid
        ├── UpstreamForbidden       query of one task rejected, credentials not named
        ├── UpstreamThrottled       rate limit of the upstream reached
        │   └── RateLimited    our own rate limiter: no request was sent
        ├── CircuitOpen             circuit breaker open: no request was sent
        ├── UpstreamInvalid         the response is not a valid envelope
        │   ├── UpstreamIsGateway   the response comes from an sd-progress-gateway
        │   ├── ResponseForAnotherTask  the response names another task
        │   ├── UnattributedResponse  the response may belong to another task's call
        │   └── UpstreamBusy        temporary failure of the upstream
        ├── UpstreamUnreachable     DNS, connect, TLS or reset
        └── UpstreamTimeout         deadline exceeded

Problem responses and metrics use the `code` of each class. The classes have no HTTP status:
`api/problems.py` maps them to responses. The text of an error is a fixed string that callers may see. Texts
from the upstream go into `UpstreamDetail`, already redacted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class UpstreamDetail:
    """IDs, codes and messages of an upstream response, already redacted."""

    invoke_id: str | None = None
    request_id: str | None = None
    err_code: str | None = None
    err_message: str | None = None
    sub_err_code: str | None = None
    sub_err_message: str | None = None


class GatewayError(Exception):
    """Base class of all errors that the gateway raises on purpose.

    Attributes:
        code: The problem code; stable, and part of the API.
        retry_after: Seconds after which a retry may succeed, or None if unknown.
    """

    code = "internal"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __copy__(self) -> Self:
        """Return the error without traceback, context and cause, to be cached or raised for another caller.

        The traceback of a raised error references every frame on its way and the objects in it, such as a
        request or a body of a megabyte. If a frame references the error too, that is a reference cycle, which
        only the garbage collector can free.
        """
        copied = self.__new__(type(self), *self.args)
        vars(copied).update(vars(self))
        return copied


class RequestError(GatewayError):
    """The caller must change the request or its rate."""


class InvalidTaskId(RequestError):
    """A task ID that is not 1 to 64 of `A-Z a-z 0-9 _ -`."""

    code = "invalid-task-id"


class InvalidParameter(RequestError):
    """Any other error in the query string, a header or the body; the message names it."""

    code = "invalid-parameter"


class PathNotFound(RequestError):
    """No such path."""

    code = "not-found"


class MethodNotAllowed(RequestError):
    """The path does not support this method."""

    code = "method-not-allowed"


class NotFinished(RequestError):
    """A result is requested before the task has succeeded. `task_status` is the status of the task."""

    code = "not-finished"

    def __init__(
        self, message: str, *, task_status: str = "unknown", retry_after: float | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.task_status = task_status


class CrossSiteRequest(RequestError):
    """A browser sent the request for another site's page, whose origin is not in `server.cors_origins`."""

    code = "cross-site-request"


class BodyTooLarge(RequestError):
    """The request body is larger than `limits.max_body_bytes`."""

    code = "body-too-large"


class UnsupportedMediaType(RequestError):
    """The request body is compressed."""

    code = "unsupported-media-type"


class HeadersTooLarge(RequestError):
    """The request headers exceed `server.max_header_bytes` or `server.max_header_count`."""

    code = "headers-too-large"


class TooManyRequests(RequestError):
    """The client exceeds `limits.requests_per_second` or `limits.subscriptions_per_client`."""

    code = "too-many-requests"


class Overloaded(GatewayError):
    """One of the gateway's own limits is reached."""

    code = "overloaded"


class UpstreamError(GatewayError):
    """A query of the upstream that failed.

    Attributes:
        transient: Whether a retry with a new signature may succeed.
        detail: What the response said, redacted; None without a response that says anything.
        cause: Why the upstream could not be reached, or that it is a gateway, for operators. Otherwise "",
            also if no more is known than that it did not respond.
    """

    transient = False

    def __init__(
        self,
        message: str,
        *,
        detail: UpstreamDetail | None = None,
        retry_after: float | None = None,
        cause: str = "",
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.detail = detail
        self.cause = cause

    @property
    def invoke_id(self) -> str | None:
        """The ID of the call for the vendor's support: from the service, or else from its API gateway."""
        return None if self.detail is None else self.detail.invoke_id or self.detail.request_id


class UpstreamRejected(UpstreamError):
    """The vendor rejected the query, usually because it does not know the task.

    The `status` of the envelope is not 10. `envelope` is the response body, redacted.
    """

    code = "upstream-rejected"

    def __init__(self, message: str, *, envelope: bytes, detail: UpstreamDetail) -> None:
        super().__init__(message, detail=detail)
        self.envelope = envelope


class CredentialsRefused(UpstreamError):
    """The vendor's API gateway rejected the credentials of the gateway: no query works.

    Only its subclasses are raised.
    """

    code = "upstream-credentials"


class KeyPairRefused(CredentialsRefused):
    """The vendor's API gateway rejected the key, the signature or the permission to call."""


class KeyPairMissing(CredentialsRefused):
    """The gateway has no key pair: no request was sent."""


class TimestampRefused(CredentialsRefused):
    """The vendor's API gateway rejected the timestamp: one of the two clocks is wrong."""


class NonceRefused(CredentialsRefused):
    """The vendor's API gateway has seen the nonce before: the request reached it twice."""

    transient = True


class QuotaExhausted(CredentialsRefused):
    """The vendor's API gateway rejected the account: its quota is exhausted or a bill is unpaid."""


class UpstreamForbidden(UpstreamError):
    """The vendor refused this task with a 401 or 403 that does not name the credentials."""

    code = "upstream-credentials"


class UpstreamThrottled(UpstreamError):
    """The upstream's rate limit is reached, or the gateway's own limit for upstream calls."""

    code = "upstream-throttled"


class RateLimited(UpstreamThrottled):
    """The gateway's rate limiter has no permit now: the query is queued, or has failed for this reason."""


class CircuitOpen(UpstreamError):
    """The circuit breaker is open: the upstream has been failing."""

    code = "upstream-open"


class UpstreamInvalid(UpstreamError):
    """The response is not JSON, not an envelope, for another task, or too large."""

    code = "upstream-invalid"


class UpstreamIsGateway(UpstreamInvalid):
    """The response comes from an sd-progress-gateway: this one, or another."""


class ResponseForAnotherTask(UpstreamInvalid):
    """The response names another task than the requested one."""


class UnattributedResponse(UpstreamInvalid):
    """A failure that may be the response to another task's call. It has no detail of the response.

    The call is repeated on a new connection. Callers see this error only if that is not possible in time.
    """

    transient = True


class UpstreamBusy(UpstreamInvalid):
    """A temporary failure of the service or of the vendor's API gateway, without an envelope."""

    transient = True


class UpstreamUnreachable(UpstreamError):
    """No response: DNS, connect or TLS failed, or the connection broke."""

    code = "upstream-unreachable"
    transient = True


class UpstreamTimeout(UpstreamError):
    """A deadline was exceeded: the gateway's or one of the upstream's."""

    code = "upstream-timeout"
    transient = True


# Texts for callers, for a failure about which no more is known than its type.
GENERIC_TEXT: Mapping[type[UpstreamError], str] = {
    UpstreamBusy: "the upstream is temporarily unavailable",
    UpstreamForbidden: "the upstream refused this query without a reason",
    UpstreamInvalid: "the upstream's response is not valid",
    UpstreamThrottled: "the upstream asks to slow down",
}
