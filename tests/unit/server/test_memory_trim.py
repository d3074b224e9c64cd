"""Memory is returned to the system after many connections have closed."""

from gateway.server.memory_trim import MemoryTrim


def test_heap_is_trimmed_after_many_connections_have_closed() -> None:
    """The heap is trimmed after many connections have closed, at most once per interval; not after a few."""
    now, trimmed = 0.0, []
    heap = MemoryTrim(trim=lambda: trimmed.append(now), clock=lambda: now)
    assert [heap.observe(connections) for connections in (0, 90, 0, 50)] == [False] * 4
    assert [heap.observe(connections) for connections in (200, 120, 100, 0)] == [False, False, True, False]
    now = 10.0
    assert heap.observe(0)
    assert not heap.observe(0)
    assert trimmed == [0.0, 10.0]


def test_heap_of_this_system_can_be_trimmed() -> None:
    """The C library's function is called, if it exists."""
    heap = MemoryTrim()
    heap.observe(5000)
    assert heap.observe(0)
