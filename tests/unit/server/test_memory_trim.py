"""Memory is returned to the system after many connections have closed."""

from gateway.server.memory_trim import MemoryTrim


def test_heap_is_trimmed_after_many_connections_have_closed() -> None:
    """The heap is trimmed after many connections have closed, at most once per interval; not after a few."""
    now, trimmed = 0.0, []
    heap = MemoryTrim(trim=lambda: trimmed.append(now), clock=lambda: now)
    assert [heap.observe(connections) for connections in (0, 90, 0, 50)] == [False] * 4
    assert [heap.observe(connections) for connections in (200, 120, 100, 100)] == [False, False, False, True]
    assert [heap.observe(connections) for connections in (300, 100, 100)] == [False] * 3
    now = 10.0
    assert heap.observe(100)
    assert not heap.observe(100)
    assert trimmed == [0.0, 10.0]


def test_heap_is_trimmed_after_the_last_connection_has_closed() -> None:
    """While connections still close, nothing is trimmed: the memory of the last ones would stay."""
    heap = MemoryTrim(trim=lambda: None)
    assert [heap.observe(connections) for connections in (200, 95, 0, 0)] == [False, False, False, True]


def test_heap_of_this_system_can_be_trimmed() -> None:
    """The C library's function is called, if it exists."""
    heap = MemoryTrim()
    assert [heap.observe(connections) for connections in (5000, 0, 0)] == [False, False, True]
