"""A minimal upstream that responds to every call at once, for any task.

The simulator verifies every signature in Python and is too slow for thousands of calls per second. Signatures
are checked in the scenarios that use the simulator, and in the tests.

    python upstream.py PORT SECONDS [changing]

SECONDS is the latency of a response. With `changing` all responses differ: `message` is the Unix time at
which the response was sent.
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


class Responder(asyncio.Protocol):
    """Responds to the requests of one connection in order."""

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


def progress_json(task_id: str, message: str = str(_DATA["message"])) -> bytes:
    """Return the JSON in which the gateway shows a response of this upstream."""
    shown = {
        "taskId": task_id,
        "api": "sd",
        "status": _DATA["status"],
        "progress": _DATA["progress"],
        "queueRemaining": None,
        "etaSeconds": _DATA["etaRelative"],
        "message": message,
        "terminal": False,
        "state": _DATA["state"],
    }
    return json.dumps(shown, separators=(",", ":")).encode()


async def serve(port: int, **behaviour: Any) -> None:
    """Serve until the process is terminated."""
    answerer = partial(Responder, **behaviour)
    server = await asyncio.get_running_loop().create_server(answerer, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(
        serve(int(sys.argv[1]), latency_seconds=float(sys.argv[2]), changing="changing" in sys.argv[3:])
    )
