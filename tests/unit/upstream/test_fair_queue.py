"""The fair queue: round robin over clients, and items that several clients wait for."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream.fair_queue import FairQueue

A, B, C = b"a", b"b", b"c"


def filled(**lines: int) -> FairQueue[str]:
    """Return a queue in which each client has added a number of items."""
    queue = FairQueue[str]()
    for client, count in lines.items():
        for number in range(count):
            queue.add(f"{client}{number}", client.encode())
    return queue


def emptied(queue: FairQueue[str]) -> list[str]:
    """Pop all items."""
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
    assert len(queue) == 0
    return popped


def test_fairqueue_serves_clients_round_robin() -> None:
    """A client with many items delays another by one item per round; its own items stay in order."""
    queue = filled(a=4, b=2, c=1)
    assert (len(queue), list(queue)) == (7, ["a0", "b0", "c0", "a1", "b1", "a2", "a3"])
    assert emptied(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_fairqueue_newcomer_waits_one_round() -> None:
    """A client without queued items is served after one item of each other client."""
    queue = filled(a=100, b=100)
    queue.pop()
    assert queue.count_ahead(C) == 2
    queue.add("c0", C)
    assert list(queue)[:4] == ["b0", "a1", "c0", "b1"]


def test_fairqueue_returning_client_waits_for_the_next_round() -> None:
    """A client that adds one item at a time is not preferred."""
    queue = filled(a=1, b=3)
    assert queue.pop() == "a0"
    queue.add("a1", A)
    assert emptied(queue) == ["b0", "a1", "b1", "b2"]


def test_fairqueue_shared_item_is_popped_at_its_first_position() -> None:
    """An item far back in one queue moves up when a new client joins it, and is popped once."""
    queue = filled(a=4)
    queue.join("a3", B)
    queue.join("a3", B)
    assert queue.count_ahead(C) == 2
    assert emptied(queue) == ["a0", "a3", "a1", "a2"]


def test_fairqueue_shared_item_keeps_the_better_position() -> None:
    """Joining does not enter an item into a queue in which it would be reached no sooner."""
    queue = filled(a=3)
    queue.join("a0", B)
    queue.join("gone", B)
    assert queue.count_ahead(B) == 1
    queue.add("b0", B)
    assert emptied(queue) == ["a0", "b0", "a1", "a2"]


def test_fairqueue_item_stays_for_remaining_clients() -> None:
    """When a client leaves, an item that others wait for stays queued for one of them."""
    queue = filled(a=3)
    queue.join("a2", B)
    queue.leave("a2", B, [A])
    assert list(queue) == ["a0", "a1", "a2"]
    queue.join("a0", B)
    queue.leave("a0", A, [B])
    assert list(queue) == ["a1", "a0", "a2"]
    queue.leave("a0", C, [B])
    queue.leave("gone", C, [B])
    queue.discard("a1")
    queue.discard("gone")
    assert emptied(queue) == ["a2", "a0"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "join", "leave", "discard", "pop"]),
            st.integers(0, 7),
            st.sampled_from([A, B, C]),
        ),
        max_size=60,
    )
)
def test_fairqueue_loses_and_repeats_nothing(moves: list[tuple[str, int, bytes]]) -> None:
    """After any sequence of operations, each item is popped once, in the predicted order."""
    queue, waiting = FairQueue[int](), dict[int, set[bytes]]()
    for move, item, client in moves:
        clients = waiting.get(item)
        if move == "add" and clients is None:
            ahead = queue.count_ahead(client)
            queue.add(item, client)
            waiting[item] = {client}
            # No later than predicted; sooner if items ahead are in several queues.
            assert list(queue).index(item) <= ahead
        elif move == "join" and clients is not None:
            before = list(queue).index(item)
            queue.join(item, client)
            clients.add(client)
            assert list(queue).index(item) <= before
        elif move == "leave" and clients is not None and client in clients and len(clients) > 1:
            clients.discard(client)
            queue.leave(item, client, clients)
        elif move == "discard":
            queue.discard(item)
            waiting.pop(item, None)
        elif move == "pop":
            expected = next(iter(queue), None)
            assert queue.pop() == expected
            if expected is not None:
                del waiting[expected]
        assert len(queue) == len(waiting)
        assert sorted(queue) == sorted(waiting)


class Compared(str):
    """A text that counts its comparisons."""

    __slots__ = ()
    count = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return str.__eq__(self, other)


def test_fairqueue_joins_without_a_search() -> None:
    """A client that joins many items causes work in proportion to their number."""
    queue, items = FairQueue[str](), [Compared(number) for number in range(300)]
    for item in items:
        queue.add(item, A)
    Compared.count = 0
    for client in (B, C):
        for item in items:
            queue.join(item, client)
    assert Compared.count < 20 * len(items)  # a search made 90,000
    assert emptied(queue) == items
