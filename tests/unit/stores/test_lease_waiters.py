"""Requests that wait for a message about their task."""

import asyncio

from gateway.domain.task import Operation, TaskKey
from gateway.stores.valkey.lease_waiters import LeaseWaiters

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHER = KEY._replace(task_id="other")


async def test_waiters_wake_with_a_next_message_their_task() -> None:
    """A message completes the future of its task only, and any number of messages may follow."""
    waiters = LeaseWaiters()
    with waiters.next_message(KEY) as message, waiters.next_message(OTHER) as other:
        assert KEY in waiters
        for _ in range(2):
            waiters.wake(KEY)
        assert (message.done(), other.done()) == (True, False)
        await message
    assert KEY not in waiters
    waiters.wake(KEY)


async def test_waiters_wake_all() -> None:
    """All futures complete, also if the waiting request leaves meanwhile."""
    waiters = LeaseWaiters()
    keys = [KEY._replace(task_id=str(number)) for number in range(5)]

    async def wait(key: TaskKey) -> None:
        with waiters.next_message(key) as message:
            await message

    tasks = [asyncio.create_task(wait(key)) for key in keys]
    await asyncio.sleep(0)
    tasks[0].cancel()
    waiters.wake_all()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, *[type(None)] * 4]
    assert not any(key in waiters for key in keys)


async def test_waiters_keep_the_latest_request_of_a_task() -> None:
    """A request that leaves does not remove another one that waits for the same task."""
    waiters = LeaseWaiters()
    with waiters.next_message(KEY) as first:
        later = waiters.next_message(KEY)
        message = later.__enter__()
    assert KEY in waiters
    waiters.wake(KEY)
    assert (first.done(), message.done()) == (False, True)
    later.__exit__(None, None, None)
    assert KEY not in waiters
