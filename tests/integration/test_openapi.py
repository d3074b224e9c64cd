"""The OpenAPI document: it matches the routes, and schemathesis tests a running gateway against it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import socket

import pytest
from starlette.routing import Route

import gateway
from gateway.api.problems import PROBLEMS
from gateway.app import create_app
from gateway.domain.task import Operation, Status
from gateway.settings.model import Settings
from gateway.telemetry.redaction import Redactor
from tests.support.harness import Gateway, RawUpstream, Request, framed
from tests.support.measuring import unmeasured

DOCUMENT = json.loads((Path(gateway.__file__).parent / "api" / "openapi.json").read_text(encoding="utf-8"))
# Paths of the web pages and their icon, and the catch-all route for refusals.
UNDOCUMENTED = {"/", "/docs", "/favicon.ico", "/web/{file}", "/scc/{path}"}


def test_openapi_is_valid() -> None:
    """The document is OpenAPI 3.1."""
    import openapi_spec_validator  # noqa: PLC0415  # takes a second, in each test process

    assert DOCUMENT["openapi"].startswith("3.1")
    openapi_spec_validator.validate(DOCUMENT)


def test_openapi_names_every_path() -> None:
    """Every route is documented, and every documented path is a route."""
    app = create_app(Settings(), redactor=Redactor()).asgi
    routes = {route.path_format for route in app.routes if isinstance(route, Route)}
    assert set(DOCUMENT["paths"]) == routes - UNDOCUMENTED
    assert routes >= UNDOCUMENTED


def test_openapi_names_every_code_and_status() -> None:
    """Problem codes, task statuses, drop-in paths and version are those of the code."""
    schemas = DOCUMENT["components"]["schemas"]
    code = schemas["Problem"]["properties"]["code"]
    assert code["x-problem-codes"] == {error.code: status for error, (status, _) in PROBLEMS.items()}
    assert set(code["enum"]) == set(code["x-problem-codes"])
    assert schemas["Status"]["enum"] == list(Status)
    assert {path for path in DOCUMENT["paths"] if path.startswith("/scc/")} == {op.path for op in Operation}
    assert DOCUMENT["info"]["version"] == gateway.__version__


def succeed(connection: socket, request: Request) -> None:
    """Respond that any task has succeeded, so that every stream ends."""
    connection.sendall(framed(request.envelope(status="succeeded")))


@pytest.mark.parametrize("root_path", ["", "/prefix"])
def test_openapi_matches_a_running_gateway(launch: Callable[..., Gateway], root_path: str) -> None:
    """Schemathesis with all checks finds no response that violates the document."""
    with RawUpstream(succeed) as upstream:
        gate = launch(upstream.url, server={"root_path": root_path})
        base = f"{gate.url}{root_path}"
        command = [
            *(Path(sys.executable).with_name("st"), "run", f"{base}/openapi.json", "--url", base),
            *("--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "25"),
            *(
                "--generation-deterministic",
                "--request-timeout",
                "20",
                "--no-color",
                "--suppress-health-check",
                "all",
            ),
        ]
        with unmeasured():
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 500, done.stdout  # type: ignore[index]
