"""The limits of the tasks that wait for their first response, of all clients and of each."""

from contextlib import ExitStack

from gateway.progress.unanswered_tasks import UnansweredTasks

ONE, OTHER, THIRD = b"1", b"2", b"3"


def refuses(waiting: UnansweredTasks, client: bytes, tasks: int) -> bool:
    """Return whether a request is refused that would wait for so many tasks."""
    before = len(waiting)
    with waiting.counted(client, tasks):
        assert len(waiting) == before + tasks
    assert len(waiting) == before
    return not waiting.has_room(client, tasks)


def test_tasks_of_one_client_and_of_all_wait_within_limits() -> None:
    """4,000 tasks of one client may wait, and 8,000 of all."""
    waiting = UnansweredTasks()
    with waiting.counted(ONE, 4_000):
        assert refuses(waiting, ONE, 1)
        with waiting.counted(OTHER, 4_000):
            assert refuses(waiting, OTHER, 1)
            assert refuses(waiting, THIRD, 101)
        assert not refuses(waiting, OTHER, 4_000)
    assert not refuses(waiting, ONE, 4_000)


def test_clients_with_few_waiting_tasks_have_a_reserve() -> None:
    """Two clients cannot keep others from waiting: of each, 100 tasks still may, up to 4,000."""
    waiting = UnansweredTasks()
    with ExitStack() as stack:
        for number in range(2):
            stack.enter_context(waiting.counted(b"%d" % number, 4_000))
        for number in range(2, 42):
            client = b"%d" % number
            assert refuses(waiting, client, 101)
            stack.enter_context(waiting.counted(client, 60))
            assert refuses(waiting, client, 41)
            stack.enter_context(waiting.counted(client, 40))
        assert refuses(waiting, b"42", 1)


def test_requests_larger_than_the_limit_wait_alone() -> None:
    """With a large limits.max_tasks_per_request, one request may exceed the limits, if no other one waits."""
    waiting = UnansweredTasks()
    with waiting.counted(ONE, 9_000):
        assert refuses(waiting, ONE, 1)
        assert refuses(waiting, OTHER, 101)
    assert not refuses(waiting, ONE, 9_000)


def test_requests_without_waiting_tasks_are_always_admitted() -> None:
    """A request for known tasks does not wait, however many others do."""
    waiting = UnansweredTasks()
    with waiting.counted(ONE, 20_000):
        assert not refuses(waiting, ONE, 0)
        assert not refuses(waiting, OTHER, 0)


def test_tasks_are_counted_until_their_first_response() -> None:
    """Tasks that were admitted are counted one by one, and removed in any order."""
    waiting = UnansweredTasks()
    for _ in range(4_000):
        waiting.add(ONE)
    assert refuses(waiting, ONE, 1)
    waiting.remove(ONE)
    assert not refuses(waiting, ONE, 1)
    for _ in range(3_999):
        waiting.remove(ONE)
    assert len(waiting) == 0
