"""When tracing is enabled, and what happens when it is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.telemetry.tracing import NoTracing, SpanRecord, tracing_enabled
from tests.support.harness import run

KEY = TaskKey(Operation.SD_GET_PROGRESS, "a-task")
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "environ",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
def test_tracing_is_enabled_by_the_standard_variables(environ: dict[str, str]) -> None:
    """An endpoint or an exporter is enough."""
    assert tracing_enabled(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "gateway", "OTEL_TRACES_SAMPLER": "always_on"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "true"},
        ENDPOINT | {"OTEL_SDK_DISABLED": " TRUE "},
    ],
)
def test_tracing_is_disabled_otherwise(environ: dict[str, str]) -> None:
    """Other variables do not enable tracing, and two disable it."""
    assert not tracing_enabled(environ)


async def test_untraced_creates_no_spans() -> None:
    """Without tracing, marks have no span context."""
    tracing = NoTracing()
    for span in (tracing.in_flight_span(KEY), tracing.call_span(KEY, number=0)):
        with span as record:
            assert record == SpanRecord()
    await tracing.aclose()


def test_tracing_imports_nothing_unless_enabled() -> None:
    """The gateway's modules import no module of OpenTelemetry."""
    script = (
        "import sys, gateway.cli.main\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, ["OTEL_TRACES_EXPORTER", "'zipkin'", "otlp or none"]),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["OTEL_EXPORTER_OTLP_PROTOCOL", "'grpc'"]),
        (
            ENDPOINT | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
            ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"],
        ),
    ],
)
def test_unsupported_tracing_prevents_the_start(
    tmp_path: Path, environ: dict[str, str], words: list[str]
) -> None:
    """An unsupported exporter or protocol is a configuration error: one line, exit status 2."""
    status, output = run("serve", cwd=tmp_path, env=environ)
    assert status == 2
    [line] = output.splitlines()
    assert all(word in line for word in words), line


def test_tracing_without_the_extra_prevents_the_start(tmp_path: Path) -> None:
    """If tracing is enabled and its packages are missing, the error says what to install."""
    # A module that cannot be imported simulates missing packages.
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text(
        "raise ModuleNotFoundError('no', name='opentelemetry')"
    )
    status, output = run("serve", cwd=tmp_path, env=ENDPOINT | {"PYTHONPATH": str(tmp_path)})
    assert status == 2
    [line] = output.splitlines()
    assert line.startswith(
        "sd-gateway: OTEL_*: needs the extra otel (the package opentelemetry): pip install "
    )
    assert "'opentelemetry-sdk<2,>=1.38'" in line
