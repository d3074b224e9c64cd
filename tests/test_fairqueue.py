"""The fair queue: one item of each client in turn, and items that several clients wait for."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream.fair_queue import FairQueue

A, B, C = b"a", b"b", b"c"


def filled(**lines: int) -> FairQueue[str]:
    """Return a queue in which each client has added so many items."""
    queue = FairQueue[str]()
    for client, count in lines.items():
        for number in range(count):
            queue.add(f"{client}{number}", client.encode())
    return queue


def emptied(queue: FairQueue[str]) -> list[str]:
    """Pop everything."""
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
    assert len(queue) == 0
    return popped


def test_fairqueue_serves_clients_in_turn() -> None:
    """A long line delays another client by one item a round; within a line the order stays."""
    queue = filled(a=4, b=2, c=1)
    assert (len(queue), list(queue)) == (7, ["a0", "b0", "c0", "a1", "b1", "a2", "a3"])
    assert emptied(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_fairqueue_newcomer_waits_one_round() -> None:
    """However much is queued, a client without items is served after one item of each other client."""
    queue = filled(a=100, b=100)
    queue.pop()
    assert queue.count_ahead(C) == 2
    queue.add("c0", C)
    assert list(queue)[:4] == ["b0", "a1", "c0", "b1"]


def test_fairqueue_client_that_comes_back_waits_for_its_next_turn() -> None:
    """A client that adds one item at a time is not served out of turn."""
    queue = filled(a=1, b=3)
    assert queue.pop() == "a0"
    queue.add("a1", A)
    assert emptied(queue) == ["b0", "a1", "b1", "b2"]


def test_fairqueue_shared_item_counts_in_the_place_that_is_reached_first() -> None:
    """A newcomer's item that another client has far back in its line moves up, and is popped once."""
    queue = filled(a=4)
    queue.join("a3", B)
    queue.join("a3", B)
    assert queue.count_ahead(C) == 2
    assert emptied(queue) == ["a0", "a3", "a1", "a2"]


def test_fairqueue_shared_item_keeps_the_better_place() -> None:
    """Joining takes nothing from a newcomer whose own place would be no better."""
    queue = filled(a=3)
    queue.join("a0", B)
    queue.join("gone", B)
    assert queue.count_ahead(B) == 1
    queue.add("b0", B)
    assert emptied(queue) == ["a0", "b0", "a1", "a2"]


def test_fairqueue_item_stays_for_those_who_still_wait() -> None:
    """When a client leaves, its places go; an item that others wait for keeps theirs, or gets one."""
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
    """Whatever is done in whichever order, each item is popped once, in the order that was told."""
    queue, waiting = FairQueue[int](), dict[int, set[bytes]]()
    for move, item, client in moves:
        clients = waiting.get(item)
        if move == "add" and clients is None:
            ahead = queue.count_ahead(client)
            queue.add(item, client)
            waiting[item] = {client}
            # No later than told; sooner where items ahead stand in several lines.
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
