"""Entity tags: equal digests for equal bodies, and revisions that only a gateway can issue."""

import hashlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.domain.entity_tag import EntityTags, digest_of, matches, possible_tags, same_body
from gateway.domain.task import Operation, TaskKey

TASK = TaskKey(Operation.SD_GET_PROGRESS, "task")
OTHERS = [TASK._replace(task_id="other"), TASK._replace(operation=Operation.COMFY_GET_PROGRESS)]
BODY = b'{"taskId":"task"}'
REVISION = 1_700_000_000_000_000  # microseconds since 1970
SECRET = "secret key"


@pytest.fixture
def tags() -> EntityTags:
    """Return tags with a fixed secret."""
    return EntityTags(lambda: SECRET)


@given(body=st.binary(), revision=st.integers(1, 2**53 - 1))
def test_tag_names_its_revision(body: bytes, revision: int) -> None:
    """A tag is a strong entity tag, and returns the revision with which it was issued."""
    tags = EntityTags(lambda: SECRET)
    tag = tags.issue(TASK, body, revision)
    assert tag[0] == tag[-1] == '"'
    assert all(character in "0123456789abcdef." for character in tag[1:-1])
    assert tags.revision(tag, TASK) == revision
    assert tags.revision(tag.strip('"'), TASK) == revision, "a Last-Event-ID has no quotes"


def test_tag_is_the_same_on_every_replica(tags: EntityTags) -> None:
    """Replicas with the same secret issue the same tag for a body and revision."""
    assert EntityTags(lambda: SECRET).issue(TASK, BODY, REVISION) == tags.issue(TASK, BODY, REVISION)


def test_tag_needs_no_secret() -> None:
    """Without a secret each instance has its own random key."""
    one, other = EntityTags(), EntityTags()
    tag = one.issue(TASK, BODY, REVISION)
    assert one.revision(tag, TASK) == REVISION
    assert other.revision(tag, TASK) == 0
    assert tag != other.issue(TASK, BODY, REVISION)


def test_tag_with_a_forged_revision_names_none(tags: EntityTags) -> None:
    """A revision without its signature is ignored: a forged tag must not cause a query."""
    digest, _, signature = tags.issue(TASK, BODY, REVISION).strip('"').split(".")
    for forged in (f"{digest}.{REVISION + 1:x}.{signature}", f"{digest}.{REVISION:x}.{'0' * 12}"):
        assert tags.revision(f'"{forged}"', TASK) == 0
        assert tags.revision(forged, TASK) == 0


@given(revisions=st.lists(st.just(0) | st.integers(1, 2**53 - 1), min_size=1, max_size=5))
def test_tag_of_a_batch_names_all_revisions(revisions: list[int]) -> None:
    """The tag of a batch returns the revision of each task, only for the same tasks in the same order."""
    tags = EntityTags(lambda: SECRET)
    tasks = [TASK._replace(task_id=f"task-{number}") for number in range(len(revisions))]
    tag = tags.issue_for_batch(digest_of(BODY), dict(zip(tasks, revisions, strict=True)))
    known = {task: revision for task, revision in zip(tasks, revisions, strict=True) if revision}
    assert tags.revisions_of_batch(f'"other", W/{tag}', tasks) == known
    assert tags.revisions_of_batch(tag, [*tasks[1:], TASK]) == {}
    assert tags.revisions_of_batch(tag, [*tasks, TASK]) == {}
    assert matches(f"W/{tag}", f'"{digest_of(BODY)}"')
    assert not matches(tag, digest_of(b"other"))
    assert tags.revision(tag, tasks[0]) == 0


@given(data=st.data())
def test_changed_tag_of_a_batch_names_no_revision(data: st.DataObject) -> None:
    """Revisions that no gateway has issued are ignored, whatever they look like."""
    tags = EntityTags(lambda: SECRET)
    tag = tags.issue_for_batch(digest_of(BODY), {TASK: REVISION, OTHERS[0]: REVISION - 1})
    digest, packed, signature = tag.strip('"').split(".")
    other = data.draw(st.text("0123456789abcdefgXYZ_-", min_size=1, max_size=20))
    assume(other != packed)
    assert tags.revisions_of_batch(f'"{digest}.{other}.{signature}"', [TASK, OTHERS[0]]) == {}


