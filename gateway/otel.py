"""Spans through OpenTelemetry, for installations with the extra `otel` (see `tracing.py`).

Names and attributes come from enums, route templates and exception codes; a task ID is an
attribute, never a name. Exceptions are told by their codes: a text or a trace may quote anything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import __version__
from gateway.api import ops
from gateway.api.middleware import METHODS
from gateway.api.requestlog import SPAN
from gateway.api.requests import header
from gateway.api.tracecontext import TraceParent, trace_parent
from gateway.models import TaskKey
from gateway.readings import Failed, Reading
from gateway.settings import SettingsError
from gateway.tracing import AsgiApp, Mark

_OK = "ok"
_SERVER_ERROR = 500
_FLUSH_SECONDS = 3.0  # at the end; well inside any grace period


class OtelTracing:
    """Makes the gateway's spans with a tracer of this provider, which it closes."""

    def __init__(self, provider: TracerProvider, *, flush_seconds: float = _FLUSH_SECONDS) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("gateway", __version__)
        self._flush_seconds = flush_seconds

    def around(self, app: AsgiApp, *, root_path: str) -> AsgiApp:
        """See `Tracing.around`."""
        return RequestSpans(app, tracer=self._tracer, root_path=root_path)

    @contextmanager
    def flight(self, key: TaskKey) -> Iterator[Mark]:
        """See `Tracing.flight`."""
        attributes = {"sd_gateway.operation": key.operation.value, "sd_gateway.task_id": key.task_id}
        with _span(self._tracer, f"flight {key.operation}", SpanKind.INTERNAL, attributes) as span:
            mark = Mark(span.get_span_context())
            try:
                yield mark
            finally:
                _conclude(span, mark)

    @contextmanager
    def call(self, key: TaskKey, *, number: int) -> Iterator[Mark]:
        """See `Tracing.call`: named as the semantic conventions for HTTP clients have it."""
        path = key.operation.path
        attributes: dict[str, AttributeValue] = {"http.request.method": "POST", "url.template": path}
        if number:
            attributes["http.request.resend_count"] = number
        with _span(self._tracer, f"POST {path}", SpanKind.CLIENT, attributes) as span:
            mark = Mark(span.get_span_context())
            try:
                yield mark
            finally:
                _conclude(span, mark)

    async def aclose(self) -> None:
        """See `Tracing.aclose`; a collector that takes too long over it is left."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop may have closed meanwhile
                loop.call_soon_threadsafe(sent.set)

        # No thread of the loop's executor: the loop would wait for it, however long it takes.
        threading.Thread(target=flush, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_seconds):
                await sent.wait()


class RequestSpans:
    """Makes a span of each request, around all that answers it; probes and scrapes have none."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer, root_path: str) -> None:
        self._app = app
        self._root_path = root_path
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or scope["path"].removeprefix(self._root_path) in ops.PROBES:
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with _span(self._tracer, "request", SpanKind.SERVER, {}, context=self._context(scope)) as span:
            context = span.get_span_context()
            state = scope.setdefault("state", {})
            state[SPAN] = TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}")
            try:
                await self._app(scope, receive, send_noted)
            finally:
                _describe(span, scope, status)

    def _context(self, scope: Scope) -> Context:
        if trace_parent(scope) is None:
            return Context()
        names = ("traceparent", "tracestate")
        given = {name: header(scope["headers"], name.encode()) for name in names}
        return self._propagator.extract(given, context=Context())


def from_environment(environ: Mapping[str, str]) -> OtelTracing:
    """Return the tracing that `environ` asks for; the SDK reads the rest of it (sampler, headers, …) itself.

    Raises: SettingsError for what it asks for and is not there.
    """
    if (exporter := environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()) not in {"", "otlp"}:
        raise SettingsError([f"OTEL_TRACES_EXPORTER = {exporter!r}: must be otlp or none"])
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := environ.get(variable) or "http/protobuf") != "http/protobuf":
            raise SettingsError([f"{variable} = {protocol!r}: must be http/protobuf"])
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # nobody named it
        resource = resource.merge(Resource({SERVICE_NAME: "sd-progress-gateway"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracing(provider)


@contextmanager
def _span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Mapping[str, AttributeValue],
    *,
    context: Context | None = None,
) -> Iterator[Span]:
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def _conclude(span: Span, mark: Mark) -> None:
    span.set_attribute("sd_gateway.outcome", mark.outcome)
    if mark.status is not None:
        span.set_attribute("http.response.status_code", mark.status)
    if mark.invoke_id is not None:
        span.set_attribute("sd_gateway.upstream.invoke_id", mark.invoke_id)
    if mark.outcome != _OK:
        span.set_attribute("error.type", mark.outcome)
        span.set_status(StatusCode.ERROR)


def _describe(span: Span, scope: Scope, status: int) -> None:
    """Tell of a request what is known at its end, and link it to the flights that it waited for."""
    state = scope["state"]
    route = scope["route"].path_format if "route" in scope else ""
    known = scope["method"] in METHODS  # the conventions' words for the others: HTTP and _OTHER
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
    outcomes: Sequence[Reading | Failed] = state.get("outcomes", ())
    if len(outcomes) == 1:
        span.set_attribute("sd_gateway.task_id", outcomes[0].key.task_id)
        span.set_attribute("sd_gateway.cache", outcomes[0].source.value)
    for outcome in outcomes:
        if outcome.landing is not None and outcome.landing.span is not None:
            span.add_link(outcome.landing.span)
