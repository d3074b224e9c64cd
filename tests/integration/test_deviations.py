"""Upstream responses with deviations from the vendor's reference, from the upstream to the caller."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.harness import Gateway, RawUpstream, Request, framed

Launch = Callable[..., Gateway]

USUAL = (
    '{ "status": 10, "data": {"taskId": "TASK", "status": "running", "progress": 0.35,'
    ' "etaRelative": 12.5, "state": {"sampling_step": 7, "loss": 0.5}} }'
)


@pytest.mark.parametrize(
    ("before", "after", "repair", "changes"),
    [
        ("0.5", "NaN", "constant", {"state": {"sampling_step": 7, "loss": None}}),
        ("0.5", "-Infinity", "constant", {"state": {"sampling_step": 7, "loss": None}}),
        ("12.5", "NaN", "constant", {"etaSeconds": None}),
        ("12.5", "9223372036854775807", "implausible_number", {"etaSeconds": None}),
        ("0.35", '"0.35"', "number_in_text", {}),
        ("10,", '"10",', "number_in_text", {}),
        ('"running"', '"Running"', "status_spelling", {}),
        ('"running"', '"SUCCEEDED"', "status_spelling", {"status": "succeeded", "terminal": True}),
        ('{ "status"', '\ufeff{ "status"', "byte_order_mark", {}),
    ],
)
def test_deviation_is_repaired_and_counted(
    launch: Launch, before: str, after: str, repair: str, changes: dict[str, Any]
) -> None:
    """`/v1` has what is meant, in strict JSON; the vendor's path has the response byte for byte."""

    def body(request: Request) -> bytes:
        return USUAL.replace(before, after, 1).replace("TASK", request.task_id).encode()

    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(body(request)))

    with RawUpstream(behaviour) as upstream:
        gate = launch(upstream.url)
        for _ in range(2):
            response = gate.get("abc")
        assert response.status_code == 200
        shown = json.loads(response.content, parse_constant=pytest.fail)
        expected = {
            "status": "running",
            "terminal": False,
            "progress": 0.35,
            "etaSeconds": 12.5,
            "state": {"sampling_step": 7, "loss": 0.5},
        } | changes
        if expected["terminal"]:
            expected |= {"progress": 1.0, "etaSeconds": 0.0}
        assert {name: shown[name] for name in expected} == expected
        assert gate.native("abc").content == body(upstream.requests[0])
        assert gate.metric("upstream_repairs_total") == len(upstream.requests)
        assert gate.metric("upstream_repairs_total", operation="sd_get_progress", repair=repair) == len(
            upstream.requests
        )


def test_response_without_deviation_is_not_counted(launch: Launch) -> None:
    """The documented form needs no repair."""

    def behaviour(connection: socket.socket, request: Request) -> None:
        connection.sendall(framed(USUAL.replace("TASK", request.task_id).encode()))

    with RawUpstream(behaviour) as upstream:
        gate = launch(upstream.url)
        assert gate.get("abc").status_code == 200
        assert gate.metric("upstream_repairs_total") == 0
