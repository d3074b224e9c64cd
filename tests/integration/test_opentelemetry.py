"""Spans: their content, their relations, and their export to a collector."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.telemetry.opentelemetry import OpenTelemetryTracing
from gateway.telemetry.redaction import MASK
from tests.integration.test_in_flight import ask, held_upstream
from tests.support import harness
from tests.support.harness import (
    KEY,
    SECRET,
    Gateway,
    RawUpstream,
    Simulator,
    drained,
    framed,
    free_port,
    fresh_id,
    running,
    serving,
    until,
)

Launch = Callable[..., Gateway]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROGRESS = "GET /v1/progress/{taskId}"
FLIGHT, CALL = "flight sd_get_progress", "POST /scc/sd_get_progress"


class Traced:
    """A gateway with tracing, and its spans."""

    def __init__(self, launch: Launch, endpoint: str, **sections: Any) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.gate = launch(endpoint, tracing=OpenTelemetryTracing(provider), **sections)

    def spans(self, name: str, count: int) -> list[ReadableSpan]:
        """Wait until `count` spans of this name have ended; return them."""

        def ended() -> list[ReadableSpan]:
            found = [span for span in self.all() if span.name == name]
            return found if len(found) >= count else []

        found: list[ReadableSpan] = until(ended, f"{count} spans {name!r} in {[s.name for s in self.all()]}")
        assert len(found) == count
        return found

    def span(self, name: str) -> ReadableSpan:
        """Wait for the only span of this name."""
        return self.spans(name, 1)[0]

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def traced(simulator: Simulator, launch: Launch) -> Traced:
    return Traced(launch, simulator.url)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def linked(span: ReadableSpan) -> list[int]:
    """Return the IDs of the spans that this one is linked to."""
    return [link.context.span_id for link in span.links]


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


# Content


def test_otel_request_span(simulator: Simulator, traced: Traced) -> None:
    """The span of a request has the name of its route, and the response and cache status as attributes."""
    task = simulator.task()
    answer = traced.gate.get(task)
    span = traced.span(PROGRESS)
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span) == {
        "http.request.method": "GET",
        "http.route": "/v1/progress/{taskId}",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "sd_gateway.request_id": answer.headers["x-request-id"],
        "sd_gateway.task_id": task,
        "sd_gateway.cache": "miss",
    }


def test_otel_flight_and_call_spans(simulator: Simulator, traced: Traced) -> None:
    """An in-flight request has its own trace with the upstream request in it; callers are linked to it."""
    task = simulator.task()
    traced.gate.get(task)
    request, flight, call = traced.span(PROGRESS), traced.span(FLIGHT), traced.span(CALL)
    assert (flight.kind, flight.parent) == (SpanKind.INTERNAL, None)
    assert attributes(flight) == {
        "sd_gateway.operation": "sd_get_progress",
        "sd_gateway.task_id": task,
        "sd_gateway.outcome": "ok",
    }
    assert call.kind is SpanKind.CLIENT
    assert call.parent is not None
    assert call.parent.span_id == id_of(flight)
    values = attributes(call)
    assert values.pop("sd_gateway.upstream.invoke_id").startswith("i_")
    assert values == {
        "http.request.method": "POST",
        "url.template": "/scc/sd_get_progress",
        "http.response.status_code": 200,
        "sd_gateway.outcome": "ok",
    }
    assert trace_of(call) == trace_of(flight) != trace_of(request)
    assert linked(request) == [id_of(flight)]


def test_otel_spans_contain_no_credentials(launch: Launch) -> None:
    """The vendor's ID of a successful call is redacted in its span."""

    def behaviour(connection: socket.socket, request: harness.Request) -> None:
        envelope = json.loads(request.envelope()) | {"apiInvokeId": "x-ca-key: another-access-key"}
        connection.sendall(framed(json.dumps(envelope).encode()))

    with RawUpstream(behaviour) as upstream:
        traced = Traced(launch, upstream.url)
        assert traced.gate.get(fresh_id()).status_code == 200
        assert attributes(traced.span(CALL))["sd_gateway.upstream.invoke_id"] == f"x-ca-key: {MASK}"


def test_otel_attempts_are_numbered(simulator: Simulator, traced: Traced) -> None:
    """Each attempt is a span with its number and outcome; the in-flight request has the final outcome."""
    simulator.fault("status", status=503, times=1)
    traced.gate.get(simulator.task())
    calls = traced.spans(CALL, 2)
    assert [attributes(call).get("http.request.resend_count") for call in calls] == [None, 1]
    assert [attributes(call)["sd_gateway.outcome"] for call in calls] == ["upstream-invalid", "ok"]
    assert [attributes(call)["http.response.status_code"] for call in calls] == [503, 200]
    assert attributes(calls[0])["error.type"] == "upstream-invalid"
    assert [call.status.status_code for call in calls] == [StatusCode.ERROR, StatusCode.UNSET]
    assert traced.span(FLIGHT).status.status_code is StatusCode.UNSET


