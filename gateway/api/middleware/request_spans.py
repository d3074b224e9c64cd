"""An OpenTelemetry span for each request. Needs the extra `otel`; imported only when tracing is on."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import operator_endpoints
from gateway.api.middleware.telemetry import METHODS
from gateway.api.request_log import SPAN
from gateway.api.requests import header
from gateway.api.trace_context import TraceParent, trace_parent
from gateway.progress.outcomes import LookupFailure, LookupSuccess
from gateway.telemetry.opentelemetry import start_span

_SERVER_ERROR = 500


class RequestSpans:
    """Middleware that creates a span for each request, except for probes and scrapes."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer, root_path: str) -> None:
        self._app = app
        self._root_path = root_path
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if (
            scope["type"] != "http"
            or scope["path"].removeprefix(self._root_path) in operator_endpoints.PROBES
        ):
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_recording_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with start_span(self._tracer, "request", SpanKind.SERVER, {}, context=self._context(scope)) as span:
            context = span.get_span_context()
            state = scope.setdefault("state", {})
            state[SPAN] = TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}")
            try:
                await self._app(scope, receive, send_recording_status)
            finally:
                _describe(span, scope, status)

    def _context(self, scope: Scope) -> Context:
        if trace_parent(scope) is None:
            return Context()
        names = ("traceparent", "tracestate")
        headers = {name: header(scope["headers"], name.encode()) for name in names}
        return self._propagator.extract(headers, context=Context())


def _describe(span: Span, scope: Scope, status: int) -> None:
    """Set the span's attributes at the end of a request, and link it to the fetches that it waited for."""
    state = scope["state"]
    route = scope["route"].path_format if "route" in scope else ""
    known = scope["method"] in METHODS  # the semantic conventions use HTTP and _OTHER otherwise
    span.update_name(f"{scope['method'] if known else 'HTTP'} {route}".rstrip())
    span.set_attribute("http.request.method", scope["method"] if known else "_OTHER")
    span.set_attribute("url.scheme", scope["scheme"])
    span.set_attribute("sd_gateway.request_id", state["request_id"])
    if route:
        span.set_attribute("http.route", route)
    if status:
        span.set_attribute("http.response.status_code", status)
    if status >= _SERVER_ERROR:
        span.set_attribute("error.type", state.get("code", str(status)))
        span.set_status(StatusCode.ERROR)
    outcomes: Sequence[LookupSuccess | LookupFailure] = state.get("outcomes", ())
    if len(outcomes) == 1:
        span.set_attribute("sd_gateway.task_id", outcomes[0].key.task_id)
        span.set_attribute("sd_gateway.cache", outcomes[0].cache_status.value)
    for outcome in outcomes:
        if outcome.fetch_outcome is not None and outcome.fetch_outcome.span is not None:
            span.add_link(outcome.fetch_outcome.span)
