"""POST /scc/...: drop-in paths for the vendor's SDKs.

Paths, request bodies and response envelopes are those of the vendor, byte for byte. Cache and in-flight
requests are shared with the simplified API. The client's signature and credentials are ignored. A request of
another gateway is refused (`upstream/loop_detection.py`).
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gateway.api.client_limits import client_key
from gateway.api.progress_response import cache_headers
from gateway.api.request_log import record_outcome
from gateway.api.requests import Headers, header, query_parameters, read_body
from gateway.api.server_extensions import while_connected
from gateway.api.task_parameters import checked_task_id
from gateway.domain.envelope import read_task_id
from gateway.domain.errors import InvalidParameter, PathNotFound, UnsupportedMediaType, UpstreamRejected
from gateway.domain.task import Operation, TaskKey
from gateway.progress.outcomes import LookupFailure, LookupSuccess
from gateway.progress.service import ProgressService
from gateway.upstream.loop_detection import MESSAGE, RESPONSE_HEADER, is_gateway

_GATEWAY_HEADER = (RESPONSE_HEADER[0].lower().encode(), RESPONSE_HEADER[1].encode())


class VendorEndpoint:
    """Responds to one operation with the upstream's own envelope."""

    def __init__(
        self, operation: Operation, service: ProgressService, *, max_body_bytes: int, body_seconds: float
    ) -> None:
        self._operation = operation
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond 200 with the envelope; a rejection by the vendor is passed on unchanged."""
        if scope["method"] != "POST":
            # Checked here: with a method in the route, the catch-all route behind it would respond 404.
            raise HTTPException(405, headers={"Allow": "POST"})
        query_parameters(scope)
        if is_gateway(header(scope["headers"], b"user-agent")):
            # Its upstream may be this gateway itself, which would wait for its own response.
            raise InvalidParameter(MESSAGE)
        if _is_encoded(scope["headers"]):
            raise UnsupportedMediaType("the body has a content coding; send it without Content-Encoding")
        body = await read_body(scope, receive, limit=self._max_body_bytes, seconds=self._body_seconds)
        key = TaskKey(self._operation, _task_id(body))
        envelope, headers = await self._envelope(scope, receive, key)
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(envelope))]
        headers.append(_GATEWAY_HEADER)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": envelope})

    async def _envelope(self, scope: Scope, receive: Receive, key: TaskKey) -> tuple[bytes, Headers]:
        outcome: LookupSuccess | LookupFailure | None = self._service.lookup(key)
        if outcome is None:
            read = self._service.get_after_miss(key, client=client_key(scope))
            outcome = await while_connected(scope, receive, read)
        try:
            result = record_outcome(scope, outcome)
        except UpstreamRejected as rejected:
            return rejected.envelope, []
        # The simplified paths serve a stale snapshot after a rejection; this path passes the rejection on.
        if isinstance(result.failure, UpstreamRejected):
            return result.failure.envelope, []
        return result.snapshot.envelope, cache_headers(result)


class UnknownOperation:
    """Refuses every other path below /scc/, with a list of the allowed ones."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._allowed = ", ".join(operation.path for operation in operations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raise PathNotFound."""
        raise PathNotFound(f"no such operation; the gateway forwards only: {self._allowed}")


def _is_encoded(headers: Headers) -> bool:
    codings = (header(headers, b"content-encoding") or "").split(",")
    return any(coding.strip().lower() not in {"", "identity"} for coding in codings)


def _task_id(body: bytes) -> str:
    try:
        task_id = read_task_id(body.removeprefix(BOM_UTF8))  # RFC 8259, 8.1: a parser may ignore it
    except ValueError as exc:
        raise InvalidParameter("the body is not JSON") from exc
    except TypeError as exc:
        raise InvalidParameter("the body is not a JSON object") from exc
    if not isinstance(task_id, str):
        raise InvalidParameter("the body has no taskId that is a string")
    return checked_task_id(task_id)