def test_otel_repeated_calls_without_a_retry_are_numbered(simulator: Simulator, traced: Traced) -> None:
    """A request signed again with the corrected clock has a number, although it is not a retry."""
    simulator.ahead_seconds = 3600
    assert traced.gate.get(simulator.task()).status_code == 200
    calls = traced.spans(CALL, 2)
    assert [attributes(call).get("http.request.resend_count") for call in calls] == [None, 1]
    assert [attributes(call)["sd_gateway.outcome"] for call in calls] == ["upstream-credentials", "ok"]


def test_otel_failures(traced: Traced) -> None:
    """Every span has the code of a failure, the call has the vendor's ID, and none has a message."""
    assert traced.gate.get(fresh_id()).status_code == 502
    for name in (PROGRESS, FLIGHT, CALL):
        span = traced.span(name)
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert attributes(span)["error.type"] == "upstream-rejected"
        assert span.events == ()
    assert attributes(traced.span(CALL))["sd_gateway.upstream.invoke_id"].startswith("i_")
    assert traced.gate.client.get("/nothing").status_code == 404
    unrouted = traced.span("GET")
    assert unrouted.status.status_code is StatusCode.UNSET
    assert "http.route" not in attributes(unrouted)
    traced.gate.client.request("PROPFIND", "/nothing")
    assert attributes(traced.span("HTTP"))["http.request.method"] == "_OTHER"


def test_otel_spans_contain_no_secret(simulator: Simulator, traced: Traced) -> None:
    """Spans contain no access key, even if the upstream quotes it; no span name contains a task ID."""
    simulator.fault("refuse", code="A403IS", message=f"Invalid Signature, Server StringToSign:`POST#{KEY}`")
    task = simulator.task()
    assert traced.gate.get(task).status_code == 502
    traced.span(PROGRESS)
    assert {span.name for span in traced.all()} == {PROGRESS, FLIGHT, CALL}
    for span in traced.all():
        assert task not in span.name
        assert KEY not in span.to_json()
        assert SECRET not in span.to_json()
        assert "StringToSign" not in span.to_json()


def test_otel_abandoned_request(simulator: Simulator, traced: Traced) -> None:
    """A request whose client has disconnected has a span without a status code."""
    request = f"GET /v1/progress/{simulator.task()}?wait=60 HTTP/1.1\r\nhost: x\r\nif-none-match: *\r\n\r\n"
    with traced.gate.connect() as connection:
        connection.sendall(request.encode())
        until(lambda: traced.gate.metric("watchers", kind="longpoll") == 1, "the long poll waits")
    assert "http.response.status_code" not in attributes(traced.span(PROGRESS))


# Relations


def test_otel_waiters_are_linked_to_their_in_flight_request(launch: Launch) -> None:
    """All requests that share an in-flight request are linked to it; a cache hit has no link."""
    with held_upstream() as (upstream, released), ExitStack() as callers:
        traced = Traced(launch, upstream.url, cache={"running_seconds": 600})
        task = fresh_id()
        waiting = [callers.enter_context(ask(traced.gate, task)) for _ in range(3)]
        released.set()
        for connection in waiting:
            drained(connection)
        flight = traced.span(FLIGHT)
        requests = traced.spans(PROGRESS, 3)
        assert [linked(request) for request in requests] == [[id_of(flight)]] * 3
        cache_statuses = sorted(attributes(request)["sd_gateway.cache"] for request in requests)
        assert cache_statuses == ["collapsed", "collapsed", "miss"]
        assert len({trace_of(span) for span in [flight, *requests]}) == 4
        traced.gate.get(task)
        assert linked(traced.spans(PROGRESS, 4)[-1]) == []


def test_otel_batch_is_linked_to_each_in_flight_request(simulator: Simulator, traced: Traced) -> None:
    """A batch is linked to the in-flight requests of all its tasks, including failed ones."""
    tasks = [simulator.task(), simulator.task(), fresh_id()]
    traced.gate.client.get("/v1/progress", params={"taskId": tasks})
    in_flight = traced.spans(FLIGHT, 3)
    batch = traced.span("GET /v1/progress")
    assert sorted(linked(batch)) == sorted(map(id_of, in_flight))
    assert "sd_gateway.task_id" not in attributes(batch)


def test_otel_continues_the_callers_trace(simulator: Simulator, traced: Traced) -> None:
    """A request is in its caller's trace, its in-flight request is not, and the upstream gets no trace."""
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "congo=t61rcWkgMzE"}
    traced.gate.get(simulator.task(), headers=headers)
    request, flight = traced.span(PROGRESS), traced.span(FLIGHT)
    assert request.parent is not None
    assert (trace_of(request), f"{request.parent.span_id:016x}") == (TRACE, SPAN)
    assert request.parent.is_remote
    assert request.context is not None
    assert request.context.trace_state.get("congo") == "t61rcWkgMzE"
    assert trace_of(flight) != TRACE
    [received] = simulator.requests()
    assert not {"traceparent", "tracestate", "baggage"} & set(received["headers"])
    assert TRACE not in str(received)
    assert trace_of(flight) not in str(received)


