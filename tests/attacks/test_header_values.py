"""Values of request headers that are expensive to parse. The gateway is a process, because it may hang."""

import itertools
from pathlib import Path

import pytest

from tests.attacks.wire import Line, request
from tests.support.harness import Simulator, serving

HEADERS = [
    "Accept",
    "Accept-Encoding",
    "Access-Control-Request-Headers",
    "Cache-Control",
    "Connection",
    "Content-Encoding",
    "Content-Type",
    "Cookie",
    "Forwarded",
    "If-None-Match",
    "Last-Event-ID",
    "Origin",
    "Prefer",
    "Sec-Fetch-Site",
    "Traceparent",
    "X-Forwarded-For",
    "X-Forwarded-Proto",
    "X-Real-IP",
    "X-Request-Id",
]
REPEATED = [
    ";  ",
    "; \t;",
    ", ,",
    '"',
    '\\"',
    'a="',
    "a=b;",
    " = ",
    "\t",
    ";,",
    '"a",',
    'W/"',
    "::",
    "[",
    "*/*;q=0.1,",
    "text/plain;version=x,",
]
ENDS = ['"', "\\", ";", "\xe9"]
LENGTHS = [60, 500, 8000]


@pytest.mark.parametrize("edge", ["true", "false"])
def test_header_values_cost_little(simulator: Simulator, tmp_path: Path, edge: str) -> None:
    """Each value is answered without a fault of the gateway, however often its parts are repeated."""
    simulator.task("own-task")
    settings = {"SD_GATEWAY_UPSTREAM__ENDPOINT": simulator.url, "SD_GATEWAY_SERVER__EDGE": edge}
    with serving(tmp_path, settings) as (_, gate), Line(gate) as line:
        for name, part, end, length in itertools.product(HEADERS, REPEATED, ENDS, LENGTHS):
            field = f"{name}: {(part * length)[:length]}{end}".encode("latin-1")
            paths = ["/v1/progress/own-task", "/v1/progress?taskId=own-task"]  # a hit, and no plain hit
            if name.startswith("Accept") and length == max(LENGTHS):
                paths.append("/metrics")
            for path in paths:
                line.send(request(path, field))
                assert line.answer().status in {200, 304, 400, 403}, (name, part, end, length)
