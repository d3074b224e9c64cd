"""The control API, `/_simulator/…`: tests and the demo control the simulated upstream with it."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from random import Random
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway.simulator.api_gateway import Gate
from gateway.simulator.call_record import CallRecord
from gateway.simulator.faults import Faults
from gateway.simulator.json_bodies import ControlError, Count, arguments, json_response, parse_object
from gateway.simulator.limit import Limit
from gateway.simulator.tasks import Life, Task, new_task_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The control API. `life` is the default life of new tasks."""

    gate: Gate
    limit: Limit
    tasks: MutableMapping[str, Task]
    faults: Faults
    calls: CallRecord
    clock: Callable[[], float]
    random: Random
    life: Life

    def routes(self) -> list[Route]:
        """Return the routes; the docstring of the package describes them."""
        table = (
            ("POST", "/tasks", self._create_task),
            ("PUT", "/tasks/{task_id}", self._script_task),
            ("DELETE", "/tasks/{task_id}", self._forget_task),
            ("PUT", "/faults", self._put_fault),
            ("GET", "/faults", self._list_faults),
            ("DELETE", "/faults", self._clear_faults),
            ("PUT", "/legacy", self._set_legacy),
            ("PUT", "/pairs", self._set_pairs),
            ("PUT", "/limit", self._set_limit),
            ("GET", "/stats", self._show_stats),
            ("DELETE", "/stats", self._reset_stats),
            ("GET", "/requests", self._show_requests),
        )
        return [Route(f"/_simulator{path}", handle, methods=[method]) for method, path, handle in table]

    async def _create_task(self, request: Request) -> Response:
        given = arguments(_new_task, await _object(request))
        life = Life(**arguments(Life, given["life"])) if "life" in given else self.life
        task_id = given.get("task_id") or new_task_id(self.clock, self.random)
        self.tasks[task_id] = Task(task_id, self.clock(), life, given.get("data"))
        return json_response({"taskId": task_id}, 201)

    async def _script_task(self, request: Request) -> Response:
        task_id = request.path_params["task_id"]
        given = arguments(_script, await _object(request))
        self.tasks[task_id] = Task(task_id, self.clock(), script=given["data"])
        return json_response({"taskId": task_id})

    async def _forget_task(self, request: Request) -> Response:
        self.tasks.pop(request.path_params["task_id"], None)
        return Response(status_code=204)

    async def _put_fault(self, request: Request) -> Response:
        self.faults.put(await _object(request))
        return json_response(self.faults.active())

    async def _list_faults(self, _request: Request) -> Response:
        return json_response(self.faults.active())

    async def _clear_faults(self, _request: Request) -> Response:
        self.faults.clear()
        return Response(status_code=204)

    async def _set_legacy(self, request: Request) -> Response:
        self.gate.legacy = arguments(_legacy, await _object(request))["enabled"]
        return json_response({"enabled": self.gate.legacy})

    async def _set_pairs(self, request: Request) -> Response:
        self.gate.pairs = arguments(_pairs, await _object(request))["pairs"]
        return Response(status_code=204)  # never return secrets

    async def _set_limit(self, request: Request) -> Response:
        given = arguments(_limit, await _object(request))
        self.limit.calls, self.limit.retry_after = given["calls"], given.get("retry_after")
        return json_response({"calls": self.limit.calls, "retryAfter": self.limit.retry_after})

    async def _show_stats(self, _request: Request) -> Response:
        return json_response(self.calls.stats() | {"throttled": self.limit.throttled})

    async def _reset_stats(self, _request: Request) -> Response:
        self.calls.reset()
        self.limit.throttled = 0
        return Response(status_code=204)

    async def _show_requests(self, _request: Request) -> Response:
        return json_response(list(self.calls.requests))


async def explain(_request: Request, error: Exception) -> Response:
    """Answer a `ControlError`."""
    return PlainTextResponse(str(error).encode(errors="replace"), 400)


async def _object(request: Request) -> dict[str, Any]:
    given = parse_object(await request.body())
    if given is None:
        raise ControlError("the body is not a JSON object")
    return given


# The members of control requests, as signatures for `arguments`.
def _new_task(*, task_id: str = "", life: dict[str, Any] = ..., data: dict[str, Any] = ...) -> None: ...
def _script(*, data: dict[str, Any]) -> None: ...
def _legacy(*, enabled: bool) -> None: ...
def _pairs(*, pairs: dict[str, str]) -> None: ...
def _limit(*, calls: Count, retry_after: Count | None = None) -> None: ...
