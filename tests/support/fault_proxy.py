"""A TCP proxy in a process of its own, for tests of what a bad network does: delay, stall, reset, refusal.

The child process is this module, run as a command. It gets one JSON object per line on its standard input,
and answers each with its counters. It ends when its input does.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Self, cast

import uvloop

_BUFFER_BYTES = 64 << 20  # in each direction: more than a delayed link carries at any rate that tests reach
_STALLED_BYTES = 256 << 10  # a stalled direction stops reading here, as a full socket buffer would


class Counts(NamedTuple):
    """Bytes forwarded in each direction, connections accepted so far, and connections open."""

    to_server: int
    to_client: int
    accepted: int
    open: int


class FaultProxy:
    """Forwards connections to a port of 127.0.0.1, with faults that the test sets at any time.

    Use it as a context manager. Clients connect to `port`. Faults apply to open and to new connections alike:

        delay(to_server=0.1, to_client=0.1)   each byte arrives that much later, at full throughput
        delay(round_trip=0.2)                 half of it in each direction
        stall(to_server=True)                 holds the bytes of a direction until the next `stall` or `heal`
        half_open()                           accepts connections, but forwards nothing in any direction
        refuse()                              refuses new connections; open ones continue
        drop()                                resets every open connection, once
        limit(bytes_per_second)               for each connection and direction
        heal()                                ends all faults; held bytes arrive now
        counts()                              bytes in each direction, connections

    A delay adds no pause between chunks: chunks that were sent 1 ms apart arrive 1 ms apart, in order. The
    proxy itself costs about 0.1 ms per round trip. A delay is exact to about a millisecond.
    """

    def __init__(self, server_port: int, *, port: int = 0) -> None:
        command = [sys.executable, "-P", __file__, str(server_port), str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    @property
    def url(self) -> str:
        """The address as a value of `store.url`."""
        return f"valkey://127.0.0.1:{self.port}"

    def delay(self, *, to_server: float = 0.0, to_client: float = 0.0, round_trip: float = 0.0) -> None:
        """Delay each direction by so many seconds; `round_trip` is divided between both."""
        half = round_trip / 2
        self._set(delay={"to_server": to_server + half, "to_client": to_client + half})

    def stall(self, *, to_server: bool = False, to_client: bool = False) -> None:
        """Hold the bytes of the directions that are True; let the others flow."""
        self._set(stalled={"to_server": to_server, "to_client": to_client})

    def half_open(self) -> None:
        """Accept connections and forward nothing."""
        self._set(half_open=True)

    def refuse(self) -> None:
        """Refuse new connections."""
        self._set(refusing=True)

    def limit(self, bytes_per_second: float) -> None:
        """Limit the throughput of each connection in each direction; 0: no limit."""
        self._set(bytes_per_second=bytes_per_second)

    def drop(self) -> None:
        """Reset every open connection."""
        self._ask({"drop": True})

    def heal(self) -> None:
        """End all faults."""
        self._set(**asdict(_Faults()))

    def counts(self) -> Counts:
        """Return the counters."""
        return self._ask({})

    def _set(self, **faults: Any) -> None:
        self._ask({"faults": faults})

    def _ask(self, command: dict[str, Any]) -> Counts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return Counts(**json.loads(self._process.stdout.readline()))


# --- the child process ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Faults:
    delay: dict[str, float] | None = None
    stalled: dict[str, bool] | None = None
    half_open: bool = False
    refusing: bool = False
    bytes_per_second: float = 0.0


class _Direction:
    """The bytes of one connection in one direction, each with the time at which it is due."""

    def __init__(self, name: str, proxy: "_Proxy") -> None:
        self._name = name
        self._proxy = proxy
        self._chunks: deque[tuple[float, bytes]] = deque()  # an empty chunk ends the connection
        self._queued = 0
        self._due = 0.0
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reading = True
        self.writable = True
        self.source: asyncio.Transport | None = None
        self.target: asyncio.Transport | None = None

    def put(self, data: bytes) -> None:
        """Accept bytes from the source."""
        delay = (self._proxy.faults.delay or {}).get(self._name, 0.0)
        self._due = max(self._due, time.monotonic() + delay)
        self._chunks.append((self._due, data))
        self._queued += len(data)
        self.flush()

    def flush(self) -> None:
        """Forward what is due; set a timer for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        faults, now = self._proxy.faults, time.monotonic()
        held = faults.half_open or (faults.stalled or {}).get(self._name, False)
        while self._chunks and self.target is not None and self.writable and not held:
            due, data = self._chunks[0]
            if faults.bytes_per_second:
                due = max(due, self._free_at) + len(data) / faults.bytes_per_second
            if due > now:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(due - now, self.flush)
                break
            self._chunks.popleft()
            self._queued -= len(data)
            if not data:
                self.target.close()
                continue
            self.target.write(data)
            self._proxy.forwarded[self._name] += len(data)
            self._free_at = due
        self._apply_backpressure(_STALLED_BYTES if held or not self.writable else _BUFFER_BYTES)

    def hurry(self) -> None:
        """Make everything due now."""
        self._chunks = deque((0.0, data) for _, data in self._chunks)
        self._due = self._free_at = 0.0
        self.flush()

    def _apply_backpressure(self, most: int) -> None:
        source = self.source
        if source is None or source.is_closing() or self._reading == (self._queued <= most):
            return
        self._reading = not self._reading
        (source.resume_reading if self._reading else source.pause_reading)()


