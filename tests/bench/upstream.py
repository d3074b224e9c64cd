"""An upstream that costs next to nothing: it answers every call at once, for whatever task it names.

The simulator verifies every signature, in Python, and is slower than what it would have to feed
when thousands of calls a second are measured. Whether the calls are signed well is the
simulator's affair, in the scenarios that it carries and in the tests.

    python upstream.py PORT SECONDS [changing]

An answer takes so many seconds. With `changing` no two answers are the same: each one's `message`
is the Unix time at which it was sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from typing import Any

import uvloop

_STATE = {"job": "task(bench)", "job_no": 0, "job_count": 1, "job_timestamp": "20250101000000"}
_DATA = {
    "status": "running",
    "progress": 0.35,
    "lastQueueRemaining": 0,
    "etaRelative": 12.3,
    "message": "step 7 of 20",
    "state": {**_STATE, "sampling_step": 7, "sampling_steps": 20, "skipped": False, "interrupted": False},
}
_NONE = dict.fromkeys(("errCode", "errMessage", "subErrCode", "subErrMessage", "startTime", "endTime"))
_TASK = "{task}"
_MESSAGE = str(_DATA["message"]).encode()
_ENVELOPE = {
    "status": 10,
    "apiInvokeId": "i_0123456789abcdef01234567",
    "data": {"taskId": _TASK, **_DATA},
    **_NONE,
}
_BEFORE, _, _AFTER = json.dumps(_ENVELOPE, separators=(",", ":")).encode().partition(_TASK.encode())
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Answerer(asyncio.Protocol):
    """Answers the requests of one connection, in turn."""

    def __init__(self, *, latency_seconds: float, changing: bool) -> None:
        self._latency_seconds = latency_seconds
        self._changing = changing
        self._unread = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while True:
            head, separator, rest = self._unread.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            if not separator or len(rest) < length:
                return
            self._unread = rest[length:]
            task_id = json.loads(rest[:length])["taskId"].encode()
            body = _BEFORE + task_id + _AFTER
            if self._changing:
                body = body.replace(_MESSAGE, b"%.6f" % time.time())
            answer = _HEAD % len(body) + body
            if self._latency_seconds:
                self._loop.call_later(self._latency_seconds, self._transport.write, answer)
            else:
                self._transport.write(answer)


async def serve(port: int, **behaviour: Any) -> None:
    """Answer until the process is ended."""
    answerer = partial(Answerer, **behaviour)
    server = await asyncio.get_running_loop().create_server(answerer, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(
        serve(int(sys.argv[1]), latency_seconds=float(sys.argv[2]), changing="changing" in sys.argv[3:])
    )
