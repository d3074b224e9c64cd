"""Fault injection: one function for each fault of the simulated vendor.

A fault receives an accepted call with its normal response. It returns the response to send instead, or None
if it only waits: then the next matching fault, or the normal response, follows. The keyword parameters of
the functions are the members of `PUT /_simulator/faults`, in camelCase.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.simulator.api_gateway import refusal
from gateway.simulator.json_bodies import (
    Bytes,
    ControlError,
    HeaderText,
    HttpStatus,
    Seconds,
    arguments,
    envelope,
)
from gateway.simulator.tasks import Operation

_AIM = frozenset({"times", "operation", "taskId", "probability"})
_DEPTH = 200_000
_FILL = b"x" * 65536
_JSON = "application/json;charset=UTF-8"


@dataclass(frozen=True, slots=True)
class Call:
    """An accepted call of a vendor operation. `legacy`: the deployment sends refusals in the older style."""

    operation: str
    task_id: str | None
    answer: Response
    legacy: bool
    receive: Receive

    async def pause(self, seconds: float | None) -> None:
        """Wait for `seconds` (None: no limit), or until the client disconnects."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.receive()  # the body has been read: the next message is the disconnect

    @property
    def body(self) -> bytes:
        """The body of the normal response: an envelope."""
        return bytes(self.answer.body)


async def refuse(
    call: Call,
    /,
    *,
    status: HttpStatus | None = None,
    code: Annotated[str, Field(pattern=r"^([A-Z][2-5][0-9]{2}[A-Z0-9]{2})?$")] = "",
    message: HeaderText = "Service Unavailable",
    legacy: bool | None = None,
    retry_after: int | HeaderText | None = None,
) -> ASGIApp:
    """Refuse like the API gateway. A code includes its status; `legacy` defaults to the deployment."""
    if status is None:
        status = int(code[1:4]) if code else 503
    legacy = call.legacy if legacy is None else legacy
    return refusal(status, message, code, legacy=legacy, retry_after=retry_after)


async def status(
    _call: Call, /, *, status: HttpStatus = 502, retry_after: int | HeaderText | None = None
) -> ASGIApp:
    """Answer with an HTTP status and an HTML page, like a proxy in between."""
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    page = f"<html><head><title>{status}</title></head><body><h1>{status}</h1></body></html>"
    return Response(page, status, headers, "text/html")


async def reject(
    _call: Call,
    /,
    *,
    err_code: str | None = "SIMULATED_FAILURE",
    err_message: str | None = "rejected on demand",
    sub_err_code: str | None = None,
    sub_err_message: str | None = None,
) -> ASGIApp:
    """Answer with an envelope whose status is 20."""
    return envelope(
        None,
        err_code=err_code,
        err_message=err_message,
        sub_err_code=sub_err_code,
        sub_err_message=sub_err_message,
    )


async def body(
    _call: Call,
    /,
    *,
    body: str = "<html></html>",
    content_type: HeaderText = "application/json;charset=UTF-8",
    status: HttpStatus = 200,
) -> ASGIApp:
    """Answer with the given text: HTML, NaN, or any invalid structure."""
    return Response(body.encode(errors="replace"), status, {"content-type": content_type})


async def slow(call: Call, /, *, seconds: Seconds = 1.0) -> None:
    """Answer late."""
    await call.pause(seconds)


async def silent(call: Call, /) -> None:
    """Never answer; the response that follows the client's disconnect is not sent."""
    await call.pause(None)


async def drip(call: Call, /, *, interval: Seconds = 0.1) -> ASGIApp:
    """Send the headers immediately and the normal body byte by byte."""

    async def drops() -> AsyncIterator[bytes]:
        for value in call.body:
            await asyncio.sleep(interval)
            yield bytes((value,))

    return StreamingResponse(drops(), headers=dict(call.answer.headers))


