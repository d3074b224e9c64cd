"""Commands that are sent in batches: how many, what each gets, and when they fail."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from gateway.stores.valkey.batches import CONNECTIONS, Batches, Command
from tests.support.harness import eventually

LARGEST = 256
WAITS = 4

Replies = Callable[[list[Any]], Awaitable[list[Any]]]


class Pipeline:
    """A pipeline of redis-py: it records the commands, and returns the replies of the client."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._commands: list[Any] = []

    def execute_command(self, *parts: Any) -> None:
        self._commands.append(parts)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        self._client.batches.append(self._commands)
        self._client.running += 1
        try:
            return await self._client.reply(self._commands)
        finally:
            self._client.running -= 1


class Client:
    """A client whose replies a test sets; by default each command is its own reply."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.running = 0
        self.reply: Replies = self._echo

    def pipeline(self, *, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self)

    async def _echo(self, commands: list[Any]) -> list[Any]:
        return commands


@pytest.fixture
def client() -> Client:
    return Client()


def batches_of(client: Client, *, timeout_seconds: float = 10.0) -> Batches:
    return Batches(cast("Redis", client), timeout_seconds=timeout_seconds)


async def sent(batches: Batches, count: int, name: str = "GET") -> list[Any]:
    """Send so many commands at once; return their outcomes."""
    commands = (Command((name, number)) for number in range(count))
    return await asyncio.gather(*map(batches.send, commands), return_exceptions=True)


async def test_commands_of_one_iteration_are_one_batch(client: Client) -> None:
    """Commands of the same iteration of the event loop are written together; each gets its own reply."""
    batches = batches_of(client)
    assert await sent(batches, 10) == [("GET", number) for number in range(10)]
    assert [len(batch) for batch in client.batches] == [10]
    await sent(batches, 1)
    assert [len(batch) for batch in client.batches] == [10, 1]


async def test_batches_are_bounded(client: Client) -> None:
    """A batch has a maximum size; the rest is sent at the same time on other connections."""
    outcomes = await sent(batches_of(client), 2 * LARGEST + 1)
    assert outcomes == [("GET", number) for number in range(2 * LARGEST + 1)]
    assert [len(batch) for batch in client.batches] == [LARGEST, LARGEST, 1]


async def test_commands_wait_for_a_connection(client: Client) -> None:
    """While all connections are in use, commands wait, and are sent together as soon as one is free."""
    replied = asyncio.Event()

    async def reply(commands: list[Any]) -> list[Any]:
        await replied.wait()
        return commands

    client.reply = reply
    batches = batches_of(client)
    tasks = []
    for number in range(CONNECTIONS + 6):
        tasks.append(asyncio.create_task(batches.send(Command(("GET", number)))))
        for _ in range(5):
            await asyncio.sleep(0)
    assert client.running == CONNECTIONS
    assert [len(batch) for batch in client.batches] == [1] * CONNECTIONS
    replied.set()
    assert await asyncio.gather(*tasks) == [("GET", number) for number in range(CONNECTIONS + 6)]
    assert [len(batch) for batch in client.batches] == [*[1] * CONNECTIONS, 6]


async def test_unknown_scripts_are_sent_again(client: Client) -> None:
    """Commands whose script the server does not know are sent once more, with its text; no others are."""

    async def reply(commands: list[Any]) -> list[Any]:
        return [NoScriptError("NOSCRIPT") if name == "EVALSHA" else (name, what) for name, what in commands]

    client.reply = reply
    batches = batches_of(client)
    commands = [
        Command(("EVALSHA", 1), with_script=("EVAL", 1)),
        Command(("GET", 2)),
        Command(("EVALSHA", 3), with_script=("EVAL", 3)),
        Command(("EVALSHA", 4), with_script=("EVALSHA", 4)),
    ]
    *replies, unknown = await asyncio.gather(*map(batches.send, commands), return_exceptions=True)
    assert replies == [("EVAL", 1), ("GET", 2), ("EVAL", 3)]
    assert isinstance(unknown, NoScriptError)
    assert client.batches == [
        [("EVALSHA", 1), ("GET", 2), ("EVALSHA", 3), ("EVALSHA", 4)],
        [("EVAL", 1), ("EVAL", 3), ("EVALSHA", 4)],
    ]


async def test_error_of_one_command_is_its_own(client: Client) -> None:
    """An error reply is raised for its command; the others of the batch get their replies."""

    async def reply(commands: list[Any]) -> list[Any]:
        return [ResponseError("no") if number == 1 else number for _, number in commands]

    client.reply = reply
    first, failed, last = await sent(batches_of(client), 3)
    assert (first, last) == (0, 2)
    assert isinstance(failed, ResponseError)


@pytest.mark.parametrize("error", [ConnectionError("reset"), ResponseError("no"), ValueError("nonsense")])
async def test_failed_batch_fails_all_its_commands(client: Client, error: Exception) -> None:
    """A lost connection fails every command of the batch; the next batch is sent as usual."""

    async def reply(_: list[Any]) -> list[Any]:
        raise error

    client.reply, echo = reply, client.reply
    batches = batches_of(client)
    assert await sent(batches, 3) == [error] * 3
    client.reply = echo
    assert await sent(batches, 1) == [("GET", 0)]


async def test_cancelled_command_does_not_disturb_the_others(client: Client) -> None:
    """The reply to a command whose caller has left is ignored."""
    batches = batches_of(client)
    tasks = [asyncio.create_task(batches.send(Command(("GET", number)))) for number in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    first, left, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first, last) == (("GET", 0), ("GET", 2))
    assert isinstance(left, asyncio.CancelledError)


async def never(_: list[Any]) -> list[Any]:
    """Wait for a reply that does not arrive."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_batch_times_out(client: Client) -> None:
    """Without replies all commands of a batch fail in time, and its connection is free again."""
    client.reply, echo = never, client.reply
    batches = batches_of(client, timeout_seconds=0.05)
    began = time.monotonic()
    assert [type(outcome) for outcome in await sent(batches, 3)] == [TimeoutError] * 3
    assert time.monotonic() - began >= 0.05
    assert client.running == 0
    client.reply = echo
    assert await sent(batches, 1) == [("GET", 0)]


