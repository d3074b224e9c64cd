"""Says in words why the store fails, and names the permission or setting that is missing.

The reasons are shown in `/readyz`, which needs no login. So they have neither addresses nor keys, and never
repeat the server's own text. The name of a command or the reason of a TLS library is safe.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import Iterator

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.settings.secret_files import describe_read_error
from gateway.settings.secret_text import InvalidSecret

# TimeoutError, also asyncio's, is an OSError.
ERRORS = (RedisError, RedisClusterException, OSError, ValueError)

_MOST_CAUSES = 8
_PREFIX = "PREFIX"  # stands for store.key_prefix in the ACL rules below

SLOW = "slow: no reply in time"
CLOSED = "no connection: the server has closed it"
UNREACHABLE = "no connection in time (wrong address, or blocked by a firewall)"
NOT_VALKEY = "no Valkey or Redis server: its replies have another protocol"
IS_CLUSTER = "the server is part of a cluster: set store.cluster"
# Not the whole cause: `diagnosis.py` looks further.
UNCLEAR = frozenset({SLOW, CLOSED, UNREACHABLE, NOT_VALKEY})

NO_TLS = "TLS: the server does not use it: write valkey:// in store.url"
WANTS_TLS = "TLS: the server requires it: write valkeys:// in store.url"
_CERTIFICATE_FILES = "store.client_cert_file and store.client_key_file"
_WANTS_CERTIFICATE = f"TLS: the server requires a client certificate: set {_CERTIFICATE_FILES}"

# The server's error codes, which scripts may report within a text, and redis-py's classes for them.
_REASONS = {
    "READONLY": "read-only: the server is a replica",
    "OOM": "full: the server has reached its maxmemory",
    "MISCONF": "read-only: the server cannot save its data to disk",
    "NOREPLICAS": "read-only: the server has too few replicas",
    "NOPERM": "a permission of the user is missing",
    "NOAUTH": "login: the server requires a password",
    "WRONGPASS": "login: the server rejects user name or password, or the user is disabled",
    "LOADING": "the server is loading its data",
    "BUSY": "busy: the server runs a long script",
    "CLUSTERDOWN": "the cluster is down",
    "MASTERDOWN": "the server has lost its primary",
    "MOVED": IS_CLUSTER,
    "DENIED": "login: the server is in protected mode: it needs a password, or protected-mode no",
}
_CODE = re.compile(rf"\b({'|'.join(_REASONS)})\b")
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (ReadOnlyError, "READONLY"),
    (OutOfMemoryError, "OOM"),
    (NoPermissionError, "NOPERM"),
    (AuthenticationError, "WRONGPASS"),
    (BusyLoadingError, "LOADING"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (MovedError, "MOVED"),
)

# How Redis and Valkey report a missing permission for a command, key or channel. Some versions do so without
# a code, and in scripts without the name of the command.
_FORBIDDEN = re.compile(
    "permissions? to (run|access)|ACL failure in script"
    "|can't (run this command|access at least one|publish to)"
)
_FORBIDDEN_COMMAND = re.compile("permissions? to run the '([a-z_|-]{1,40})'", re.IGNORECASE)
_FORBIDDEN_OBJECTS = (
    (re.compile("access (a|one of the|at least one of the) keys?"), f"~{_PREFIX}:*"),
    (re.compile("access (a|one of the) channels?|publish to the channel"), f"&{_PREFIX}:*"),
    (re.compile("access database"), "alldbs"),
)

_UNKNOWN_COMMAND = re.compile("unknown (?:redis )?command(?: [`']([a-z]{1,20}))?", re.IGNORECASE)
_NOT_DETERMINISTIC = re.compile("non deterministic commands")  # before Redis 5
_NO_CLUSTER = "the server is not part of a cluster: unset store.cluster"
_TEXTS = (
    (
        re.compile("DB index is out of range|invalid DB index|Invalid Database"),
        "the server has no database of this number: change the path of store.url",
    ),
    (re.compile("SELECT is not allowed in cluster mode"), IS_CLUSTER),
    (
        re.compile("max number of clients reached"),
        "full: the server accepts no more connections (maxclients)",
    ),
    (
        re.compile("without any password configured"),
        "login: the server's default user has no password: remove the password, or set the user name",
    ),
    (re.compile("Authentication required"), _REASONS["NOAUTH"]),
    (re.compile("cluster support disabled"), _NO_CLUSTER),
    (
        re.compile("slots are not covered|not covered by the cluster"),
        "the cluster is incomplete: some slots have no node",
    ),
    (_NOT_DETERMINISTIC, "the server is too old: Redis 6.2 or newer is required"),
)
_UNKNOWN = {
    "SENTINEL": "the server is not a Sentinel: unset store.sentinel_service, or correct store.url",
    "CLUSTER": _NO_CLUSTER,
}

_ERRNO = re.compile(r"\[Errno (\d+)\]")
_CONNECT_ERRORS = {
    errno.ECONNREFUSED: "no connection: refused (no server listens there, or a firewall blocks it)",
    errno.ECONNRESET: CLOSED,
    errno.EPIPE: CLOSED,
    errno.EHOSTUNREACH: "no connection: no route to the server",
    errno.ENETUNREACH: "no connection: no route to the server",
    errno.ETIMEDOUT: UNREACHABLE,
    errno.EMFILE: "no connection: this process has too many open files",
}

# OpenSSL's codes of verification errors.
_UNTRUSTED = {18, 19, 20, 21}
_WRONG_NAME = {62, 64}
# OpenSSL's reasons. An alert comes from the server.
_REJECTED = re.compile("ALERT_(UNKNOWN_CA|(BAD|UNSUPPORTED)_CERTIFICATE|CERTIFICATE_[A-Z]+|ACCESS_DENIED)")
_TLS_ERRORS = (
    (re.compile("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST"), NO_TLS),
    (re.compile("ALERT_CERTIFICATE_REQUIRED"), _WANTS_CERTIFICATE),
    (
        re.compile("ALERT_HANDSHAKE_FAILURE"),
        f"TLS: the server refuses it; it may require a client certificate: set {_CERTIFICATE_FILES}",
    ),
    (_REJECTED, "TLS: the server rejects the client certificate of store.client_cert_file"),
    (re.compile("PROTOCOL"), "TLS: no version that both sides support"),
)


class StoreFailure(ValueError):
    """The store cannot be used for a known reason, which is the text."""


def reason_of(exc: BaseException, *, key_prefix: str) -> str:
    """Return in words why the store fails."""
    causes = list(_causes(exc))
    # The text of an InvalidSecret names the file, and shows nothing of its content.
    known = next((each for each in causes if isinstance(each, StoreFailure | InvalidSecret)), None)
    if known is not None:
        return str(known)
    # The innermost exception is the most specific one: redis-py wraps those of sockets and servers.
    for each in reversed(causes):
        reason = _reason(each, key_prefix)
        if reason:
            return reason
    lost = isinstance(exc, OSError | RedisConnectionError)
    return f"no connection ({type(exc).__name__})" if lost else f"unexpected error ({type(exc).__name__})"


def missing_rules(exc: BaseException, *, key_prefix: str) -> list[str]:
    """Return the ACL rule without which the server refuses an operation; [] if that is not the reason."""
    for each in _causes(exc):
        text = str(each)
        if isinstance(each, ResponseError) and (
            isinstance(each, NoPermissionError) or _FORBIDDEN.search(text)
        ):
            command = _FORBIDDEN_COMMAND.search(text)
            if command is not None:
                return [f"+{command[1].lower()}"]
            found = (rule for pattern, rule in _FORBIDDEN_OBJECTS if pattern.search(text))
            return [rule.replace(_PREFIX, key_prefix) for rule in found][:1]
    return []


def missing_permissions(rules: list[str]) -> str:
    """Return the reason for missing ACL rules."""
    return f"missing permissions of the user: {' '.join(rules)}"


def is_unsupported(exc: BaseException) -> bool:
    """Tell whether the server does not know a command, or not well enough."""
    return isinstance(exc, ResponseError) and bool(
        _UNKNOWN_COMMAND.search(str(exc)) or _NOT_DETERMINISTIC.search(str(exc))
    )


def affects_all_operations(exc: BaseException) -> bool:
    """Tell whether other operations would fail with this error, too, so that the connection is of no use."""
    if isinstance(exc, MovedError):  # of one slot: a client of a cluster finds the new node
        return False
    if isinstance(exc, ResponseError) and not isinstance(exc, tuple(kind for kind, _ in _CODES)):
        return bool(_CODE.search(str(exc)) or _FORBIDDEN.search(str(exc)))
    return True


def words_of_file_error(exc: OSError | ValueError) -> str:
    """Return which file cannot be used, and why."""
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {describe_read_error(exc)}"
    return str(exc)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = exc
    for _ in range(_MOST_CAUSES):
        if each is None:
            return
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _reason(exc: BaseException, key_prefix: str) -> str:
    reason = ""
    match exc:
        case ssl.SSLError():
            reason = _tls_reason(exc)
        case RedisTimeoutError():
            reason = UNREACHABLE
        case OSError():
            reason = _connect_reason(exc)
        case InvalidResponse():
            reason = NOT_VALKEY
        case RedisError() | RedisClusterException():
            reason = _server_reason(exc, key_prefix)
        case asyncio.IncompleteReadError():
            reason = CLOSED
    return reason


def _server_reason(exc: RedisError | RedisClusterException, key_prefix: str) -> str:
    text = str(exc)
    if rules := missing_rules(exc, key_prefix=key_prefix):
        return missing_permissions(rules)
    if found := next((reason for pattern, reason in _TEXTS if pattern.search(text)), ""):
        return found
    if isinstance(exc, ResponseError) and (unknown := _UNKNOWN_COMMAND.search(text)):
        command = (unknown[1] or "").upper()
        return _UNKNOWN.get(command, f"the server does not know the command {command or 'of a script'}")
    code = next((code for kind, code in _CODES if isinstance(exc, kind)), None)
    if code is None and isinstance(exc, ResponseError | RedisConnectionError):
        match = _CODE.search(text)
        code = match[1] if match is not None else "NOPERM" if _FORBIDDEN.search(text) else None
    if code is not None:
        return _REASONS[code]
    return CLOSED if "Connection closed by server" in text or "Connection lost" in text else ""


def _connect_reason(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        temporary = exc.errno == socket.EAI_AGAIN
        return f"no connection: {'the name server does not answer' if temporary else 'host name not found'}"
    number = exc.errno
    if number is None and (found := _ERRNO.search(str(exc))):  # several addresses: asyncio joins the texts
        number = int(found[1])
    if number in _CONNECT_ERRORS:
        return _CONNECT_ERRORS[number]
    if isinstance(exc, TimeoutError):
        return SLOW
    return CLOSED if isinstance(exc, ConnectionError) else ""


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        if exc.verify_code in _WRONG_NAME:
            return "TLS: the server's certificate is for another host name"
        if exc.verify_code in _UNTRUSTED:
            return f"TLS: the server's certificate is not trusted ({exc.verify_message}): check store.ca_file"
        return f"TLS: the server's certificate is not valid ({exc.verify_message})"
    reason = exc.reason or type(exc).__name__
    known = next((text for pattern, text in _TLS_ERRORS if pattern.search(reason)), "")
    return known or f"TLS: {reason.replace('_', ' ').lower()}"
