"""A fair queue: round robin over clients, first in first out for each client.

    add -> the end of the client's own queue -> pop: the first item of the next client

A client with many items delays another client by one item per round. If several clients wait for an item, it
can be in several of their queues: it joins the queue of a further client if that queue may reach it sooner.
`pop` removes it from all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _ClientQueue(OrderedDict[T, int]):
    """The items of one client, each with its number in the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self._next_number = 0

    def append(self, item: T) -> None:
        """Add an item as the last one."""
        self[item] = self._next_number
        self._next_number += 1

    def is_among_first(self, item: T, count: int) -> bool:
        """Tell whether so few items are left up to this one. Removed items in between still count."""
        return self[item] - next(iter(self.values())) < count


class FairQueue(Generic[T]):
    """One queue of items per client. Items are hashable and compared with ==."""

    def __init__(self) -> None:
        self._queues: OrderedDict[bytes, _ClientQueue[T]] = OrderedDict()  # the next client first
        self._queued_for: dict[T, set[bytes]] = {}  # the clients whose queues hold the item

    def __len__(self) -> int:
        """Return the number of items, each counted once."""
        return len(self._queued_for)

    def __iter__(self) -> Iterator[T]:
        """Yield the items in the order in which `pop` would return them."""
        seen: set[T] = set()
        queues = [iter(queue) for queue in self._queues.values()]
        while queues:
            for queue in tuple(queues):
                item = next((item for item in queue if item not in seen), None)
                if item is None:
                    queues.remove(queue)
                else:
                    seen.add(item)
                    yield item

    def client_with_shortest_queue(self, clients: Iterable[bytes]) -> bytes:
        """Return the client with the shortest queue, or b"" if there are no clients."""
        return min(clients, key=self._length, default=b"")

    def count_ahead(self, client: bytes) -> int:
        """Return how many items `pop` would return before an item that this client adds now."""
        own = self._length(client)
        if not own:
            return min(len(self._queues), len(self))
        count, before = own, True
        for other, queue in self._queues.items():
            if other == client:
                before = False
            else:
                count += min(len(queue), own + before)
        return min(count, len(self))

    def add(self, item: T, client: bytes) -> None:
        """Append a new item to this client's queue."""
        self._queued_for[item] = set()
        self._append(item, client)

    def join(self, item: T, client: bytes) -> None:
        """Record that a further client waits: append the item to its queue if that may be reached sooner."""
        clients = self._queued_for.get(item)
        if clients is None or client in clients:
            return
        rounds = self._length(client) + 1
        if not any(self._queues[other].is_among_first(item, rounds) for other in clients):
            self._append(item, client)

    def leave(self, item: T, client: bytes, others: Iterable[bytes]) -> None:
        """Remove an item from the queue of a client that left; `others` still wait for the item."""
        clients = self._queued_for.get(item)
        if clients is None or client not in clients:
            return
        self._remove(item, client)
        if clients:
            self.join(item, self.client_with_shortest_queue(others))
        else:
            self._append(item, self.client_with_shortest_queue(others))

    def discard(self, item: T) -> None:
        """Remove an item, if it is queued."""
        for client in tuple(self._queued_for.get(item, ())):
            self._remove(item, client)
        self._queued_for.pop(item, None)

    def pop(self) -> T | None:
        """Remove and return the next item, or None; its client becomes the last one in the round."""
        if not self._queues:
            return None
        client, queue = next(iter(self._queues.items()))
        item = next(iter(queue))
        self._queues.move_to_end(client)
        self.discard(item)
        return item

    def _length(self, client: bytes) -> int:
        queue = self._queues.get(client)
        return 0 if queue is None else len(queue)

    def _append(self, item: T, client: bytes) -> None:
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = _ClientQueue()
        queue.append(item)
        self._queued_for[item].add(client)

    def _remove(self, item: T, client: bytes) -> None:
        queue = self._queues[client]
        del queue[item]
        self._queued_for[item].discard(client)
        if not queue:
            del self._queues[client]