async def test_late_event_loop_is_no_timeout(client: Client) -> None:
    """After a pause of the process the replies may have arrived: they get more time."""
    replied = asyncio.Event()

    async def reply(commands: list[Any]) -> list[Any]:
        await replied.wait()
        return commands

    client.reply = reply
    sending = asyncio.create_task(sent(batches_of(client, timeout_seconds=0.2), 2))
    await eventually(lambda: client.running, "the batch is sent")
    time.sleep(0.5)  # noqa: ASYNC251  # a pause
    await asyncio.sleep(0.02)
    assert not sending.done()
    replied.set()
    assert await sending == [("GET", 0), ("GET", 1)]


async def test_batch_times_out_in_an_event_loop_that_is_always_late(client: Client) -> None:
    """A busy process does not wait for ever."""
    client.reply = never
    sending = asyncio.create_task(sent(batches_of(client, timeout_seconds=0.05), 1))
    pauses = 0
    while not sending.done():
        time.sleep(0.1)  # noqa: ASYNC251  # a pause
        pauses += 1
        await asyncio.sleep(0)
    assert [type(outcome) for outcome in await sending] == [TimeoutError]
    assert WAITS <= pauses < 20 * WAITS


async def test_close_frees_the_connections(client: Client) -> None:
    """Commands on the way fail as if the connection was lost, which is no cancellation of their callers."""
    client.reply = never
    batches = batches_of(client)
    sending = asyncio.create_task(sent(batches, 3))
    await eventually(lambda: client.running, "the batch is sent")
    await batches.aclose()
    assert client.running == 0
    assert [type(outcome) for outcome in await sending] == [ConnectionError] * 3


async def test_close_fails_commands_that_wait(client: Client) -> None:
    """Commands that wait for a connection fail as those on the way: their callers are not cancelled."""
    client.reply = never
    batches = batches_of(client)
    tasks = []
    for number in range(CONNECTIONS + 6):
        tasks.append(asyncio.create_task(batches.send(Command(("GET", number)))))
        for _ in range(5):
            await asyncio.sleep(0)
    assert client.running == CONNECTIONS
    await batches.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ConnectionError}