class _End(asyncio.Protocol):
    """One of the two connections: `outgoing` takes what it receives, `incoming` is written to it."""

    def __init__(self, proxy: "_Proxy", outgoing: _Direction, incoming: _Direction) -> None:
        self._proxy = proxy
        self._outgoing = outgoing
        self._incoming = incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._outgoing.source = self._incoming.target = self._transport
        self._proxy.transports.add(self._transport)
        self._incoming.flush()

    def data_received(self, data: bytes) -> None:
        self._outgoing.put(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.transports.discard(self._transport)
        self._incoming.target = None
        self._outgoing.put(b"")

    def pause_writing(self) -> None:
        self._incoming.writable = False

    def resume_writing(self) -> None:
        self._incoming.writable = True
        self._incoming.flush()


class _Proxy:
    def __init__(self, server_port: int) -> None:
        self.faults = _Faults()
        self.forwarded = {"to_server": 0, "to_client": 0}
        self.transports: set[asyncio.Transport] = set()
        self._server_port = server_port
        self._accepted = 0
        self._directions: deque[_Direction] = deque(maxlen=2000)
        self._healed = asyncio.Event()
        self._healed.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(self._accept, "127.0.0.1", port, backlog=1024)
        port = listener.sockets[0].getsockname()[1]
        print(port, flush=True)  # noqa: T201 - read by FaultProxy
        commands = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := await commands.readline():
            command = json.loads(line)
            for name, value in command.get("faults", {}).items():
                setattr(self.faults, name, value)
            if self.faults.refusing and listener.is_serving():
                listener.close()
            elif not self.faults.refusing and not listener.is_serving():
                listener = await loop.create_server(self._accept, "127.0.0.1", port, backlog=1024)
            (self._healed.clear if self.faults.half_open else self._healed.set)()
            if command.get("drop"):
                for transport in list(self.transports):
                    transport.abort()
            for direction in list(self._directions):
                (direction.flush if self.faults.delay else direction.hurry)()
            counts = Counts(**self.forwarded, accepted=self._accepted, open=len(self.transports))
            print(json.dumps(counts._asdict()), flush=True)  # noqa: T201

    def _accept(self) -> _End:
        self._accepted += 1
        to_server, to_client = _Direction("to_server", self), _Direction("to_client", self)
        self._directions.extend((to_server, to_client))
        task = asyncio.create_task(self._connect(to_server, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _End(self, outgoing=to_server, incoming=to_client)

    async def _connect(self, to_server: _Direction, to_client: _Direction) -> None:
        await self._healed.wait()
        end = partial(_End, self, outgoing=to_client, incoming=to_server)
        try:
            await asyncio.get_running_loop().create_connection(end, "127.0.0.1", self._server_port)
        except OSError:  # the server is not there: the client sees its connection closed
            to_client.put(b"")


if __name__ == "__main__":
    uvloop.run(_Proxy(int(sys.argv[1])).run(int(sys.argv[2])))
