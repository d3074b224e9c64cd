"""The local cache of a replica: when each copy becomes visible, and invalidation; on a simulated clock."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.snapshot import Snapshot
from gateway.domain.task import Operation, Status, TaskKey
from gateway.stores.memory import MemoryStore
from gateway.stores.valkey.local_cache import LocalCache
from tests.support.ticked import TickedLoop

KEY = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHER = TaskKey(Operation.SD_GET_PROGRESS, "other")
LATER = 0.05


@pytest.fixture
def loop() -> Iterator[TickedLoop]:
    """Return a loop with a simulated clock."""
    loop = TickedLoop()
    yield loop
    loop.close()


@pytest.fixture
def memory(loop: TickedLoop) -> MemoryStore:
    """Return the store of the local cache's visible copies, on that clock."""
    return MemoryStore(max_tasks=10, stale_seconds=60, clock=loop.time)


@pytest.fixture
def local_cache(loop: TickedLoop, memory: MemoryStore) -> LocalCache:
    """Return a local cache on that clock."""
    return LocalCache(memory, clock=loop.time)


def snapshot(version: int, key: TaskKey = KEY, *, status: Status = Status.RUNNING) -> Snapshot:
    return Snapshot(key, 1000.0, 10.0, b"{}", status, version=version)


def test_cache_activates_a_due_copy_immediately(local_cache: LocalCache) -> None:
    """A snapshot with a past activation time is active immediately."""
    one = snapshot(1)
    local_cache.apply(one, shown_at=1000.0)
    assert local_cache.peek(KEY) is local_cache.peek_stale(KEY) is local_cache.latest(KEY) is one


def test_cache_activates_a_copy_at_its_time(loop: TickedLoop, local_cache: LocalCache) -> None:
    """Before its activation time a copy is known but not visible; then it is, even before a timer fires."""
    one, two = snapshot(1), snapshot(2)
    local_cache.apply(one, shown_at=0)
    loop.within(lambda: local_cache.apply(two, shown_at=1000.0 + LATER))
    assert local_cache.peek(KEY) is local_cache.peek_stale(KEY) is one
    assert local_cache.latest(KEY) is two
    loop.jump(LATER)
    assert local_cache.peek(KEY) is two
    loop.advance(1)
    assert local_cache.peek(KEY) is two
    assert loop.next_timer is None


def test_cache_notifies_listeners_without_a_request(
    loop: TickedLoop, memory: MemoryStore, local_cache: LocalCache
) -> None:
    """Listeners receive each copy at its activation time, in order, without any request."""
    heard: list[int] = []
    memory.on_change(lambda stored: heard.append(stored.version))
    loop.within(lambda: local_cache.apply(snapshot(1), shown_at=1000.0 + LATER))
    loop.within(lambda: local_cache.apply(snapshot(2), shown_at=1000.0 + 2 * LATER))
    loop.advance(LATER + 0.01)
    assert heard == [1]
    loop.advance(LATER)
    assert heard == [1, 2]


def test_cache_wakes_waiters_after_the_last_activation(loop: TickedLoop, local_cache: LocalCache) -> None:
    """A waiter for all pending copies continues after the last one; immediately if none is pending."""
    loop.within(lambda: local_cache.apply(snapshot(1), shown_at=1000.0 + LATER))
    loop.within(lambda: local_cache.apply(snapshot(2), shown_at=1000.0 + 2 * LATER))
    waiting, idle = (
        loop.create_task(local_cache.activated(KEY)),
        loop.create_task(local_cache.activated(OTHER)),
    )
    loop.advance(LATER + 0.01)
    assert idle.done()
    assert not waiting.done()
    loop.advance(LATER)
    assert waiting.done()
    assert loop.run_until_complete(local_cache.activated(KEY)) is None  # type: ignore[func-returns-value]


def test_cache_ignores_older_copies(loop: TickedLoop, local_cache: LocalCache) -> None:
    """A copy is ignored if it is older, the same, or not terminal after a terminal one."""
    ended = snapshot(3, status=Status.SUCCEEDED)
    loop.within(lambda: local_cache.apply(ended, shown_at=1000.0 + LATER))
    for late in (snapshot(2), snapshot(3), snapshot(4)):
        local_cache.apply(late, shown_at=0)
    assert local_cache.peek(KEY) is None
    loop.advance(LATER + 0.01)
    assert local_cache.peek(KEY) is ended