@pytest.mark.parametrize("parent", ["00-junk", f"00-{TRACE}-{'0' * 16}-01"])
def test_otel_ignores_an_invalid_parent(simulator: Simulator, traced: Traced, parent: str) -> None:
    """With an invalid parent a new trace begins."""
    traced.gate.get(simulator.task(), headers={"traceparent": parent})
    span = traced.span(PROGRESS)
    assert span.parent is None
    assert trace_of(span) != TRACE


def test_otel_respects_a_parent_that_is_not_sampled(simulator: Simulator, traced: Traced) -> None:
    """An unsampled parent is respected, except for the in-flight request, which serves other callers too."""
    traced.gate.get(simulator.task(), headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    traced.span(FLIGHT)
    traced.gate.get(simulator.task())  # the span of this request is the first
    assert trace_of(traced.span(PROGRESS)) != TRACE


@pytest.mark.parametrize("prefix", ["", "/prefix"])
def test_otel_ignores_probes_and_scrapes(simulator: Simulator, launch: Launch, prefix: str) -> None:
    """Probes and scrapes create no spans; a task whose ID is `metrics` does."""
    traced = Traced(launch, simulator.url, server={"root_path": "/prefix"})
    for path in ("/healthz", "/readyz", "/metrics"):
        assert traced.gate.client.get(prefix + path).status_code == 200
    traced.gate.client.get(f"{prefix}/v1/progress/metrics")
    traced.span(PROGRESS)
    assert {span.name for span in traced.all() if span.kind is SpanKind.SERVER} == {PROGRESS}


# Export


class Collector:
    """A collector that receives spans over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.app = Starlette(routes=[Route("/v1/traces", self._receive, methods=["POST"])])

    async def _receive(self, request: Request) -> Response:
        assert request.headers["content-type"] == "application/x-protobuf"
        self.requests.append(ExportTraceServiceRequest.FromString(await request.body()))
        return Response(b"", media_type="application/x-protobuf")

    def names(self) -> set[str]:
        """Return the names of all received spans."""
        return {
            span.name
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def resource(self) -> dict[str, str]:
        """Return the resource attributes of the sender."""
        sent = self.requests[0].resource_spans[0].resource.attributes
        return {attribute.key: attribute.value.string_value for attribute in sent}


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Run a collector; yield it and its URL."""
    collector = Collector()
    with running(collector.app, lifespan="off") as url:
        yield collector, url


@pytest.mark.parametrize("named", [{}, {"OTEL_SERVICE_NAME": "progress"}])
def test_otel_sends_spans_to_a_collector(tmp_path: Path, simulator: Simulator, named: dict[str, str]) -> None:
    """The command sends its spans to OTEL_EXPORTER_OTLP_ENDPOINT, the last ones at shutdown."""
    with collecting() as (collector, url):
        env = {
            "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "600000",  # no span is sent before shutdown
        } | named
        with serving(tmp_path, env) as (process, gate):
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "find-me"}
            assert gate.get(simulator.task(), headers=headers).status_code == 200
            line = process.says(r"(\{.*find-me.*\})")
            process.signal()
            assert process.exit_status() == 0
        assert {PROGRESS, FLIGHT, CALL} <= collector.names()
        assert collector.resource()["service.name"] == named.get("OTEL_SERVICE_NAME", "sd-progress-gateway")
    assert f'"trace_id": "{TRACE}"' in line
    assert f'"parent_id": "{SPAN}"' in line
    assert '"span_id": ' in line
    assert "Traceback" not in process.output


def test_otel_without_a_collector_still_responds(tmp_path: Path, simulator: Simulator) -> None:
    """Without a collector, requests succeed, shutdown is clean, and export attempts are not logged."""
    env = {
        "SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "1",
    }
    with serving(tmp_path, env) as (process, gate):
        for _ in range(3):
            assert gate.get(simulator.task()).status_code == 200
        process.signal()
        assert process.exit_status() == 0
    assert "Transient" not in process.output


class BlockedProvider(TracerProvider):
    """A provider whose collector does not respond."""

    def __init__(self) -> None:
        super().__init__(shutdown_on_exit=False)
        self.called, self.released = threading.Event(), threading.Event()

    def shutdown(self) -> None:
        self.called.set()
        self.released.wait()


async def test_otel_aclose_does_not_wait_for_a_slow_collector() -> None:
    """`aclose` returns after `flush_seconds` even if the collector does not respond."""
    provider = BlockedProvider()
    await OpenTelemetryTracing(provider, flush_seconds=0).aclose()
    provider.released.set()
    assert await asyncio.to_thread(provider.called.wait, 30)