async def cut(call: Call, /) -> ASGIApp:
    """Stop in the middle of the body and close the connection."""

    async def half(_scope: Scope, _receive: Receive, send: Send) -> None:
        # Content-Length is that of the whole body: the server closes the connection because it is not
        # reached.
        await send({"type": "http.response.start", "status": 200, "headers": call.answer.raw_headers})
        part = call.body[: len(call.body) // 2]
        await send({"type": "http.response.body", "body": part, "more_body": True})

    return half


async def large(call: Call, /, *, bytes_: Bytes = 16_777_216) -> ASGIApp:
    """Answer with the normal envelope, padded to this size."""
    return StreamingResponse(_cooperative(_padded(call.body, bytes_)), media_type=_JSON)


async def gzip_bomb(call: Call, /, *, bytes_: Bytes = 1_073_741_824) -> ASGIApp:
    """Answer with the normal envelope, padded to this size and compressed."""
    chunks = _cooperative(_compressed(_padded(call.body, bytes_)))
    return StreamingResponse(chunks, headers={"content-encoding": "gzip"}, media_type=_JSON)


async def redirect(
    _call: Call, /, *, location: HeaderText = "https://example.invalid/", status: HttpStatus = 302
) -> ASGIApp:
    """Answer with a redirect."""
    return Response(status_code=status, headers={"location": location})


async def cookie(call: Call, /) -> ASGIApp:
    """Send the normal response with a cookie and headers that must not be passed on."""
    call.answer.set_cookie("acw_tc", "simulated", httponly=True)
    call.answer.headers.update({"server": "Tengine", "x-powered-by": "PHP/4", "x-odd": "caf\xe9, \xbf"})
    return call.answer


async def deep(_call: Call, /) -> ASGIApp:
    """Answer with deeply nested brackets that overflow a recursive parser."""
    return Response(b"[" * _DEPTH, media_type=_JSON)


FAULTS: Mapping[str, Callable[..., Awaitable[ASGIApp | None]]] = {
    "refuse": refuse,
    "status": status,
    "reject": reject,
    "body": body,
    "slow": slow,
    "silent": silent,
    "drip": drip,
    "cut": cut,
    "large": large,
    "gzip_bomb": gzip_bomb,
    "redirect": redirect,
    "cookie": cookie,
    "deep": deep,
}


@dataclass(slots=True)
class Aim:
    """The calls that a fault applies to, and how often. The default is all calls, without limit."""

    times: Annotated[int, Field(ge=1)] | None = None
    operation: Operation | None = None
    task_id: str | None = None
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0

    def matches(self, call: Call, random: Random) -> bool:
        """Return whether the fault applies to the call; this draws the random number."""
        return (
            self.operation in {None, call.operation}
            and self.task_id in {None, call.task_id}
            and random.random() < self.probability
        )


class Faults:
    """The active faults by name, in the order in which they were set."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._faults: dict[str, tuple[dict[str, Any], Aim, dict[str, Any]]] = {}

    def put(self, given: Mapping[str, Any] | None) -> None:
        """Set a fault from a control request; it replaces one of the same name.

        Raises: ControlError, also for None, which `parse_object` returns for anything but an object.
        """
        if given is None:
            raise ControlError("a fault is a JSON object")
        name = given.get("name")
        if not isinstance(name, str) or name not in FAULTS:
            raise ControlError(f"name: unknown fault; known: {', '.join(FAULTS)}")
        aimed = {key: value for key, value in given.items() if key in _AIM}
        rest = {key: value for key, value in given.items() if key not in _AIM and key != "name"}
        fault = dict(given), Aim(**arguments(Aim, aimed)), arguments(FAULTS[name], rest)
        self._faults.pop(name, None)  # the new fault is appended at the end
        self._faults[name] = fault

    def active(self) -> list[dict[str, Any]]:
        """Return the faults as they were set, with the remaining `times`."""
        left = ((given, aim.times) for given, aim, _ in self._faults.values())
        return [given if times is None else given | {"times": times} for given, times in left]

    def clear(self) -> None:
        """Remove all faults; a running one continues to its end."""
        self._faults.clear()

    async def apply(self, call: Call) -> ASGIApp:
        """Return the response of the first fault that has one, or the normal response."""
        for name, fault in tuple(self._faults.items()):
            _, aim, parameters = fault
            # While an earlier fault was waiting, this one may have been used up, replaced or cleared.
            if self._faults.get(name) is not fault or not aim.matches(call, self._random):
                continue
            if aim.times is not None:
                aim.times -= 1
                if aim.times == 0:
                    del self._faults[name]
            answer = await FAULTS[name](call, **parameters)
            if answer is not None:
                return answer
        return call.answer


def _padded(answer: bytes, size: int) -> Iterator[bytes]:
    head, tail = answer[:-1] + b',"padding":"', b'"}'
    yield head
    for left in range(size - len(head) - len(tail), 0, -len(_FILL)):
        yield _FILL[:left]
    yield tail


def _compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(wbits=31)  # 31: with gzip's header
    yield from map(compressor.compress, chunks)
    yield compressor.flush()


async def _cooperative(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
        await asyncio.sleep(0)  # a large response must not block the control API