def test_cache_hides_invalidated_copies(local_cache: LocalCache) -> None:
    """An invalidated copy serves stale-if-error, but is not visible until it is revalidated or replaced."""
    one, other = snapshot(1), snapshot(1, OTHER)
    local_cache.apply(one, shown_at=0)
    local_cache.apply(other, shown_at=0)
    local_cache.invalidate(lambda key: key == KEY)
    assert local_cache.peek(KEY) is None
    assert local_cache.peek_stale(KEY) is local_cache.latest(KEY) is one
    assert local_cache.invalidated(KEY)
    assert local_cache.peek(OTHER) is other
    local_cache.invalidate(lambda key: key == OTHER)
    assert (local_cache.peek(KEY), local_cache.peek(OTHER)) == (None, None)
    local_cache.revalidate(KEY)
    assert local_cache.peek(KEY) is one
    local_cache.apply(snapshot(2, OTHER), shown_at=0)
    assert local_cache.peek(OTHER) is not None


def test_cache_invalidation_is_not_a_use(local_cache: LocalCache) -> None:
    """Invalidation does not count as use: the least recently used copies are still evicted first."""
    keys = [KEY._replace(task_id=str(number)) for number in range(15)]
    for key in keys[:10]:
        local_cache.apply(snapshot(1, key), shown_at=0)
    local_cache.peek(keys[0])
    local_cache.invalidate(lambda key: int(key.task_id) % 3 == 1)
    local_cache.invalidate(lambda _: True)
    for key in keys[10:]:
        local_cache.apply(snapshot(1, key), shown_at=0)
    assert {key for key in keys if local_cache.latest(key) is not None} == {keys[0], *keys[6:]}


def test_cache_invalidates_pending_copies(loop: TickedLoop, local_cache: LocalCache) -> None:
    """A copy that was pending at the invalidation is invalidated as well, also after its activation."""
    loop.within(lambda: local_cache.apply(snapshot(1), shown_at=1000.0 + LATER))
    local_cache.invalidate(lambda _: True)
    loop.advance(LATER + 0.01)
    assert local_cache.peek_stale(KEY) is not None
    assert local_cache.peek(KEY) is None


def test_cache_cancels_its_timers(loop: TickedLoop, memory: MemoryStore, local_cache: LocalCache) -> None:
    """After the close, no activation happens."""
    loop.within(lambda: local_cache.apply(snapshot(1), shown_at=1000.0 + LATER))
    local_cache.close()
    loop.advance(1)
    assert len(memory) == 0


_STEPS = st.one_of(
    st.tuples(st.just("take up"), st.integers(1, 9), st.sampled_from([0.0, LATER, 2 * LATER, 3 * LATER])),
    st.tuples(st.sampled_from(["doubt", "confirm", "wait"]), st.just(0), st.just(0.0)),
)


@given(steps=st.lists(_STEPS, max_size=20))
def test_cache_knows_until_when_a_copy_is_current(steps: list[tuple[str, int, float]]) -> None:
    """A visible copy that counts as current is always the one that `peek` returns."""
    loop = TickedLoop()
    memory = MemoryStore(max_tasks=10, stale_seconds=60, clock=loop.time)
    local_cache = LocalCache(memory, clock=loop.time)
    seen: list[Snapshot] = []
    for step, version, wait in steps:
        match step:
            case "take up":
                loop.within(lambda: local_cache.apply(snapshot(version), shown_at=loop.time() + wait))  # noqa: B023  # called at once
            case "doubt":
                local_cache.invalidate(lambda _: True)
            case "confirm":
                local_cache.revalidate(KEY)
            case "wait":
                loop.jump(LATER)  # and no timer has fired yet
        noted = [one for one in seen if memory.is_current(one, loop.time())]
        now = local_cache.peek(KEY)
        assert noted in ([], [now])
        if now is not None and now not in seen:
            seen.append(now)
    local_cache.close()
    loop.close()


def test_cache_marks_revalidated_copies_as_current(loop: TickedLoop, local_cache: LocalCache) -> None:
    """After revalidation a copy is current as before: without limit, or until its successor's activation."""
    one = snapshot(1)
    local_cache.apply(one, shown_at=0)
    for until in (float("inf"), 1000.0 + LATER):
        local_cache.invalidate(lambda _: True)
        assert one.current_until == float("-inf")
        local_cache.revalidate(KEY)
        if until > one.fetched_at + LATER:
            assert one.current_until == until
            loop.within(lambda: local_cache.apply(snapshot(2), shown_at=1000.0 + LATER))
    assert one.current_until == 1000.0 + LATER
