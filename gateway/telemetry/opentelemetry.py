"""Spans with OpenTelemetry, for installations with the extra `otel` (see `tracing.py`).

Span names and attributes come from enums, route templates and exception codes. A task ID is an attribute,
never part of a name. Exceptions are recorded by their code only, because a message or traceback may contain
a secret.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.domain.task import TaskKey
from gateway.settings.errors import SettingsError
from gateway.telemetry.tracing import SpanRecord

_OK = "ok"
_FLUSH_SECONDS = 3.0  # at shutdown; shorter than any usual grace period


class OpenTelemetryTracing:
    """Creates spans with a tracer of this provider, and owns the provider."""

    def __init__(self, provider: TracerProvider, *, flush_seconds: float = _FLUSH_SECONDS) -> None:
        self._provider = provider
        self.tracer = provider.get_tracer("gateway", __version__)
        self._flush_seconds = flush_seconds

    @contextmanager
    def in_flight_span(self, key: TaskKey) -> Iterator[SpanRecord]:
        """See `Tracing.in_flight_span`."""
        attributes = {"sd_gateway.operation": key.operation.value, "sd_gateway.task_id": key.task_id}
        with start_span(self.tracer, f"flight {key.operation}", SpanKind.INTERNAL, attributes) as span:
            record = SpanRecord(span.get_span_context())
            try:
                yield record
            finally:
                _record_outcome(span, record)

    @contextmanager
    def call_span(self, key: TaskKey, *, number: int) -> Iterator[SpanRecord]:
        """See `Tracing.call_span`. The span follows the semantic conventions for HTTP clients."""
        path = key.operation.path
        attributes: dict[str, AttributeValue] = {"http.request.method": "POST", "url.template": path}
        if number:
            attributes["http.request.resend_count"] = number
        with start_span(self.tracer, f"POST {path}", SpanKind.CLIENT, attributes) as span:
            record = SpanRecord(span.get_span_context())
            try:
                yield record
            finally:
                _record_outcome(span, record)

    async def aclose(self) -> None:
        """See `Tracing.aclose`. Returns after `flush_seconds` even if the collector has not responded."""
        loop, flushed = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the event loop may be closed by now
                loop.call_soon_threadsafe(flushed.set)

        # A daemon thread, not the event loop's executor: closing the loop would wait for the executor.
        threading.Thread(target=flush, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_seconds):
                await flushed.wait()


def from_environment(environ: Mapping[str, str]) -> OpenTelemetryTracing:
    """Return the tracing that the standard OpenTelemetry variables in `environ` configure.

    The SDK reads the other variables (sampler, headers, …) from the process environment.

    Raises:
        SettingsError: A variable selects an unsupported exporter or protocol.
    """
    if (exporter := environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()) not in {"", "otlp"}:
        raise SettingsError([f"OTEL_TRACES_EXPORTER = {exporter!r}: must be otlp or none"])
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := environ.get(variable) or "http/protobuf") != "http/protobuf":
            raise SettingsError([f"{variable} = {protocol!r}: must be http/protobuf"])
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # no configured name
        resource = resource.merge(Resource({SERVICE_NAME: "sd-progress-gateway"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetryTracing(provider)


@contextmanager
def start_span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Mapping[str, AttributeValue],
    *,
    context: Context | None = None,
) -> Iterator[Span]:
    """Start a span that records no exception, because its message may contain a secret."""
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def _record_outcome(span: Span, record: SpanRecord) -> None:
    span.set_attribute("sd_gateway.outcome", record.outcome)
    if record.status is not None:
        span.set_attribute("http.response.status_code", record.status)
    if record.invoke_id is not None:
        span.set_attribute("sd_gateway.upstream.invoke_id", record.invoke_id)
    if record.outcome != _OK:
        span.set_attribute("error.type", record.outcome)
        span.set_status(StatusCode.ERROR)
