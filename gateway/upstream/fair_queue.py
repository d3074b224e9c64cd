"""A queue that is fair to clients: one item of each in turn (round robin), each client's in order.

    add -> the client's line, last -> pop: the next client's first item

One client's long line delays another client by one item a round. An item that several clients wait for stands
in the lines of those that would reach it sooner, and leaves all of them together: the first place that is
reached counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items in the lines of their clients. Items are compared with ==."""

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, OrderedDict[T, None]] = OrderedDict()  # the next client first
        self._places: dict[T, set[bytes]] = {}

    def __len__(self) -> int:
        """Return the number of items, each counted once."""
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        """Yield the items in the order in which they would be popped."""
        seen: set[T] = set()
        lines = [iter(line) for line in self._lines.values()]
        while lines:
            for line in tuple(lines):
                item = next((item for item in line if item not in seen), None)
                if item is None:
                    lines.remove(line)
                else:
                    seen.add(item)
                    yield item

    def nearest(self, clients: Iterable[bytes]) -> bytes:
        """Return that one of these clients whose line is the shortest; b"" where there are none."""
        return min(clients, key=self._length, default=b"")

    def ahead(self, client: bytes) -> int:
        """Return how many items would be popped before one that this client adds now."""
        own = self._length(client)
        if not own:
            return min(len(self._lines), len(self))
        count, before = own, True
        for other, line in self._lines.items():
            if other == client:
                before = False
            else:
                count += min(len(line), own + before)
        return min(count, len(self))

    def add(self, item: T, client: bytes) -> None:
        """Put a new item at the end of this client's line."""
        self._places[item] = set()
        self._put(item, client)

    def join(self, item: T, client: bytes) -> None:
        """Let a further client wait for an item: in its own line, too, if it is reached sooner there."""
        places = self._places.get(item)
        if places is None or client in places:
            return
        rounds = self._length(client) + 1
        if not any(item in islice(self._lines[other], rounds) for other in places):
            self._put(item, client)

    def leave(self, item: T, client: bytes, others: Iterable[bytes]) -> None:
        """Take an item out of the line of a client that left; `others` still wait for it."""
        places = self._places.get(item)
        if places is None or client not in places:
            return
        self._take(item, client)
        if places:
            self.join(item, self.nearest(others))
        else:
            self._put(item, self.nearest(others))

    def discard(self, item: T) -> None:
        """Remove an item, if it is there."""
        for client in tuple(self._places.get(item, ())):
            self._take(item, client)
        self._places.pop(item, None)

    def pop(self) -> T | None:
        """Remove and return the next item; the client whose it was comes last in the next round."""
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        item = next(iter(line))
        self._lines.move_to_end(client)
        self.discard(item)
        return item

    def _length(self, client: bytes) -> int:
        line = self._lines.get(client)
        return 0 if line is None else len(line)

    def _put(self, item: T, client: bytes) -> None:
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = OrderedDict()
        line[item] = None
        self._places[item].add(client)

    def _take(self, item: T, client: bytes) -> None:
        line = self._lines[client]
        del line[item]
        self._places[item].discard(client)
        if not line:
            del self._lines[client]
