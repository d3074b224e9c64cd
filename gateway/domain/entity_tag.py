"""Entity tags of task representations: `"DIGEST.REVISION.SIGNATURE"`, opaque to clients.

DIGEST is a hash of the body: equal bodies have equal digests on every replica. REVISION is the time at which
a response with this body first arrived (`Snapshot.revision`). So a client that sends its tag also tells which
revision it has seen. It must not receive an older response. SIGNATURE proves that a gateway has issued the
revision: without it, a client could cause queries with invented revisions. The key of the signatures is
derived from the secret key that signs upstream calls, which all replicas have.

The tag of a batch has the same form. Its REVISION is the list of the revisions of all its tasks.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence

from gateway.domain.task import TaskKey

_KEY_BYTES = 16
_DIGEST_BYTES = 12
_SIGNATURE_BYTES = 6
_LIST = "list "  # starts a signed list, so that no signature fits both a list and a single revision
_MAX_CANDIDATES = 8  # further tags of a header are ignored: a client could send thousands
_TAG = re.compile(r'"?([0-9a-f]{24})\.([0-9a-f]{1,14})\.([0-9a-f]{12})"?')
_BATCH_TAG = re.compile(r'"?([0-9a-f]{24})\.([0-9A-Za-z_-]{1,16384})\.([0-9a-f]{12})"?')
# Apache's mod_deflate and mod_brotli append "-gzip" and "-br", Jetty "--gzip", others ";gzip".
_CODING = re.compile(r'(?:--?|;)(?:gzip|br|zstd|deflate)"$')
_LONGEST_TAG = 64  # characters, with one revision
_LONGEST_PACKED = 16  # characters of each further revision in the tag of a batch
_LONGEST_CODING = 10  # characters of `--deflate"`


class EntityTags:
    """Issues tags, and reads the revisions of tags. The key may change; tags of the previous key stay valid.

    `secret` returns the secret that all replicas have, or None if there is none yet.
    """

    def __init__(self, secret: Callable[[], str | None] = lambda: None) -> None:
        self._secret = secret
        self._current_secret: str | None = None
        self._key = self._previous_key = secrets.token_bytes(_KEY_BYTES)

    def issue(self, task: TaskKey, body: bytes, revision: int) -> str:
        """Return the strong entity tag of a body, with its quotes."""
        signature = _sign(self._keys()[0], [task], f"{revision}")
        return f'"{digest_of(body)}.{revision:x}.{signature}"'

    def issue_for_batch(self, digest: str, revisions: Mapping[TaskKey, int]) -> str:
        """Return the tag of a batch, with its quotes. `revisions`: of each task; 0 for one without a body."""
        packed = _pack(tuple(revisions.values()))
        return f'"{digest}.{packed}.{_sign(self._keys()[0], tuple(revisions), _LIST + packed)}"'

    def revision(self, if_none_match: str, task: TaskKey) -> int:
        """Return the newest revision with a valid signature in If-None-Match or Last-Event-ID, or 0."""
        newest = 0
        for candidate in _candidates(if_none_match):
            match = _TAG.fullmatch(candidate)
            revision = 0 if match is None else int(match[2], 16)
            if match is not None and revision > newest and self._is_signed(match[3], [task], f"{revision}"):
                newest = revision
        return newest

    def revisions_of_batch(self, if_none_match: str, tasks: Sequence[TaskKey]) -> dict[TaskKey, int]:
        """Return the newest revision of each task in the tags of If-None-Match that belong to these tasks."""
        newest: dict[TaskKey, int] = {}
        for candidate in _candidates(if_none_match):
            match = _BATCH_TAG.fullmatch(candidate)
            if match is not None and self._is_signed(match[3], tasks, _LIST + match[2]):
                for task, revision in zip(tasks, _unpack(match[2]), strict=True):
                    if revision > newest.get(task, 0):
                        newest[task] = revision
        return newest

    def _is_signed(self, signature: str, tasks: Sequence[TaskKey], revision: str) -> bool:
        return any(hmac.compare_digest(signature, _sign(key, tasks, revision)) for key in self._keys())

    def _keys(self) -> tuple[bytes, bytes]:
        secret = self._secret()
        if secret is not None and secret != self._current_secret:
            self._current_secret = secret
            key = hashlib.blake2b(secret.encode(), person=b"entity tags", digest_size=_KEY_BYTES).digest()
            self._key, self._previous_key = key, self._key
        return self._key, self._previous_key


def digest_of(body: bytes) -> str:
    """Return the digest of a body, as in its tags."""
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).hexdigest()


def same_body(tag: str, other: str) -> bool:
    """Tell whether two tags belong to equal bodies, whatever their revisions."""
    return tag.partition(".")[0].strip('"') == other.partition(".")[0].strip('"')


def matches(if_none_match: str, etag: str) -> bool:
    """Tell whether If-None-Match contains a tag of the same body (RFC 9110, 13.1.2: weak comparison).

    A tag with the suffix of a compressing proxy (`"…-gzip"`, `"…;gzip"`) also matches.
    """
    if if_none_match == etag:  # the common case
        return True
    candidates = _candidates(if_none_match)
    return candidates == ["*"] or any(
        candidate == etag or (_BATCH_TAG.fullmatch(candidate) is not None and same_body(candidate, etag))
        for candidate in candidates
    )


def possible_tags(if_none_match: str, *, tasks: int = 1) -> str:
    """Return the tags of If-None-Match that may be tags of so many tasks. The others match nothing."""
    candidates = _candidates(if_none_match)
    if candidates == ["*"]:
        return "*"
    longest = _LONGEST_TAG + _LONGEST_PACKED * tasks
    return ",".join(candidate for candidate in candidates if len(candidate) <= longest)


def _candidates(if_none_match: str) -> list[str]:
    parts = if_none_match.split(",", _MAX_CANDIDATES)[:_MAX_CANDIDATES]
    return [_without_coding(part.strip().removeprefix("W/")) for part in parts]


def _without_coding(tag: str) -> str:
    found = _CODING.search(tag, max(len(tag) - _LONGEST_CODING, 0))
    return tag if found is None else tag[: found.start()] + '"'


def _sign(key: bytes, tasks: Sequence[TaskKey], revision: str) -> str:
    content = "/".join([*(f"{task.operation}/{task.task_id}" for task in tasks), revision]).encode()
    return hashlib.blake2b(content, key=key, digest_size=_SIGNATURE_BYTES).hexdigest()


def _pack(revisions: Sequence[int]) -> str:
    """Encode revisions as URL-safe base64: the newest, and for each its distance to the newest plus 1, or 0.

    The numbers have 7 bits in each byte, the lowest first. Most distances are seconds, which takes 4 bytes.
    """
    newest = max(revisions, default=0)
    packed = bytearray()
    for each in (newest, *(newest - revision + 1 if revision else 0 for revision in revisions)):
        number = each
        while number > 0x7F:  # noqa: PLR2004 - 7 bits
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _unpack(text: str) -> list[int]:
    """Decode what `_pack` has encoded."""
    numbers, number, shift = [], 0, 0
    for byte in base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)):
        number |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(number)
            number, shift = 0, 0
    newest, *distances = numbers
    return [newest - distance + 1 if distance else 0 for distance in distances]