def test_newest_revisions_of_several_batch_tags_count(tags: EntityTags) -> None:
    """Of several tags in If-None-Match, each task's newest revision counts."""
    one = tags.issue_for_batch(digest_of(BODY), {TASK: 7, OTHERS[0]: 5})
    other = tags.issue_for_batch(digest_of(b""), {TASK: 6, OTHERS[0]: 9})
    assert tags.revisions_of_batch(f"{one}, {other}", [TASK, OTHERS[0]]) == {TASK: 7, OTHERS[0]: 9}


def test_only_the_first_tags_of_a_header_count(tags: EntityTags) -> None:
    """A client that sends thousands of tags gets a full response, at the cost of eight tags."""
    tag = tags.issue(TASK, BODY, REVISION)
    batch = tags.issue_for_batch(digest_of(BODY), {TASK: REVISION})
    for before, counts in ((7, True), (8, False), (5_000, False)):
        header = '"other",' * before
        assert matches(header + tag, tag) is counts
        assert bool(tags.revision(header + tag, TASK)) is counts
        assert bool(tags.revisions_of_batch(header + batch, [TASK])) is counts


def test_tag_of_a_batch_is_short(tags: EntityTags) -> None:
    """The tag of 100 tasks that changed within the last minute has less than a kilobyte."""
    tasks = [TASK._replace(task_id=f"task-{number}") for number in range(100)]
    revisions = {task: REVISION - number * 600_000 for number, task in enumerate(tasks)}
    assert len(tags.issue_for_batch(digest_of(BODY), revisions)) < 600


@pytest.mark.parametrize("other", OTHERS)
def test_tag_of_another_task_names_no_revision(tags: EntityTags, other: TaskKey) -> None:
    """The signature covers operation and task ID."""
    tag = tags.issue(TASK, BODY, REVISION)
    assert tags.revision(tag, other) == 0
    newer = tags.issue(other, BODY, REVISION + 1)
    assert tags.revision(f"{tag}, {newer}", TASK) == REVISION


def test_tag_survives_the_rotation_of_the_secret() -> None:
    """After the secret has changed, tags with the one before still count, also when it changes back."""
    secret = ["one"]
    tags = EntityTags(lambda: secret[0])
    before = tags.issue(TASK, BODY, REVISION)
    elsewhere = EntityTags(lambda: "two").issue(TASK, BODY, REVISION + 1)
    assert tags.revision(elsewhere, TASK) == 0
    for secret[0] in ("two", "one", "two"):
        for _ in range(2):  # the same secret again changes nothing
            assert tags.revision(before, TASK) == REVISION
        if secret[0] == "two":
            assert tags.issue(TASK, BODY, REVISION + 1) == elsewhere
            assert tags.revision(elsewhere, TASK) == REVISION + 1
    secret[0] = "three"
    assert tags.revision(before, TASK) == 0
    assert tags.revision(elsewhere, TASK) == REVISION + 1


def test_tag_survives_the_arrival_and_the_loss_of_the_secret() -> None:
    """Tags that were issued before there was a secret still count; without one, the last key is used."""
    secret: list[str | None] = [None]
    tags = EntityTags(lambda: secret[0])
    before = tags.issue(TASK, BODY, REVISION)
    assert tags.revision(before, TASK) == REVISION
    secret[0] = "one"
    assert tags.revision(before, TASK) == REVISION
    after = tags.issue(TASK, BODY, REVISION)
    assert after == EntityTags(lambda: "one").issue(TASK, BODY, REVISION)
    secret[0] = None
    assert tags.issue(TASK, BODY, REVISION) == after
    assert tags.revision(before, TASK) == REVISION


def test_tag_does_not_show_the_secret(tags: EntityTags) -> None:
    """A tag has hashes only, and a signature is no plain hash of what clients know."""
    tag = tags.issue(TASK, BODY, REVISION)
    content = f"{TASK.operation}/{TASK.task_id}/{REVISION}".encode()
    assert SECRET not in tag
    for key in (b"", SECRET.encode()):
        assert hashlib.blake2b(content, key=key, digest_size=6).hexdigest() not in tag


