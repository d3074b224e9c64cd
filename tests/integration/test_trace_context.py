"""The traceparent header: validation, and no forwarding to the upstream."""

import pytest

from gateway.api.trace_context import TraceParent, trace_parent
from tests.support.harness import Gateway, Simulator

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"


def read(*values: str) -> TraceParent | None:
    headers = [(b"accept", b"*/*"), *((b"traceparent", value.encode()) for value in values)]
    return trace_parent({"headers": headers})


@pytest.mark.parametrize(
    "value",
    [VALID, f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-future-fields"],
)
def test_traceparent_valid(value: str) -> None:
    """Version 00 is valid, and later versions are parsed as level 1 demands."""
    assert read(value) == (TRACE, SPAN)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [VALID, VALID],
        [""],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"00-{TRACE}-{SPAN}-01-"],
        [f"cc-{TRACE}-{SPAN}-01more"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"{VALID}\n"],
    ],
)
def test_traceparent_invalid_is_ignored(values: list[str]) -> None:
    """An invalid or repeated header is treated as absent."""
    assert read(*values) is None


@pytest.mark.parametrize("path", ["/v1/progress/{}", "/v1/progress?taskId={}", "/v1/progress/{}?wait=1"])
def test_traceparent_never_goes_upstream(simulator: Simulator, gate: Gateway, path: str) -> None:
    """No trace header is sent to the vendor."""
    task = simulator.task()
    headers = {"traceparent": VALID, "tracestate": "congo=t61rcWkgMzE", "baggage": "user=alice", "b3": "0"}
    assert gate.client.get(path.format(task), headers=headers).status_code == 200
    gate.native(task, "sd_get_result", headers=headers)
    requests = simulator.requests()
    assert len(requests) == 2
    for request in requests:
        assert not {"traceparent", "tracestate", "baggage", "b3"} & set(request["headers"])
        assert TRACE not in str(request)
        assert "alice" not in str(request)
