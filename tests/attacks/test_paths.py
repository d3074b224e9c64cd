"""Escapes in paths: an escaped slash or control character never leads to another route."""

import pytest

from tests.attacks.wire import Line, Target, query, request
from tests.support.harness import Simulator

TASK = "own-task"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"/v1/progress/{TASK}%2Fevents", 400, "invalid-task-id"),
        (f"/v1/progress/{TASK}%2fevents", 400, "invalid-task-id"),
        (f"/v1/progress/{TASK}/events%0A", 404, "not-found"),
        (f"/v1/progress/{TASK}%0A", 400, "invalid-task-id"),
        (f"/v1/progress/{TASK}%00", 400, "invalid-task-id"),
        (f"/v1/progress%2F{TASK}", 404, "not-found"),
        (f"/v1%2Fprogress/{TASK}", 404, "not-found"),
        (f"/v1/progress%0A?taskId={TASK}", 404, "not-found"),
        (f"/v1%2fevents?taskId={TASK}", 404, "not-found"),
        (f"/v1/events%0a?taskId={TASK}", 404, "not-found"),
        (f"/v1%2Fresults%2F{TASK}", 404, "not-found"),
        ("/healthz%0A", 404, "not-found"),
        ("/metrics%0A", 404, "not-found"),
        ("/%2Fmetrics", 404, "not-found"),
        ("/openapi.json%0A", 404, "not-found"),
        ("/web%2Fpage.js", 404, "not-found"),
        # Longer than any valid path, and hence not decoded: that would take milliseconds.
        (f"/v1/progress/{'%61' * 400}", 400, "invalid-task-id"),
        (f"/%761/progress/{'%61' * 400}", 404, "not-found"),
        (f"/{'%2fa%c3' * 4000}", 404, "not-found"),
    ],
)
def test_paths_with_escapes_lead_to_no_other_route(
    target: Target, simulator: Simulator, path: str, status: int, code: str
) -> None:
    """Such a path is refused like any other unknown path or invalid task ID, also for a cached task."""
    simulator.task(TASK)
    with Line(target()) as line:
        line.send(request(f"/v1/progress/{TASK}"))
        assert line.answer().status == 200
        calls = simulator.calls()
        line.send(request(path))
        answer = line.answer()
        assert (answer.status, answer.code) == (status, code)
    assert simulator.calls() == calls


@pytest.mark.parametrize(
    "path", ["/scc/sd_get_progress%0A", "/scc%2Fsd_get_progress", "/scc/%2Fsd_get_progress"]
)
def test_paths_of_the_vendor_are_exact(target: Target, simulator: Simulator, path: str) -> None:
    """A vendor path with such an escape is 404, as any other path below /scc/."""
    with Line(target()) as line:
        line.send(query(simulator.task()).replace(b"/scc/sd_get_progress", path.encode(), 1))
        assert line.answer().status == 404
    assert simulator.calls() == 0


def test_paths_with_other_escapes_are_decoded(target: Target, simulator: Simulator) -> None:
    """Escapes of ordinary characters mean the characters (RFC 3986, 6.2.2.2)."""
    simulator.task(TASK)
    with Line(target()) as line:
        line.send(request("/v1/%70rogress/own%2dtask"))
        answer = line.answer()
        assert (answer.status, answer.json["taskId"]) == (200, TASK)