def test_tags_of_equal_bodies_match(tags: EntityTags) -> None:
    """Tags of equal bodies match, whatever their revisions or keys; tags of other bodies do not."""
    tag = tags.issue(TASK, BODY, REVISION)
    for same in (
        tags.issue(TASK, BODY, REVISION + 1),
        EntityTags(lambda: "other").issue(TASK, BODY, REVISION),
    ):
        assert same != tag
        assert same_body(same, tag)
        assert matches(same, tag)
    other = tags.issue(TASK, BODY + b" ", REVISION)
    assert not same_body(other, tag)
    assert not matches(other, tag)


@pytest.mark.parametrize(
    "sent",
    [
        "{tag}",
        "W/{tag}",
        '"{text}-gzip"',
        '"{text}--gzip"',
        '"{text};gzip"',
        '"{text}-br"',
        '"{text}-zstd"',
        '"{text}-deflate"',
        'W/"{text}-gzip"',
        '"other", {tag}',
        '{tag},"other"',
        '"other" , W/"{text};gzip"',
    ],
)
def test_tag_changed_by_a_proxy_still_counts(tags: EntityTags, sent: str) -> None:
    """A tag that a compressing proxy has changed, or one of several, matches with its revision."""
    tag = tags.issue(TASK, BODY, REVISION)
    sent = sent.format(tag=tag, text=tag.strip('"'))
    assert matches(sent, tag)
    assert matches(sent, tags.issue(TASK, BODY, REVISION + 1))
    assert not matches(sent, tags.issue(TASK, BODY + b" ", REVISION))
    assert tags.revision(sent, TASK) == REVISION


@pytest.mark.parametrize("sent", ['"{text}-lzma"', '"{text}gzip"', '"x{text}"', '"{text}.1"', '""', "", '"'])
def test_tag_of_another_form_does_not_match(tags: EntityTags, sent: str) -> None:
    """A tag that no gateway has issued matches nothing."""
    tag = tags.issue(TASK, BODY, REVISION)
    sent = sent.format(text=tag.strip('"'))
    assert not matches(sent, tag)
    assert tags.revision(sent, TASK) == 0


def test_any_tag_matches_a_star(tags: EntityTags) -> None:
    """`*` matches every representation, and names no revision."""
    assert matches("*", tags.issue(TASK, BODY, REVISION))
    assert tags.revision("*", TASK) == 0


def test_newest_of_several_revisions_counts(tags: EntityTags) -> None:
    """A header with several tags names the newest valid revision."""
    older, newer = (tags.issue(TASK, BODY, revision) for revision in (REVISION, REVISION + 5))
    forged = newer.replace(f"{REVISION + 5:x}", f"{REVISION + 6:x}")
    for sent in (f"{older}, {newer}, {forged}", f"{forged}, {newer}, {older}"):
        assert tags.revision(sent, TASK) == REVISION + 5


@given(st.text())
def test_no_header_raises(text: str) -> None:
    """Any text of a client matches or not, and names no revision."""
    tags = EntityTags(lambda: SECRET)
    assert tags.revision(text, TASK) == 0
    assert isinstance(matches(text, tags.issue(TASK, BODY, REVISION)), bool)


@pytest.mark.parametrize("tasks", [1, 3, 100])
def test_possible_tags_keep_every_tag_that_may_match(tags: EntityTags, tasks: int) -> None:
    """Long texts, which match nothing, are dropped; the meaning of the header stays."""
    keys = [TASK._replace(task_id=f"task-{number}") for number in range(tasks)]
    issued = tags.issue_for_batch(digest_of(BODY), {key: number * 2**46 for number, key in enumerate(keys)})
    single = tags.issue(TASK, BODY, REVISION)
    header = f'{"a" * 20_000}, W/{issued}, {single[:-1]}-gzip", *'
    kept = possible_tags(header, tasks=tasks)
    assert len(kept) < 300 + 16 * tasks
    for tag in (issued, single):
        assert matches(kept, tag)
    assert not matches(kept, tags.issue(TASK, b"another", REVISION))
    assert tags.revision(kept, TASK) == REVISION
    assert tags.revisions_of_batch(kept, keys) == tags.revisions_of_batch(header, keys)
    assert possible_tags(" * ", tasks=tasks) == "*"
