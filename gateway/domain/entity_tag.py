"""Entity tags of task representations: `"DIGEST.REVISION.SIGNATURE"`, opaque to clients.

DIGEST is a hash of the body: equal bodies have equal digests on every replica. REVISION is the time at which
a response with this body first arrived (`Snapshot.revision`). So a client that sends its tag also tells which
revision it has seen. It must not receive an older response. SIGNATURE proves that a gateway has issued the
revision: without it, a client could cause queries with invented revisions. The key of the signatures is
derived from the secret key that signs upstream calls, which all replicas have.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable

from gateway.domain.task import TaskKey

_KEY_BYTES = 16
_DIGEST_BYTES = 12
_SIGNATURE_BYTES = 6
_MAX_CANDIDATES = 8  # tags of one header whose signatures are checked
_TAG = re.compile(r'"?([0-9a-f]{24})\.([0-9a-f]{1,14})\.([0-9a-f]{12})"?')
# Apache's mod_deflate and mod_brotli append "-gzip" and "-br", Jetty "--gzip", others ";gzip".
_CODING = re.compile(r'(?:--?|;)(?:gzip|br|zstd|deflate)"$')


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
        digest = hashlib.blake2b(body, digest_size=_DIGEST_BYTES).hexdigest()
        return f'"{digest}.{revision:x}.{_sign(self._keys()[0], task, revision)}"'

    def revision(self, if_none_match: str, task: TaskKey) -> int:
        """Return the newest revision with a valid signature in If-None-Match or Last-Event-ID, or 0."""
        newest = 0
        for candidate in _candidates(if_none_match)[:_MAX_CANDIDATES]:
            match = _TAG.fullmatch(candidate)
            revision = 0 if match is None else int(match[2], 16)
            if match is not None and revision > newest:
                signatures = (_sign(key, task, revision) for key in self._keys())
                if any(hmac.compare_digest(match[3], signature) for signature in signatures):
                    newest = revision
        return newest

    def _keys(self) -> tuple[bytes, bytes]:
        secret = self._secret()
        if secret is not None and secret != self._current_secret:
            self._current_secret = secret
            key = hashlib.blake2b(secret.encode(), person=b"entity tags", digest_size=_KEY_BYTES).digest()
            self._key, self._previous_key = key, self._key
        return self._key, self._previous_key


def same_body(tag: str, other: str) -> bool:
    """Tell whether two tags belong to equal bodies, whatever their revisions."""
    return tag.partition(".")[0] == other.partition(".")[0]


def matches(if_none_match: str, etag: str) -> bool:
    """Tell whether If-None-Match contains a tag of the same body (RFC 9110, 13.1.2: weak comparison).

    A tag with the suffix of a compressing proxy (`"…-gzip"`, `"…;gzip"`) also matches.
    """
    if if_none_match == etag:  # the common case
        return True
    candidates = _candidates(if_none_match)
    return candidates == ["*"] or any(
        candidate == etag or (_TAG.fullmatch(candidate) is not None and same_body(candidate, etag))
        for candidate in candidates
    )


def _candidates(if_none_match: str) -> list[str]:
    return [_CODING.sub('"', part.strip().removeprefix("W/")) for part in if_none_match.split(",")]


def _sign(key: bytes, task: TaskKey, revision: int) -> str:
    content = f"{task.operation}/{task.task_id}/{revision}".encode()
    return hashlib.blake2b(content, key=key, digest_size=_SIGNATURE_BYTES).hexdigest()
