"""When spans are asked for, and what it costs when they are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.domain.task import Operation, TaskKey
from gateway.telemetry.tracing import Mark, Untraced, asked_for
from tests.harness import run

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
def test_tracing_is_asked_for_by_the_standard_variables(environ: dict[str, str]) -> None:
    """A place to send spans to, or a form to send them in, is enough."""
    assert asked_for(environ)


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
def test_tracing_is_off_otherwise(environ: dict[str, str]) -> None:
    """Other variables ask for nothing, and two switch it off."""
    assert not asked_for(environ)


async def test_untraced_makes_nothing() -> None:
    """Without tracing, marks have nothing to link to."""
    tracing = Untraced()
    for span in (tracing.flight(KEY), tracing.call(KEY, number=0)):
        with span as mark:
            assert mark == Mark()
    await tracing.aclose()


def test_tracing_imports_nothing_unless_asked() -> None:
    """The gateway's modules bring no module of OpenTelemetry with them."""
    look = (
        "import sys, gateway.cli.main\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


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
def test_tracing_that_cannot_be_had_stops_the_start(
    tmp_path: Path, environ: dict[str, str], words: list[str]
) -> None:
    """What is asked for and not there is a mistake like any other in the settings: one line, status 2."""
    status, said = run("serve", cwd=tmp_path, env=environ)
    assert status == 2
    [line] = said.splitlines()
    assert all(word in line for word in words), line


def test_tracing_without_the_extra_stops_the_start(tmp_path: Path) -> None:
    """Asked for where the packages are not installed, it says what to install."""
    # A module that cannot be imported stands for packages that are missing.
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text(
        "raise ModuleNotFoundError('no', name='opentelemetry')"
    )
    status, said = run("serve", cwd=tmp_path, env=ENDPOINT | {"PYTHONPATH": str(tmp_path)})
    assert status == 2
    [line] = said.splitlines()
    assert "pip install 'sd-progress-gateway[otel]'" in line
    assert "opentelemetry is missing" in line
